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
__global__ void __launch_bounds__(kThreads, kBlocks<Format>) logps_fwd_kernel(const __grid_constant__ Rows rows) {
  do_row<Format>(rows, blockIdx.x, blockIdx.y, true);
}

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocks<Format>) merge_splits_kernel(const __grid_constant__ Rows rows) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < rows.num_rows) merge_row<Format>(rows, row);
}

// The gradient of a row's elements.
template <class Format>
struct RowGradient {
  using Element = typename Format::Element;
  using Real = typename Format::Real;
  Real row_max, shift, scale;  // shift: log_sum * kLog2E

  // Of a column that is not the label's.
  __device__ __forceinline__ Element operator()(Element x) const {
    return Format::narrowed(-scale * exp2_of((Format::widened(x) - row_max) * kLog2E<Real> - shift));
  }

  // 1 - softmax would lose the digits of a confident token.
  __device__ __forceinline__ Element of_label(Element x, Real log_sum) const {
    return Format::narrowed(-scale * std::expm1(Format::widened(x) - row_max - log_sum));
  }
};

template <class Format>
__device__ __forceinline__ typename Format::Real scale_of(const Rows& rows, const Gradient& gradient, int64_t row) {
  using Real = typename Format::Real;
  const int64_t at = gradient.row_sequence != nullptr
                         ? gradient.row_sequence[row] * gradient.sequence_stride
                         : Matrix{nullptr, gradient.sequence_stride, gradient.position_stride, 0}.offset(row, rows.positions);
  const Real scale = static_cast<const Real*>(gradient.dtoken_logps)[at];
  return gradient.factor ? Real(scale * Real(gradient.factor[0])) : scale;
}

// Columns of a block: steps of kLoads vectors a thread, all of a step loaded before the first is stored. A second step
// halves what finding the row costs for each logit.
constexpr int kSteps = 2;
template <class Format>
constexpr int kStep = kThreads * kLoads<Format>;  // vectors
template <class Format>
constexpr int kTile = kSteps * kStep<Format> * Vector<Format>::kElements;

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocks<Format>)
    logps_bwd_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Gradient gradient, unsigned tiles) {
  using Element = typename Format::Element;
  using Real = typename Format::Real;
  constexpr int kElements = Vector<Format>::kElements;
  // Last row first: the end of what the forward read may still be in the cache.
  const unsigned back = blockIdx.x / tiles, tile = blockIdx.x - back * tiles;
  const int64_t row = rows.num_rows - 1 - int64_t(back);
  const int vocab_size = rows.vocab_size;
  const int64_t stride = rows.logits.vocab_stride, out_stride = gradient.out.vocab_stride;
  const int64_t label = rows.labels[row];
  const bool counts =
      label != rows.ignore_index && (gradient.row_sequence == nullptr || gradient.row_sequence[row] >= 0);
  const auto* x = static_cast<const Element*>(rows.logits.data) + rows.logits.offset(row, rows.positions);
  auto* out = static_cast<Element*>(gradient.out.data) + gradient.out.offset(row, rows.positions);
  const Element zero = Format::narrowed(Real(0));
  const auto row_gradient = [&](Real& log_sum) {
    const Real* lse = static_cast<const Real*>(rows.lse) + 2 * row;
    log_sum = lse[1];
    return RowGradient<Format>{lse[0], log_sum * kLog2E<Real>, scale_of<Format>(rows, gradient, row)};
  };

  // Where the two do not lie alike, or columns are not neighbours, all elements are single ones.
  if (stride != 1 || out_stride != 1 || (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(out)) % 16 != 0) {
    Real log_sum = 0;
    const RowGradient<Format> of_row = counts ? row_gradient(log_sum) : RowGradient<Format>{};
    const int end = smaller((tile + 1) * kTile<Format>, vocab_size);
    for (int64_t column = tile * kTile<Format> + threadIdx.x; column < end; column += kThreads) {
      const Element one = counts ? x[column * stride] : zero;
      out[column * out_stride] = !counts ? zero : column == label ? of_row.of_label(one, log_sum) : of_row(one);
    }
    return;
  }

  const Pieces<Format> pieces(x, vocab_size);
  const int edge = tile == 0 ? pieces.edge(vocab_size) : -1;
  const int begin = tile * kSteps * kStep<Format> + threadIdx.x;
  const auto* vectors = reinterpret_cast<const Words*>(x + pieces.head) + begin;
  auto* out_vectors = reinterpret_cast<Vector<Format>*>(out + pieces.head) + begin;
  const int left = smaller(pieces.vectors - begin, kSteps * kStep<Format>);
  if (!counts) {
    for (int i = 0; i < left; i += kThreads) out_vectors[i] = Vector<Format>{};
    if (edge >= 0) out[edge] = zero;
    return;
  }
  Words loaded[kLoads<Format>];
  const auto load_step = [&](int first) {
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load)
      if (first + load * kThreads < left) loaded[load] = vectors[first + load * kThreads];
  };
  load_step(0);
  Element of_edge = zero, of_label = zero;
  if (edge >= 0) of_edge = x[edge];
  // The thread that stores the label's vector, or edge, stores the label once more.
  const bool known = label >= 0 && label < vocab_size;
  const unsigned of_vector = unsigned(int(label) - pieces.head) / kElements - unsigned(begin);
  const bool in_vector = label >= pieces.head && label < pieces.tail && of_vector % kThreads == 0 &&
                         of_vector < unsigned(kSteps * kStep<Format>);
  const bool mine = known && (in_vector || edge == label);
  if (mine) of_label = x[label];
  Real log_sum;
  const RowGradient<Format> of_row = row_gradient(log_sum);
#pragma unroll 1
  for (int first = 0;;) {
#pragma unroll
    for (int load = 0; load < kLoads<Format>; ++load) {
      if (first + load * kThreads >= left) continue;
      Vector<Format> result = loaded[load].template as<Format>();
#pragma unroll
      for (int e = 0; e < kElements; ++e) result.x[e] = of_row(result.x[e]);
      out_vectors[first + load * kThreads] = result;
    }
    first += kStep<Format>;
    if (first >= left) break;
    load_step(first);
  }
  if (edge >= 0) out[edge] = of_row(of_edge);
  if (mine) out[label] = of_row.of_label(of_label, log_sum);
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
  if (rows.num_rows == 0 || rows.vocab_size == 0) return;
  const Current current(place.device);
  with_format(dtype, [&](auto format) {
    const int64_t tiles = (rows.vocab_size + kTile<decltype(format)> - 1) / kTile<decltype(format)>;
    check_grid(rows.num_rows * tiles, "logps_bwd_kernel");
    const dim3 grid(static_cast<unsigned>(rows.num_rows * tiles));
    GRPO_LAUNCH(logps_bwd_kernel<decltype(format)>, grid, kThreads, stream_of(place), rows, gradient,
                static_cast<unsigned>(tiles));
  });
  check(cudaGetLastError(), "logps_bwd_kernel");
}

}  // namespace grpo::cuda
