// The row kernels of the logits path: what they are given, and one table of them for each instruction set.
//
//     token_logp = logit[label] - logsumexp(logit)        dlogit = dtoken_logp * (onehot(label) - softmax(logit))
#pragma once

#include <cstdint>

namespace grpo::cpu {

enum class Dtype { float32, bfloat16, float16, float64 };
constexpr int kNumDtypes = 4;

// One number (or, with a vocabulary stride, V numbers) for each of sequences x positions rows. Strides count elements.
struct Layout {
  int64_t sequence_stride;
  int64_t position_stride;
};

struct Logits {
  char* data;
  Layout layout;
  int64_t vocab_stride;
};

struct Labels {
  const char* data;
  int bytes;  // 4 or 8: int32 or int64
  Layout layout;
  int64_t ignore_index;
};

struct Shape {
  int64_t sequences;
  int64_t positions;
  int64_t vocab_size;
};

struct Forward {
  Shape shape;
  Logits logits;
  Labels labels;
  char* token_logps;  // contiguous; float64 for float64 logits, else float32; so are lse and dtoken_logps
  char* lse;          // contiguous: (largest logit, log of the sum of exp(logit - largest)) of each row
};

struct Backward {
  Shape shape;
  Logits logits;
  Labels labels;
  const char* dtoken_logps;
  Layout dtoken_logps_layout;
  const char* lse;  // as the forward left it
  Logits out;  // may be the logits themselves
};

// Rows first .. last - 1. Each row is computed whole here, so how rows are dealt to threads changes no bit.
using ForwardRows = void (*)(const Forward&, int64_t first, int64_t last);
using BackwardRows = void (*)(const Backward&, int64_t first, int64_t last);

struct RowKernels {
  const char* name;
  ForwardRows forward[kNumDtypes];    // by Dtype
  BackwardRows backward[kNumDtypes];
  void (*exp)(const float* x, float* out, int64_t n);  // for tests: what the kernels use
};

extern const RowKernels baseline_kernels;  // what the compiler assumes anyway: SSE2, NEON, ...
#if defined(__x86_64__)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
#endif

}  // namespace grpo::cpu
