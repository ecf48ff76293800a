// log-sum-exp in one pass: sum = sum_i exp(x_i - max), kept relative to the largest x so far.
#pragma once

#include <cmath>
#include <limits>

#include "macros.h"

namespace grpo {

template <class T>
struct MaxSum {
  T max = -std::numeric_limits<T>::infinity();
  T sum = T(0);

  GRPO_HD T log_sum_exp() const { return max + std::log(sum); }
};

// `part.sum` in units of exp(max). Equal maxima keep it: inf - inf would make NaN of it.
template <class T>
GRPO_HD T rescaled(MaxSum<T> part, T max) {
  return part.max == max ? part.sum : part.sum * std::exp(part.max - max);
}

// Of two parts; either may hold nothing, or only -inf. NaN in either stays.
template <class T>
GRPO_HD MaxSum<T> merge(MaxSum<T> a, MaxSum<T> b) {
  const T max = a.max > b.max ? a.max : b.max;
  return {max, rescaled(a, max) + rescaled(b, max)};
}

}  // namespace grpo
