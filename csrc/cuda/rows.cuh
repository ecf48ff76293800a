// A row of logits: its log-sum-exp, by one block or by several that split it.
//
// Traffic: V read once, 16 bytes a load, kLoads loads of a thread in flight. Elements before the first 16-byte boundary
// and after the last are read one by one. Each thread keeps a running maximum and sum; they are merged in a fixed order.
#pragma once

#include "block.cuh"
#include "formats.cuh"
#include "launches.h"

namespace grpo::cuda {

// 64 bytes a thread, 16 KiB a block; half of it in float64, whose exp() takes the registers. Not measured yet.
template <class Format>
constexpr int kLoads = sizeof(typename Format::Element) == 8 ? 2 : 4;

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// A row as [0, head) single elements, `vectors` of 16 bytes, and single elements from `tail` on. No vectors where the
// vocabulary is strided.
template <class Format>
struct Pieces {
  int64_t head, vectors, tail;

  __device__ __forceinline__ Pieces(const typename Format::Element* x, int64_t stride, int64_t vocab_size) {
    constexpr int kElements = Vector<Format>::kElements;
    const int64_t past = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(typename Format::Element);
    head = stride == 1 ? smaller((kElements - past) % kElements, vocab_size) : vocab_size;
    vectors = (vocab_size - head) / kElements;
    tail = head + vectors * kElements;
  }
};

// The online log-sum-exp: N more elements. NaN is passed over by the maximum and met in the sum.
template <int N, class Real>
__device__ __forceinline__ void absorb(MaxSum<Real>& running, const Real (&x)[N]) {
  constexpr Real kLowest = -std::numeric_limits<Real>::infinity();
  Real peak = running.max;
#pragma unroll
  for (int i = 0; i < N; ++i) peak = larger(x[i], peak);
  if (peak > running.max) {
    running.sum *= exp_below(running.max - peak);
    running.max = peak;
  }
  const Real shift = peak == kLowest ? Real(0) : peak;  // -inf minus -inf would be NaN
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += exp_below(x[i] - shift);
  running.sum += sum;
}

// (largest logit, sum of exp(logit - largest)) of one split of a row, the same in all threads of the block.
template <class Format>
__device__ MaxSum<typename Format::Real> scan_row(const typename Format::Element* x, int64_t stride,
                                                  int64_t vocab_size, int64_t split, int64_t splits) {
  using Real = typename Format::Real;
  constexpr int kElements = Vector<Format>::kElements;
  const Pieces<Format> pieces(x, stride, vocab_size);
  MaxSum<Real> running;
  const auto absorb_one = [&](int64_t column) {
    const Real one[1] = {Format::widened(x[column * stride])};
    absorb(running, one);
  };
  if (split == 0) {
    for (int64_t column = threadIdx.x; column < pieces.head; column += blockDim.x) absorb_one(column);
    for (int64_t column = pieces.tail + threadIdx.x; column < vocab_size; column += blockDim.x) absorb_one(column);
  }
  const auto* vectors = reinterpret_cast<const Vector<Format>*>(x + pieces.head);
  const int64_t share = (pieces.vectors + splits - 1) / splits;
  const int64_t end = smaller((split + 1) * share, pieces.vectors);
  int64_t i = split * share + threadIdx.x;
  for (; i + (kLoads<Format> - 1) * int64_t(blockDim.x) < end; i += kLoads<Format> * int64_t(blockDim.x)) {
    Vector<Format> loaded[kLoads<Format>];
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load) loaded[load] = vectors[i + load * int64_t(blockDim.x)];
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load) {
      Real values[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) values[e] = Format::widened(loaded[load].x[e]);
      absorb(running, values);
    }
  }
  for (; i < end; i += blockDim.x) {
    const Vector<Format> loaded = vectors[i];
    Real values[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = Format::widened(loaded.x[e]);
    absorb(running, values);
  }
  return Block().merged(running);
}

// What a row leaves behind, by one thread. NaN where its label is outside the vocabulary; returns its token_logp.
template <class Format>
__device__ __forceinline__ typename Format::Real store_row(const Rows& rows, int64_t row, int64_t label,
                                                           MaxSum<typename Format::Real> found) {
  using Real = typename Format::Real;
  Real token_logp = std::numeric_limits<Real>::quiet_NaN(), row_max = token_logp, log_sum = token_logp;
  if (label == rows.ignore_index) {
    token_logp = row_max = log_sum = 0;
  } else if (label >= 0 && label < rows.vocab_size) {
    const auto* x = static_cast<const typename Format::Element*>(rows.logits.data);
    const int64_t at = rows.logits.offset(row, rows.positions) + label * rows.logits.vocab_stride;
    row_max = found.max;
    log_sum = std::log(found.sum);
    // In this order: max + log_sum would lose digits at logits of 1e4.
    token_logp = (Format::widened(x[at]) - row_max) - log_sum;
  }
  static_cast<Real*>(rows.token_logps)[row] = token_logp;
  static_cast<Real*>(rows.lse)[2 * row] = row_max;
  static_cast<Real*>(rows.lse)[2 * row + 1] = log_sum;
  return token_logp;
}

// A block reads its split of its row, unless the row's label is ignored, and stores what it found.
template <class Format>
__device__ __forceinline__ void do_row(const Rows& rows, int64_t row, int64_t split) {
  using Real = typename Format::Real;
  const int64_t label = rows.labels[row];
  MaxSum<Real> found;
  if (label != rows.ignore_index) {
    const auto* x = static_cast<const typename Format::Element*>(rows.logits.data);
    found = scan_row<Format>(x + rows.logits.offset(row, rows.positions), rows.logits.vocab_stride, rows.vocab_size,
                             split, rows.splits);
  }
  if (threadIdx.x != 0) return;
  if (rows.splits == 1) {
    store_row<Format>(rows, row, label, found);
  } else {
    Real* partial = static_cast<Real*>(rows.partial);
    partial[row * rows.splits + split] = found.max;
    partial[(rows.num_rows + row) * rows.splits + split] = found.sum;
  }
}

// One thread merges a row's splits, always in the same order, and stores them.
template <class Format>
__device__ __forceinline__ typename Format::Real merge_row(const Rows& rows, int64_t row) {
  using Real = typename Format::Real;
  const Real* partial = static_cast<const Real*>(rows.partial);
  MaxSum<Real> found;
  const int64_t label = rows.labels[row];
  for (int64_t split = 0; split < rows.splits && label != rows.ignore_index; ++split)
    found = merge(found, MaxSum<Real>{partial[row * rows.splits + split],
                                      partial[(rows.num_rows + row) * rows.splits + split]});
  return store_row<Format>(rows, row, label, found);
}

}  // namespace grpo::cuda
