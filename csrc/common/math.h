// Logistic functions that neither overflow nor lose digits; NaN gives NaN. T is float or double.
#pragma once

#include <cmath>

#include "macros.h"

namespace grpo {

// log(1 + exp(x))
template <class T>
GRPO_HD T softplus(T x) {
  return (x > T(0) ? x : T(0)) + std::log1p(std::exp(-std::fabs(x)));
}

template <class T>
GRPO_HD T log_sigmoid(T x) {
  return -softplus(-x);
}

template <class T>
GRPO_HD T sigmoid(T x) {
  const T small = std::exp(-std::fabs(x));
  return (x >= T(0) ? T(1) : small) / (T(1) + small);
}

// log(exp(a) + exp(b)); either may be -inf.
template <class T>
GRPO_HD T log_add_exp(T a, T b) {
  return a == b ? a + std::log(T(2)) : (a > b ? a : b) + std::log1p(std::exp(-std::fabs(a - b)));
}

}  // namespace grpo
