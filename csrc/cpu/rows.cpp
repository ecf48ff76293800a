// The row kernels, compiled once for each instruction set (setup.py names it in GRPO_ISA).
//
// Traffic a row: the forward reads V, the backward reads V and writes V; ignored rows are not read. A row is worked
// through in blocks that stay in the first cache: largest element, then sum of exp(x - largest so far).
// No standard containers or other shared templates here: see GRPO_HD.

#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/max_sum.h"
#include "formats.h"
#include "row_kernels.h"

namespace grpo::cpu::GRPO_ISA {
namespace {

// Elements of a block. In float32 it is half of a 32 KiB first cache, with the next block being fetched into the rest.
constexpr int64_t kBlock = 4096;
constexpr int kStep = 2 * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- arithmetic on a block of n <= kBlock neighbours ------------------------------------------------------------------

// float32, bfloat16 and float16, computed in float32; sums of a block are added up in float64.
template <class Format>
struct Vectorised {
  using Element = typename Format::Element;
  using Real = float;

  static float widened(Element x) {
    Element padded[kStep] = {x};
    Floats a, b;
    Format::load2(padded, a, b);
    return a[0];
  }

  static Element narrowed(float x) {
    Element padded[kStep];
    Format::store2(padded, broadcast(x), broadcast(x));
    return padded[0];
  }

  // Calls body(a, b) for each two vectors; the last ones are filled up with `filling`.
  template <class Body>
  static GRPO_INLINE void tail(const Element* x, int64_t n, Element filling, Body body) {
    if (n == 0) return;
    Element padded[kStep];
    for (int64_t i = 0; i < kStep; ++i) padded[i] = i < n ? x[i] : filling;
    Floats a, b;
    Format::load2(padded, a, b);
    body(a, b);
  }

  static float largest_of(const Element* x, int64_t n) {
    Floats m0 = broadcast(-kInfinity), m1 = m0, m2 = m0, m3 = m0, a, b;
    int64_t i = 0;
    for (; i + 2 * kStep <= n; i += 2 * kStep) {
      Format::load2(x + i, a, b);
      m0 = max(a, m0);  // NaN is passed over here and met in the sum
      m1 = max(b, m1);
      Format::load2(x + i + kStep, a, b);
      m2 = max(a, m2);
      m3 = max(b, m3);
    }
    const auto absorb = [&](Floats c, Floats d) {
      m0 = max(c, m0);
      m1 = max(d, m1);
    };
    for (; i + kStep <= n; i += kStep) {
      Format::load2(x + i, a, b);
      absorb(a, b);
    }
    tail(x + i, n - i, narrowed(-kInfinity), absorb);
    return largest(max(max(m0, m1), max(m2, m3)));
  }

  // sum exp(x - shift), for x <= shift. Meanwhile the memory fetches the next block.
  static double exp_sum(const Element* x, int64_t n, float shift) {
    Floats s0 = {}, s1 = {}, s2 = {}, s3 = {}, a, b;
    int64_t i = 0;
    for (; i + 2 * kStep <= n; i += 2 * kStep) {
      const uintptr_t next = reinterpret_cast<uintptr_t>(x + i) + kBlock * sizeof(Element);
      for (size_t line = 0; line < 2 * kStep * sizeof(Element); line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(next + line));
      Format::load2(x + i, a, b);
      s0 += exp(a - shift);
      s1 += exp(b - shift);
      Format::load2(x + i + kStep, a, b);
      s2 += exp(a - shift);
      s3 += exp(b - shift);
    }
    const auto absorb = [&](Floats c, Floats d) {
      s0 += exp(c - shift);
      s1 += exp(d - shift);
    };
    for (; i + kStep <= n; i += kStep) {
      Format::load2(x + i, a, b);
      absorb(a, b);
    }
    tail(x + i, n - i, narrowed(-kInfinity), absorb);
    return total((s0 + s1) + (s2 + s3));
  }

  // out = exp(x - shift) * factor; `out` may be x.
  static void write_exp(const Element* x, Element* out, int64_t n, float shift, float factor) {
    Floats a, b;
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      Format::load2(x + i, a, b);
      Format::store2(out + i, exp(a - shift) * factor, exp(b - shift) * factor);
    }
    tail(x + i, n - i, Element(0), [&](Floats c, Floats d) {
      Element padded[kStep];
      Format::store2(padded, exp(c - shift) * factor, exp(d - shift) * factor);
      for (int64_t j = 0; i + j < n; ++j) out[i + j] = padded[j];
    });
  }
};

// float64: plain loops.
struct Float64 {
  using Element = double;
  using Real = double;

  static double widened(double x) { return x; }
  static double narrowed(double x) { return x; }

  static double largest_of(const double* x, int64_t n) {
    double m = -kInfinity;
    for (int64_t i = 0; i < n; ++i) m = x[i] > m ? x[i] : m;
    return m;
  }

  static double exp_sum(const double* x, int64_t n, double shift) {
    double sum[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; ++i) sum[i % 4] += std::exp(x[i] - shift);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  static void write_exp(const double* x, double* out, int64_t n, double shift, double factor) {
    for (int64_t i = 0; i < n; ++i) out[i] = std::exp(x[i] - shift) * factor;
  }
};

// ---- rows -------------------------------------------------------------------------------------------------------------

int64_t offset_of(const Layout& layout, const Shape& shape, int64_t row) {
  return row / shape.positions * layout.sequence_stride + row % shape.positions * layout.position_stride;
}

template <class T>
T* at(char* data, int64_t offset) {
  return reinterpret_cast<T*>(data) + offset;
}

template <class T>
const T* at(const char* data, int64_t offset) {
  return reinterpret_cast<const T*>(data) + offset;
}

int64_t label_of(const Labels& labels, const Shape& shape, int64_t row) {
  const int64_t offset = offset_of(labels.layout, shape, row);
  return labels.bytes == 4 ? *at<int32_t>(labels.data, offset) : *at<int64_t>(labels.data, offset);
}

// n elements from x on as neighbours: x itself, or copied to the buffer where the vocabulary is strided.
template <class Element>
const Element* gathered(const Element* x, int64_t stride, int64_t n, Element* buffer) {
  if (stride == 1) return x;
  for (int64_t i = 0; i < n; ++i) buffer[i] = x[i * stride];
  return buffer;
}

template <class Element>
void fill(Element* out, int64_t stride, int64_t n, Element value) {
  for (int64_t i = 0; i < n; ++i) out[i * stride] = value;
}

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// (largest x, sum of exp(x - largest)) of a row; the sum is NaN where an element is NaN or +inf.
template <class Ops>
MaxSum<double> max_sum_of(const typename Ops::Element* x, int64_t stride, int64_t vocab_size) {
  typename Ops::Element buffer[kBlock];
  MaxSum<double> row;
  for (int64_t i = 0; i < vocab_size; i += kBlock) {
    const int64_t n = smaller(kBlock, vocab_size - i);
    const auto* block = gathered(x + i * stride, stride, n, buffer);
    typename Ops::Real shift = Ops::largest_of(block, n);
    if (row.max > shift) shift = row.max;
    // Only -inf so far: subtracting it would make NaN of what counts 0.
    const double sum = Ops::exp_sum(block, n, shift == -kInfinity ? 0 : shift);
    row = merge(row, MaxSum<double>{shift, sum});
  }
  return row;
}

template <class Ops>
void forward_rows(const Forward& f, int64_t first, int64_t last) {
  using Element = typename Ops::Element;
  using Real = typename Ops::Real;
  const int64_t vocab_size = f.shape.vocab_size, stride = f.logits.vocab_stride;
  for (int64_t row = first; row < last; ++row) {
    Real& token_logp = *at<Real>(f.token_logps, row);
    Real* lse = at<Real>(f.lse, 2 * row);
    const int64_t label = label_of(f.labels, f.shape, row);
    if (label == f.labels.ignore_index) {
      token_logp = lse[0] = lse[1] = 0;
    } else if (label < 0 || label >= vocab_size) {
      token_logp = lse[0] = lse[1] = std::numeric_limits<Real>::quiet_NaN();
    } else {
      const Element* x = at<Element>(f.logits.data, offset_of(f.logits.layout, f.shape, row));
      const MaxSum<double> parts = max_sum_of<Ops>(x, stride, vocab_size);
      const double log_sum = std::log(parts.sum);
      // In this order: max + log_sum would lose digits at logits of 1e4.
      token_logp = (Ops::widened(x[label * stride]) - parts.max) - log_sum;
      lse[0] = parts.max;
      lse[1] = log_sum;
    }
  }
}

// out = exp(x - shift) * factor over a row.
template <class Ops>
void write_row(const Backward& b, const typename Ops::Element* x, typename Ops::Element* out,
               typename Ops::Real shift, typename Ops::Real factor) {
  typename Ops::Element buffer[kBlock], results[kBlock];
  const int64_t vocab_size = b.shape.vocab_size, stride = b.logits.vocab_stride, out_stride = b.out.vocab_stride;
  for (int64_t i = 0; i < vocab_size; i += kBlock) {
    const int64_t n = smaller(kBlock, vocab_size - i);
    const auto* block = gathered(x + i * stride, stride, n, buffer);
    if (out_stride == 1) {
      Ops::write_exp(block, out + i, n, shift, factor);
    } else {
      Ops::write_exp(block, results, n, shift, factor);
      for (int64_t j = 0; j < n; ++j) out[(i + j) * out_stride] = results[j];
    }
  }
}

template <class Ops>
void backward_row(const Backward& b, const typename Ops::Element* x, typename Ops::Element* out, int64_t label,
                  const typename Ops::Real* lse, typename Ops::Real scale) {
  using Real = typename Ops::Real;
  if (scale != scale) scale = std::numeric_limits<Real>::quiet_NaN();  // for the rounding to bfloat16
  const double max = lse[0], log_sum = lse[1];
  const double label_logp = (Ops::widened(x[label * b.logits.vocab_stride]) - max) - log_sum;
  write_row<Ops>(b, x, out, lse[0], Real(-scale * std::exp(-log_sum)));
  out[label * b.out.vocab_stride] = Ops::narrowed(Real(scale * -std::expm1(label_logp)));  // scale * (1 - softmax)
}

template <class Ops>
void backward_rows(const Backward& b, int64_t first, int64_t last) {
  using Element = typename Ops::Element;
  using Real = typename Ops::Real;
  const int64_t vocab_size = b.shape.vocab_size;
  for (int64_t row = first; row < last; ++row) {
    Element* out = at<Element>(b.out.data, offset_of(b.out.layout, b.shape, row));
    const int64_t label = label_of(b.labels, b.shape, row);
    if (label == b.labels.ignore_index) {
      fill(out, b.out.vocab_stride, vocab_size, Element(0));
    } else if (label < 0 || label >= vocab_size) {
      fill(out, b.out.vocab_stride, vocab_size, Ops::narrowed(std::numeric_limits<Real>::quiet_NaN()));
    } else {
      const Element* x = at<Element>(b.logits.data, offset_of(b.logits.layout, b.shape, row));
      const Real* lse = at<Real>(b.lse, 2 * row);
      const Real scale = *at<Real>(b.dtoken_logps, offset_of(b.dtoken_logps_layout, b.shape, row));
      backward_row<Ops>(b, x, out, label, lse, scale);
    }
  }
}

void exp_of(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = exp(broadcast(x[i]))[0];
}

}  // namespace
}  // namespace grpo::cpu::GRPO_ISA

namespace grpo::cpu {

#define GRPO_QUOTED(x) #x
#define GRPO_NAME(isa) GRPO_QUOTED(isa)
#define GRPO_JOINED(a, b) a##b
#define GRPO_TABLE(isa) GRPO_JOINED(isa, _kernels)

const RowKernels GRPO_TABLE(GRPO_ISA) = {
    GRPO_NAME(GRPO_ISA),
    {GRPO_ISA::forward_rows<GRPO_ISA::Vectorised<GRPO_ISA::Float32>>,
     GRPO_ISA::forward_rows<GRPO_ISA::Vectorised<GRPO_ISA::Bfloat16>>,
     GRPO_ISA::forward_rows<GRPO_ISA::Vectorised<GRPO_ISA::Float16>>, GRPO_ISA::forward_rows<GRPO_ISA::Float64>},
    {GRPO_ISA::backward_rows<GRPO_ISA::Vectorised<GRPO_ISA::Float32>>,
     GRPO_ISA::backward_rows<GRPO_ISA::Vectorised<GRPO_ISA::Bfloat16>>,
     GRPO_ISA::backward_rows<GRPO_ISA::Vectorised<GRPO_ISA::Float16>>, GRPO_ISA::backward_rows<GRPO_ISA::Float64>},
    GRPO_ISA::exp_of,
};

}  // namespace grpo::cpu
