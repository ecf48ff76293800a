// What the kernels need of CUDA. tests/simulator has headers of the same names, with which g++ compiles these files for
// the CPU; it defines GRPO_LAUNCH itself.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#if !defined(GRPO_LAUNCH)
#define GRPO_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

// Threads of a block, at least 16. The simulator takes fewer, to be faster.
#if !defined(GRPO_THREADS)
#define GRPO_THREADS 256
#endif

namespace grpo::cuda {

constexpr int kThreads = GRPO_THREADS;
constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr int64_t kMaxGridX = (int64_t(1) << 31) - 1;

}  // namespace grpo::cuda
