// A few operations on vectors of floats, in the compiler's vector extension; intrinsics only where it has no word for an
// operation. The number of lanes follows the instruction set that this file is being compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define GRPO_INLINE inline __attribute__((always_inline))

// A namespace for each instruction set: their vectors differ, and so must the names that the linker sees.
namespace grpo::cpu::GRPO_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

template <class V>
GRPO_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class V>
GRPO_INLINE void store(void* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

GRPO_INLINE Floats broadcast(float x) { return Floats{} + x; }

// The second argument where either is NaN.
GRPO_INLINE Floats max(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

GRPO_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

GRPO_INLINE float largest(Floats v) {
  float lane[kLanes];
  store(lane, v);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  return lane[0];
}

GRPO_INLINE double total(Floats v) {
  float lane[kLanes];
  double wide[kLanes];
  store(lane, v);
  for (int i = 0; i < kLanes; ++i) wide[i] = lane[i];
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) wide[i] += wide[i + step];
  return wide[0];
}

// exp(x) for x <= 88, within 1 ulp; 0 below -87.7, where floats are no longer normal; NaN stays.
//
// exp(x) = 2^n exp(r) with n = round(x / log 2), |r| <= log(2) / 2. Adding kRound rounds, and leaves n + 127, the bits of
// 2^n's exponent, in the lowest bits. x is first clamped to where n = -127, whose bits are those of 0.
GRPO_INLINE Floats exp(Floats x) {
  constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23
  x = max(broadcast(-88.02f), x);
  const Floats shifted = multiply_add(x, broadcast(1.44269504f), broadcast(kRound));
  const Floats n = shifted - kRound;
  Floats r = multiply_add(n, broadcast(-0.693359375f), x);  // 9 bits of log 2: n times this is exact
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  // (exp(r) - 1 - r) / r^2 by least squares made minimax (relative error of exp 3e-9 before rounding).
  Floats q = broadcast(0x1.6a23d0p-10f);
  q = multiply_add(q, r, broadcast(0x1.123a20p-7f));
  q = multiply_add(q, r, broadcast(0x1.5558f2p-5f));
  q = multiply_add(q, r, broadcast(0x1.555492p-3f));
  q = multiply_add(q, r, broadcast(0x1.fffffcp-2f));
  const Floats p = multiply_add(q, r * r, r) + 1.0f;
  return p * (Floats)((Words)shifted << 23);
}

}  // namespace grpo::cpu::GRPO_ISA
