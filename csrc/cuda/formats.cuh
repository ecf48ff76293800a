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

// The same 16 bytes, for what is kept from one turn of a loop to the next: single elements of two bytes would each be moved
// to a register of its own, and the loads waited for at once.
struct alignas(16) Words {
  uint32_t word[4];

  template <class Format>
  __device__ __forceinline__ Vector<Format> as() const {
    Vector<Format> result;
    memcpy(&result, word, sizeof result);
    return result;
  }
};

// Blocks on a multiprocessor at once, at least: four allow 64 registers a thread, and 64 KiB of loads in flight.
template <class Format>
constexpr int kBlocks = sizeof(typename Format::Real) == 8 ? 2 : 4;

// exp(x) is exp2(x * kLog2E), which is the instruction that GPUs have. kLog2E multiplies differences only: at a logit of 1e4
// its product would be rounded by 1e-3.
template <class Real>
constexpr Real kLog2E = Real(1.4426950408889634);

__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
__device__ __forceinline__ double exp2_of(double x) { return exp2(x); }

__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

}  // namespace grpo::cuda
