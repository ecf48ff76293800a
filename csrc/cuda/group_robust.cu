// The whole forward of GroupRobustLoss in one launch: rows, then sequences, then the loss.
//
// Each block reads a row of logits (or a split of it) and takes a ticket of its sequence. The last to arrive adds up the
// sequence's token_logps and takes as many tickets of the launch as the sequence has rows; who takes the last of those does
// what finish.cuh describes. Tickets are integers and sums are taken in a fixed order, so the result is the same from run to
// run.
//
// Traffic: one read of the logits of counted rows; 12 bytes a row of workspace; O(sequences + groups) at the end.

#include "finish.cuh"
#include "launch.cuh"
#include "rows.cuh"

namespace grpo::cuda {
namespace {

struct Span {
  int64_t sequence, begin, end;  // rows begin .. end - 1
};

// Packed: the last sequence in [0, S) with cu_seqlens[sequence] <= row. Rows outside the sequences get one of them, too.
__device__ __forceinline__ Span span_of(const Rows& rows, const Loss& loss, int64_t row) {
  if (loss.cu_seqlens.data == nullptr) {
    const int64_t sequence = row / rows.positions;
    return {sequence, sequence * rows.positions, (sequence + 1) * rows.positions};
  }
  int64_t low = 0, high = loss.num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (loss.cu_seqlens[middle] <= row ? low : high) = middle;
  }
  return {low, loss.cu_seqlens[low], loss.cu_seqlens[low + 1]};
}

// Sum of token_logps and count of tokens of a sequence, in float64; merges the splits of its rows first.
template <class Format>
__device__ __forceinline__ void finish_sequence(const Rows& rows, const Loss& loss, int64_t sequence, int64_t begin,
                                             int64_t end) {
  using Real = typename Format::Real;
  double sum = 0;
  int64_t count = 0;
  for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
    sum += rows.splits > 1 ? merge_row<Format>(rows, row) : static_cast<const Real*>(rows.token_logps)[row];
    count += rows.labels[row] != rows.ignore_index;
  }
  const Block block;
  sum = block.total(sum);
  count = block.total(count);
  if (threadIdx.x != 0) return;
  loss.logps[sequence] = sum;
  loss.logps[loss.num_sequences + sequence] = count;
}

template <class Format>
__global__ void __launch_bounds__(kThreads, kBlocks<Format>)
    group_robust_fwd_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Loss loss) {
  const int64_t row = blockIdx.x, split = blockIdx.y;
  const Span span = span_of(rows, loss, row);
  const bool packed = loss.cu_seqlens.data != nullptr, belongs = row >= span.begin && row < span.end;
  if (packed && split == 0 && threadIdx.x == 0) loss.row_sequence[row] = belongs ? span.sequence : -1;
  do_row<Format>(rows, row, split, belongs);
  const int64_t total = packed ? loss.cu_seqlens[loss.num_sequences] - loss.cu_seqlens[0] : rows.num_rows;
  bool last = total == 0 && row == 0 && split == 0;  // without any row in a sequence, somebody must do it
  if (belongs && last_to_arrive(loss.tickets + span.sequence, 1, (span.end - span.begin) * rows.splits)) {
    finish_sequence<Format>(rows, loss, span.sequence, span.begin, span.end);
    last = last_to_arrive(loss.tickets + loss.num_sequences, span.end - span.begin, total);
  }
  if (last) finish<typename Format::Real>(loss);
}

template <class Real>
__global__ void __launch_bounds__(kThreads) group_robust_finish_kernel(const __grid_constant__ Loss loss) {
  finish<Real>(loss);
}

}  // namespace

void group_robust_forward(Place place, Dtype dtype, const Rows& rows, const Loss& loss) {
  if (rows.num_rows == 0) return;
  check_grid(rows.num_rows, "group_robust_fwd_kernel");
  const Current current(place.device);
  with_format(dtype, [&](auto format) {
    const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>(rows.splits));
    GRPO_LAUNCH(group_robust_fwd_kernel<decltype(format)>, grid, kThreads, stream_of(place), rows, loss);
  });
  check(cudaGetLastError(), "group_robust_fwd_kernel");
}

void group_robust_finish(Place place, Dtype dtype, const Loss& loss) {
  const Current current(place.device);
  if (dtype == Dtype::float64) {
    GRPO_LAUNCH(group_robust_finish_kernel<double>, dim3(1), kThreads, stream_of(place), loss);
  } else {
    GRPO_LAUNCH(group_robust_finish_kernel<float>, dim3(1), kThreads, stream_of(place), loss);
  }
  check(cudaGetLastError(), "group_robust_finish_kernel");
}

}  // namespace grpo::cuda
