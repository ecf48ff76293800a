// The threads of a block as a team (common/group_weights.h): reductions in a fixed order, over lanes and then over warps.
#pragma once

#include "../common/max_sum.h"
#include "formats.cuh"
#include "platform.h"

namespace grpo::cuda {

template <class T>
__device__ __forceinline__ T from_lane(T x, int distance) {
  return __shfl_xor_sync(0xffffffffu, x, distance);
}

// To be constructed, and its functions called, by all threads of the block together.
struct Block {
  __device__ __forceinline__ int64_t first() const { return threadIdx.x; }
  __device__ __forceinline__ int64_t step() const { return blockDim.x; }

  template <class T>
  __device__ __forceinline__ T total(T x) const {
    return reduced(x, [](T a, T b) { return a + b; });
  }

  template <class T>
  __device__ __forceinline__ MaxSum<T> merged(MaxSum<T> x) const {
    const T max = reduced(x.max, [](T a, T b) { return larger(a, b); });
    return {max, total(rescaled(x, max))};
  }

 private:
  // `combine` is commutative to the bit, so that both lanes of a pair hold the same.
  template <class T, class Combine>
  static __device__ __forceinline__ T reduced(T x, Combine combine) {
    __shared__ __align__(16) unsigned char storage[kMaxWarps * sizeof(T)];
    T* of_warps = reinterpret_cast<T*>(storage);
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x = combine(x, from_lane(x, distance));
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();  // warps' results are read by all threads
    x = of_warps[0];
    for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) x = combine(x, of_warps[warp]);
    __syncthreads();  // the next reduction writes to the same place
    return x;
  }
};

// Takes `share` tickets: whether those were the last of `expected`. What thread 0 of a block stored before, all threads of
// the last one may read after; other threads' stores are not covered. Between two calls there must be a barrier.
__device__ __forceinline__ bool last_to_arrive(unsigned int* ticket, int64_t share, int64_t expected) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();  // its own stores come before the ticket, for the whole device
    last = int64_t(atomicAdd(ticket, unsigned(share))) + share == expected;
    __threadfence();  // the others' stores are read after it
  }
  __syncthreads();  // `last` is read by all threads, and the others' stores only after the ticket is taken
  return last;
}

}  // namespace grpo::cuda
