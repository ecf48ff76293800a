// What a launch is given: raw pointers, sizes, strides in elements. Shared by the kernels and the bindings.
//
//     token_logp = logit[label] - logsumexp(logit)        dlogit = dtoken_logp * (onehot(label) - softmax(logit))
#pragma once

#include <cstdint>

#include "../common/group_weights.h"
#include "../common/pair_losses.h"

namespace grpo::cuda {

enum class Dtype { float32, bfloat16, float16, float64 };

struct Place {
  int device;
  uintptr_t stream;  // a cudaStream_t
};

// Contiguous integers of 4 or 8 bytes.
struct Integers {
  const void* data;
  int64_t bytes;

  GRPO_HD int64_t operator[](int64_t i) const {
    return bytes == 4 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

// Contiguous float or double, or nothing.
struct Reals {
  const void* data;
  int64_t bytes;

  GRPO_HD explicit operator bool() const { return data != nullptr; }
  GRPO_HD double operator[](int64_t i) const {
    return bytes == 4 ? double(static_cast<const float*>(data)[i]) : static_cast<const double*>(data)[i];
  }
};

struct Matrix {
  void* data;
  int64_t sequence_stride;
  int64_t position_stride;
  int64_t vocab_stride;

  // Of row number `row`, which is below 2^31 as a grid is; rows * V is not.
  GRPO_HD int64_t offset(int64_t row, int64_t positions) const {
    const uint32_t sequence = uint32_t(row) / uint32_t(positions);
    return sequence * sequence_stride + (uint32_t(row) - sequence * uint32_t(positions)) * position_stride;
  }
};

// Real is double for float64 logits, else float.
struct Rows {
  int64_t num_rows;
  int64_t positions;  // row r is position r % positions of sequence r / positions
  int vocab_size;     // below 2^30, so that columns need 32 bits
  Matrix logits;
  Integers labels;
  int64_t ignore_index;
  void* token_logps;  // (rows,) Real
  void* lse;          // (rows, 2) Real: largest logit, log of the sum of exp(logit - largest)
  int64_t splits;     // blocks a row
  void* partial;      // (2, rows, splits) Real where splits > 1: the maxima, then the sums
};

struct Gradient {
  const void* dtoken_logps;  // Real
  int64_t sequence_stride;
  int64_t position_stride;
  Reals factor;                 // one number that multiplies every dtoken_logp, or nothing
  const int32_t* row_sequence;  // not null: the first index of a row's dtoken_logp, negative where it has none
  Matrix out;                   // may be the logits
};

enum class Update { inline_, lagged, none };

// kernels/group_robust.py describes the tables.
struct Loss {
  int64_t num_sequences;
  Integers cu_seqlens;    // (S + 1,) for packed rows; data is null for padded ones
  int32_t* row_sequence;  // (rows,) for packed rows: -1 for those of no sequence
  unsigned int* tickets;  // (S + 1,) zeros: one for each sequence, then that of the launch
  double* logps;          // (2, S) zeros: sums of token_logps, then counts of tokens
  void* sequences;        // (4, S) Real
  void* pairs;            // (3, B) Real
  double* groups;         // (5, K)
  int64_t* counts;        // (K,)
  void* loss;             // Real
  Integers group_ids;
  Reals ref_logps, betas, margin, weights;
  double beta, label_smoothing;
  PairLoss type;
  bool average;
  GroupRule<double> rule;
  Update update;
  double gradient_scale;
  double* log_alpha;
  double* pending_sums;
  int64_t* pending_counts;
  int64_t* skipped_updates;
  bool clear;               // whether the last block clears the sums and counts that it adds to
  bool do_pairs, do_alpha;  // which stages it does
};

// Each raises std::runtime_error with CUDA's text if a launch fails.
void logps_forward(Place, Dtype, const Rows&);
void logps_backward(Place, Dtype, const Rows&, const Gradient&);
void group_robust_forward(Place, Dtype, const Rows&, const Loss&);
void group_robust_finish(Place, Dtype, const Loss&);  // one block that does the stages alone

}  // namespace grpo::cuda
