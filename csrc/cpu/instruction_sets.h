// Which of the compiled row kernels this machine can run, best first.
#pragma once

#include <vector>

#include "row_kernels.h"

namespace grpo::cpu {

inline std::vector<const RowKernels*> usable_kernels() {
  std::vector<const RowKernels*> usable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These ask the operating system too: it must save the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) usable.push_back(&avx512_kernels);
  if (avx2) usable.push_back(&avx2_kernels);
#endif
  usable.push_back(&baseline_kernels);
  return usable;
}

}  // namespace grpo::cpu
