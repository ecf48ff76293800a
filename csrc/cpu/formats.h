// How logits of each dtype are read as floats and written back, two vectors at a time. bfloat16 vectors are split into
// even and odd elements, which needs no shuffle; store2() is the inverse of load2(), rounding to nearest even.
#pragma once

#include "simd.h"

namespace grpo::cpu::GRPO_ISA {

struct Float32 {
  using Element = float;

  static GRPO_INLINE void load2(const Element* x, Floats& a, Floats& b) {
    a = load<Floats>(x);
    b = load<Floats>(x + kLanes);
  }

  static GRPO_INLINE void store2(Element* out, Floats a, Floats b) {
    store(out, a);
    store(out + kLanes, b);
  }
};

struct Bfloat16 {
  using Element = uint16_t;

  static GRPO_INLINE void load2(const Element* x, Floats& a, Floats& b) {
    const Words both = load<Words>(x);
    a = (Floats)(both << 16);
    b = (Floats)(both & 0xffff0000u);
  }

  // Right for every number and for NaN whose low bits are 0, which is all that the kernels make.
  static GRPO_INLINE Words rounded(Floats v) {
    const Words bits = (Words)v;
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }

  static GRPO_INLINE void store2(Element* out, Floats a, Floats b) {
    store(out, (rounded(a) >> 16) | (rounded(b) & 0xffff0000u));
  }
};

struct Float16 {
  using Element = uint16_t;

  static GRPO_INLINE Floats widened(const Element* x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(load<__m256i>(x));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(load<__m128i>(x));
#else
    constexpr uint32_t kRebias = 112u << 23;  // exponents count from 15 here, from 127 there
    const Words h = __builtin_convertvector(load<Halves>(x), Words);
    const Words shifted = (h & 0x7fffu) << 13, exponent = shifted & 0x0f800000u;
    const Words normal = shifted + kRebias;
    // A subnormal's bits are a whole number of 2^-24: made the fraction of 2^-14, which is then taken away.
    const Words subnormal = (Words)((Floats)(normal + (1u << 23)) - 0x1p-14f);
    Words bits = exponent == 0x0f800000u ? normal + kRebias : normal;  // inf and NaN
    bits = exponent == 0u ? subnormal : bits;
    return (Floats)(bits | ((h & 0x8000u) << 16));
#endif
  }

  static GRPO_INLINE Halves narrowed(Floats v) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
    return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Words bits = (Words)v, size = bits & 0x7fffffffu;
    const Words normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    const Words subnormal = (Words)((Floats)size + 0.5f) - 0x3f000000u;  // 0.5's last bit is 2^-24: the sum rounds
    Words half = size < 0x38800000u ? subnormal : normal;
    half = size >= 0x47800000u ? Words{} + 0x7c00u : half;
    half = size > 0x7f800000u ? Words{} + 0x7e00u : half;
    return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), Halves);
#endif
  }

  static GRPO_INLINE void load2(const Element* x, Floats& a, Floats& b) {
    a = widened(x);
    b = widened(x + kLanes);
  }

  static GRPO_INLINE void store2(Element* out, Floats a, Floats b) {
    store(out, narrowed(a));
    store(out + kLanes, narrowed(b));
  }
};

}  // namespace grpo::cpu::GRPO_ISA
