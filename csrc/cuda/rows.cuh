// A row of logits: its log-sum-exp, by one block or by several that split it.
//
// Traffic: V read once, 16 bytes a load, kLoads loads of a thread in flight. The elements before the first 16-byte boundary
// and behind the last are a row's edges: asked for first, needed last. Each thread keeps a running maximum and sum; they are
// merged in a fixed order.
#pragma once

#include "block.cuh"
#include "formats.cuh"
#include "launches.h"

namespace grpo::cuda {

// 64 bytes a thread, 16 KiB a block; half of it in float64, whose exp() takes the registers. Not measured yet.
template <class Format>
constexpr int kLoads = sizeof(typename Format::Element) == 8 ? 2 : 4;

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// A row whose columns are neighbours, as [0, head) single elements, `vectors` of 16 bytes, and single ones from `tail` on.
template <class Format>
struct Pieces {
  int head, vectors, tail;

  __device__ __forceinline__ Pieces(const typename Format::Element* x, int vocab_size) {
    constexpr int kElements = Vector<Format>::kElements;
    const unsigned past = unsigned(reinterpret_cast<uintptr_t>(x)) % 16 / sizeof(typename Format::Element);
    head = smaller((kElements - past) % kElements, vocab_size);
    vectors = unsigned(vocab_size - head) / kElements;
    tail = head + vectors * kElements;
  }

  // The edge's element that is this thread's, or -1. The first 16 threads have one at most.
  __device__ __forceinline__ int edge(int vocab_size) const {
    const int thread = threadIdx.x;
    if (thread < 8) return thread < head ? thread : -1;
    const int column = tail + thread - 8;
    return column < vocab_size ? column : -1;
  }
};

// The running maximum starts at a finite number: -inf minus -inf would be NaN.
template <class Real>
constexpr Real kLowest = Real(sizeof(Real) == 8 ? -1e300 : -2e38);

// The online log-sum-exp: N more elements. NaN is passed over by the maximum and met in the sum.
template <int N, class Real>
__device__ __forceinline__ void absorb(MaxSum<Real>& running, const Real (&x)[N]) {
  Real peak = running.max;
#pragma unroll
  for (int i = 0; i < N; ++i) peak = larger(peak, x[i]);
  Real sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += exp2_of((x[i] - peak) * kLog2E<Real>);
  running.sum = running.sum * exp2_of((running.max - peak) * kLog2E<Real>) + sum;
  running.max = peak;
}

// (largest logit, sum of exp(logit - largest)) of one split of a row, the same in all threads of the block.
template <class Format>
__device__ __forceinline__ MaxSum<typename Format::Real> scan_row(const typename Format::Element* x, int64_t stride,
                                                                  int vocab_size, int split, int splits) {
  using Real = typename Format::Real;
  constexpr int kElements = Vector<Format>::kElements;
  MaxSum<Real> running{kLowest<Real>, 0};
  if (stride != 1) {
    for (int64_t column = split * kThreads + threadIdx.x; column < vocab_size; column += splits * int64_t(kThreads)) {
      const Real one[1] = {Format::widened(x[column * stride])};
      absorb(running, one);
    }
    return Block().merged(running);
  }
  const Pieces<Format> pieces(x, vocab_size);
  const int edge = split == 0 ? pieces.edge(vocab_size) : -1;
  typename Format::Element of_edge{};
  if (edge >= 0) of_edge = x[edge];
  const auto* vectors = reinterpret_cast<const Vector<Format>*>(x + pieces.head);
  const int share = (pieces.vectors + splits - 1) / splits;
  const int end = smaller((split + 1) * share, pieces.vectors);
  int i = split * share + threadIdx.x;
  for (; i + (kLoads<Format> - 1) * kThreads < end; i += kLoads<Format> * kThreads) {
    Vector<Format> loaded[kLoads<Format>];
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load) loaded[load] = vectors[i + load * kThreads];
    Real values[kLoads<Format> * kElements];
#pragma unroll
    for (int e = 0; e < kLoads<Format> * kElements; ++e)
      values[e] = Format::widened(loaded[e / kElements].x[e % kElements]);
    absorb(running, values);
  }
#pragma unroll 1
  for (; i < end; i += kThreads) {
    const Vector<Format> loaded = vectors[i];
    Real values[kElements];
#pragma unroll
    for (int e = 0; e < kElements; ++e) values[e] = Format::widened(loaded.x[e]);
    absorb(running, values);
  }
  if (edge >= 0) {
    const Real one[1] = {Format::widened(of_edge)};
    absorb(running, one);
  }
  return Block().merged(running);
}

// NaN where the label is outside the vocabulary.
template <class Format>
__device__ __forceinline__ typename Format::Real label_logit(const Rows& rows, int64_t row, int64_t label) {
  if (label < 0 || label >= rows.vocab_size) return std::numeric_limits<typename Format::Real>::quiet_NaN();
  const auto* x = static_cast<const typename Format::Element*>(rows.logits.data);
  return Format::widened(x[rows.logits.offset(row, rows.positions) + label * rows.logits.vocab_stride]);
}

// What a row leaves behind, by one thread; returns its token_logp.
template <class Format, class Real = typename Format::Real>
__device__ __forceinline__ Real store_row(const Rows& rows, int64_t row, Real of_label, MaxSum<Real> found) {
  const bool known = of_label == of_label;
  const Real row_max = known ? found.max : of_label, log_sum = known ? std::log(found.sum) : of_label;
  // In this order: max + log_sum would lose digits at logits of 1e4.
  const Real token_logp = (of_label - row_max) - log_sum;
  static_cast<Real*>(rows.token_logps)[row] = token_logp;
  static_cast<Real*>(rows.lse)[2 * row] = row_max;
  static_cast<Real*>(rows.lse)[2 * row + 1] = log_sum;
  return token_logp;
}

template <class Format>
__device__ __forceinline__ void store_ignored_row(const Rows& rows, int64_t row) {
  using Real = typename Format::Real;
  static_cast<Real*>(rows.token_logps)[row] = 0;
  static_cast<Real*>(rows.lse)[2 * row] = 0;
  static_cast<Real*>(rows.lse)[2 * row + 1] = 0;
}

// A block reads its split of its row, if the row counts, and stores what it found.
template <class Format>
__device__ __forceinline__ void do_row(const Rows& rows, int64_t row, int split, bool counts) {
  using Real = typename Format::Real;
  const int64_t label = rows.labels[row];
  if (!counts || label == rows.ignore_index) {
    if (split == 0 && threadIdx.x == 0) store_ignored_row<Format>(rows, row);
    return;
  }
  Real of_label = 0;
  if (rows.splits == 1 && threadIdx.x == 0) of_label = label_logit<Format>(rows, row, label);
  const auto* x = static_cast<const typename Format::Element*>(rows.logits.data);
  const MaxSum<Real> found = scan_row<Format>(x + rows.logits.offset(row, rows.positions), rows.logits.vocab_stride,
                                              rows.vocab_size, split, int(rows.splits));
  if (threadIdx.x != 0) return;
  if (rows.splits == 1) {
    store_row<Format>(rows, row, of_label, found);
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
  const int64_t label = rows.labels[row];
  if (label == rows.ignore_index) {
    store_ignored_row<Format>(rows, row);
    return 0;
  }
  MaxSum<Real> found;
  for (int64_t split = 0; split < rows.splits; ++split)
    found = merge(found, MaxSum<Real>{partial[row * rows.splits + split],
                                      partial[(rows.num_rows + row) * rows.splits + split]});
  return store_row<Format>(rows, row, label_logit<Format>(rows, row, label), found);
}

}  // namespace grpo::cuda
