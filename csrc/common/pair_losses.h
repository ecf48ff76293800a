// The loss of a pair and its derivative in the margin h, as in grpo_kernels/pair_losses.py. h does not contain beta; e is
// the label smoothing (sigmoid) or the flip rate (robust). A NaN margin gives NaN for both.
#pragma once

#include "math.h"

namespace grpo {

enum class PairLoss { sigmoid, ipo, hinge, robust };

template <class T>
struct ValueAndSlope {
  T value;
  T slope;
};

template <class T>
GRPO_HD ValueAndSlope<T> sigmoid_loss(T h, T beta, T e) {
  const T x = beta * h;
  return {-(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x), beta * (e * sigmoid(x) - (1 - e) * sigmoid(-x))};
}

template <class T>
GRPO_HD ValueAndSlope<T> ipo_loss(T h, T beta) {
  const T gap = h - T(0.5) / beta;
  return {gap * gap, 2 * gap};
}

template <class T>
GRPO_HD ValueAndSlope<T> hinge_loss(T h, T beta) {
  const T gap = 1 - beta * h;
  if (gap <= T(0)) return {T(0), T(0)};
  return {gap, gap > T(0) ? -beta : gap};  // what is left is NaN
}

template <class T>
GRPO_HD ValueAndSlope<T> robust_loss(T h, T beta, T e) {
  const T x = beta * h;
  const T value = -(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x);
  const T slope = -beta * ((1 - e) * sigmoid(-x) + e * sigmoid(x));
  return {value / (1 - 2 * e), slope / (1 - 2 * e)};
}

template <class T>
GRPO_HD ValueAndSlope<T> pair_loss(PairLoss type, T h, T beta, T e) {
  switch (type) {
    case PairLoss::sigmoid:
      return sigmoid_loss(h, beta, e);
    case PairLoss::ipo:
      return ipo_loss(h, beta);
    case PairLoss::hinge:
      return hinge_loss(h, beta);
    case PairLoss::robust:
      return robust_loss(h, beta, e);
  }
  return {T(NAN), T(NAN)};  // no such loss
}

}  // namespace grpo
