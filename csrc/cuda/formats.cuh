// How logits of each dtype are read as Real and written back, 16 bytes at a time.
#pragma once

#include "platform.h"

namespace grpo::cuda {

struct Float32 {
  using Element = float;
  using Real = float;
  static __device__ __forceinline__ float widened(float x) { return x; }
  static __device__ __forceinline__ float narrowed(float x) { return x; }
};

struct Bfloat16 {
  using Element = __nv_bfloat16;
  using Real = float;
  static __device__ __forceinline__ float widened(Element x) { return __bfloat162float(x); }
  static __device__ __forceinline__ Element narrowed(float x) { return __float2bfloat16_rn(x); }
};

struct Float16 {
  using Element = __half;
  using Real = float;
  static __device__ __forceinline__ float widened(Element x) { return __half2float(x); }
  static __device__ __forceinline__ Element narrowed(float x) { return __float2half_rn(x); }
};

struct Float64 {
  using Element = double;
  using Real = double;
  static __device__ __forceinline__ double widened(double x) { return x; }
  static __device__ __forceinline__ double narrowed(double x) { return x; }
};

template <class Format>
struct alignas(16) Vector {
  static constexpr int kElements = 16 / sizeof(typename Format::Element);
  typename Format::Element x[kElements];
};

// exp(x) for x <= 0. In float32 the fast one: its error is absolute, in units of exp(0).
__device__ __forceinline__ float exp_below(float x) { return __expf(x); }
__device__ __forceinline__ double exp_below(double x) { return exp(x); }

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

}  // namespace grpo::cuda
