// Token log-probabilities: a block for each row (or split of a row) forward, for each tile of a row backward.
//
//     token_logp = logit[label] - max - log_sum        log_sum = log(sum_v exp(logit_v - max))
//     dlogit_v = dtoken_logp * (1{v = label} - exp(logit_v - max - log_sum))
//
// Traffic: the forward reads V, the backward reads V and writes V; an ignored row is not read, only its gradient written.

#include "launch.cuh"
#include "rows.cuh"

namespace grpo::cuda {
namespace {

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocks) logps_fwd_kernel(const __grid_constant__ Rows rows) {
  do_row<Format>(rows, blockIdx.x, blockIdx.y);
}

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocks) merge_splits_kernel(const __grid_constant__ Rows rows) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows.num_rows) merge_row<Format>(rows, row);
}

// The gradient of single elements, and of 16 bytes of them, in one row.
template <class Format>
struct RowGradient {
  using Element = typename Format::Element;
  using Real = typename Format::Real;
  Real row_max, log_sum, scale;
  int64_t label;

  __device__ __forceinline__ Element at(Element x, int64_t column) const {
    const Real token_logp = Format::widened(x) - row_max - log_sum;
    // 1 - softmax would lose the digits of a confident token.
    return Format::narrowed(scale * (column == label ? -std::expm1(token_logp) : -exp_below(token_logp)));
  }

  __device__ __forceinline__ Vector<Format> of(const Vector<Format>& x, int64_t column) const {
    constexpr int kElements = Vector<Format>::kElements;
    Vector<Format> result;
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      result.x[e] = Format::narrowed(-scale * exp_below(Format::widened(x.x[e]) - row_max - log_sum));
    if (label >= column && label < column + kElements) {
#pragma unroll
      for (int e = 0; e < kElements; ++e)
        if (column + e == label) result.x[e] = at(x.x[e], label);
    }
    return result;
  }
};

template <class Format>
__device__ __forceinline__ typename Format::Real scale_of(const Rows& rows, const Gradient& gradient, int64_t row) {
  using Real = typename Format::Real;
  const int64_t at = gradient.row_sequence != nullptr
                         ? gradient.row_sequence[row] * gradient.sequence_stride
                         : row / rows.positions * gradient.sequence_stride + row % rows.positions * gradient.position_stride;
  const Real scale = static_cast<const Real*>(gradient.dtoken_logps)[at];
  return gradient.factor ? Real(scale * Real(gradient.factor[0])) : scale;
}

// Columns of a tile: kLoads vectors a thread, all loaded before the first is stored.
template <class Format>
constexpr int64_t kTile = int64_t(kThreads) * kLoads<Format> * Vector<Format>::kElements;

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocks)
    logps_bwd_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Gradient gradient) {
  using Element = typename Format::Element;
  using Real = typename Format::Real;
  constexpr int kElements = Vector<Format>::kElements;
  const int64_t row = blockIdx.x, vocab_size = rows.vocab_size;
  const int64_t stride = rows.logits.vocab_stride, out_stride = gradient.out.vocab_stride;
  const auto* x = static_cast<const Element*>(rows.logits.data) + rows.logits.offset(row, rows.positions);
  auto* out = static_cast<Element*>(gradient.out.data) + gradient.out.offset(row, rows.positions);
  const int64_t label = rows.labels[row];
  const bool counted = label != rows.ignore_index;
  RowGradient<Format> of_row{};
  if (counted) {
    const Real* lse = static_cast<const Real*>(rows.lse) + 2 * row;
    of_row = {lse[0], lse[1], scale_of<Format>(rows, gradient, row), label};
  }
  // Where the two do not lie alike, or columns are not neighbours, all elements are single ones.
  const bool alike = stride == 1 && reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(out) % 16;
  const Pieces<Format> pieces(out, alike ? out_stride : 0, vocab_size);
  const auto do_one = [&](int64_t column) {
    out[column * out_stride] = counted ? of_row.at(x[column * stride], column) : Format::narrowed(Real(0));
  };
  const int64_t first = blockIdx.y * int64_t(blockDim.x) + threadIdx.x, step = gridDim.y * int64_t(blockDim.x);
  for (int64_t column = first; column < pieces.head; column += step) do_one(column);
  for (int64_t column = pieces.tail + first; column < vocab_size; column += step) do_one(column);

  const auto* vectors = reinterpret_cast<const Vector<Format>*>(x + pieces.head);
  auto* out_vectors = reinterpret_cast<Vector<Format>*>(out + pieces.head);
  for (int64_t tile = blockIdx.y; tile * kLoads<Format> * blockDim.x < pieces.vectors; tile += gridDim.y) {
    const int64_t begin = tile * kLoads<Format> * blockDim.x + threadIdx.x;
    Vector<Format> loaded[kLoads<Format>];
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load) {
      const int64_t i = begin + load * int64_t(blockDim.x);
      if (counted && i < pieces.vectors) loaded[load] = vectors[i];
    }
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load) {
      const int64_t i = begin + load * int64_t(blockDim.x);
      if (i < pieces.vectors)
        out_vectors[i] = counted ? of_row.of(loaded[load], pieces.head + i * kElements) : Vector<Format>{};
    }
  }
}

}  // namespace

void logps_forward(Place place, Dtype dtype, const Rows& rows) {
  if (rows.num_rows == 0) return;
  check_grid(rows.num_rows, "logps_fwd_kernel");
  const Current current(place.device);
  with_format(dtype, [&](auto format) {
    const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(rows.splits));
    GRPO_LAUNCH(logps_fwd_kernel<decltype(format)>, grid, kThreads, stream_of(place), rows);
    check(cudaGetLastError(), "logps_fwd_kernel");
    if (rows.splits == 1) return;
    const dim3 merging(static_cast<unsigned>((rows.num_rows + kThreads - 1) / kThreads));
    GRPO_LAUNCH(merge_splits_kernel<decltype(format)>, merging, kThreads, stream_of(place), rows);
    check(cudaGetLastError(), "merge_splits_kernel");
  });
}

void logps_backward(Place place, Dtype dtype, const Rows& rows, const Gradient& gradient) {
  if (rows.num_rows == 0) return;
  check_grid(rows.num_rows, "logps_bwd_kernel");
  const Current current(place.device);
  with_format(dtype, [&](auto format) {
    const int64_t tiles = (rows.vocab_size + kTile<decltype(format)> - 1) / kTile<decltype(format)>;
    const int64_t y = tiles < 1 ? 1 : tiles < kMaxGridY ? tiles : kMaxGridY;
    const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(y));
    GRPO_LAUNCH(logps_bwd_kernel<decltype(format)>, grid, kThreads, stream_of(place), rows, gradient);
  });
  check(cudaGetLastError(), "logps_bwd_kernel");
}

}  // namespace grpo::cuda
