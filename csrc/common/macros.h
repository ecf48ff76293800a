// What host and device code share is marked GRPO_HD. It is always inlined: the CPU kernels are compiled once for each
// instruction set, and an out-of-line copy made for AVX-512 must not be the one that the linker keeps for all.
#pragma once

#if defined(__CUDACC__)
#define GRPO_HD __host__ __device__ __forceinline__
#else
#define GRPO_HD inline __attribute__((always_inline))
#endif
