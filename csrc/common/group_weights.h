// One step of alpha, as GroupWeights.update in grpo_kernels/group_weights.py defines it: group losses by the estimator,
// exponentiated gradient ascent in the log domain, floor, chi. No scratch memory: K groups are passed over a few times.
#pragma once

#include <cmath>
#include <cstdint>

#include "math.h"
#include "max_sum.h"

namespace grpo {

enum class Estimator { importance, group_mean };

template <class T>
struct GroupRule {
  int64_t num_groups;
  Estimator estimator;
  T step_size;
  T adjustment;            // C: C / sqrt(N_g) is added to the losses that move alpha
  T floor;                 // no alpha falls below floor / K
  T chi;                   // 1: the method; 0: uniform weights
  const T* group_sizes;    // (K,) N_g, or null where neither importance nor the adjustment asks for them
};

// A batch: (K,) sums of pair losses, (K,) counts of pairs, and the totals over groups.
template <class T>
struct GroupStatistics {
  const T* loss_sums;
  const int64_t* counts;
  int64_t total_count;
  T total_size;
  bool finite;
};

template <class T>
GRPO_HD GroupStatistics<T> statistics_of(const GroupRule<T>& rule, const T* loss_sums, const int64_t* counts) {
  GroupStatistics<T> batch{loss_sums, counts, 0, T(0), true};
  for (int64_t g = 0; g < rule.num_groups; ++g) {
    batch.total_count += counts[g];
    if (rule.group_sizes != nullptr) batch.total_size += rule.group_sizes[g];
    batch.finite = batch.finite && std::isfinite(loss_sums[g]);
  }
  return batch;
}

// L_g
template <class T>
GRPO_HD T group_loss(const GroupRule<T>& rule, const GroupStatistics<T>& batch, int64_t g) {
  const T sum = batch.loss_sums[g];
  if (rule.estimator == Estimator::group_mean) return sum / T(batch.counts[g] > 1 ? batch.counts[g] : 1);
  const T total = T(batch.total_count > 1 ? batch.total_count : 1);
  return batch.total_size / rule.group_sizes[g] * sum / total;
}

// d loss / d L_g
template <class T>
GRPO_HD T loss_weight(const GroupRule<T>& rule, T log_alpha) {
  return (1 - rule.chi) / T(rule.num_groups) + rule.chi * std::exp(log_alpha);
}

// Whether group g takes part in the step. With importance an absent group's loss of 0 is unbiased as it stands.
template <class T>
GRPO_HD bool moves(const GroupRule<T>& rule, const GroupStatistics<T>& batch, int64_t g) {
  return rule.estimator == Estimator::importance || batch.counts[g] > 0;
}

template <class T>
GRPO_HD T score(const GroupRule<T>& rule, const GroupStatistics<T>& batch, const T* log_alpha, int64_t g) {
  T loss = group_loss(rule, batch, g);
  if (rule.adjustment != T(0)) loss += rule.adjustment / std::sqrt(rule.group_sizes[g]);
  return log_alpha[g] + rule.step_size * rule.chi * loss;
}

// alpha_g <- floor/K + (mass of the moving groups - floor/K each) * softmax_g(score) over them; the others keep theirs.
// Moves log_alpha (K,) in place. A batch that is empty, or whose sums are not all finite, moves nothing.
template <class T>
GRPO_HD void move_log_alpha(const GroupRule<T>& rule, const GroupStatistics<T>& batch, T* log_alpha) {
  if (!batch.finite || batch.total_count == 0) return;
  MaxSum<T> scores, mass;
  int64_t moving = 0;
  for (int64_t g = 0; g < rule.num_groups; ++g) {
    if (!moves(rule, batch, g)) continue;
    scores = merge(scores, MaxSum<T>{score(rule, batch, log_alpha, g), T(1)});
    mass = merge(mass, MaxSum<T>{log_alpha[g], T(1)});
    ++moving;
  }
  const T log_scores = scores.log_sum_exp(), log_mass = mass.log_sum_exp();
  const T least = rule.floor / T(rule.num_groups);
  const T above = std::exp(log_mass) - least * T(moving);
  MaxSum<T> all;
  for (int64_t g = 0; g < rule.num_groups; ++g) {
    if (moves(rule, batch, g)) {
      const T log_share = score(rule, batch, log_alpha, g) - log_scores;
      log_alpha[g] = rule.floor > T(0)
                         ? log_add_exp(std::log(least), std::log(above > T(0) ? above : T(0)) + log_share)
                         : log_mass + log_share;
    }
    all = merge(all, MaxSum<T>{log_alpha[g], T(1)});
  }
  const T drift = all.log_sum_exp();  // rounding must not leave the simplex over a million steps
  for (int64_t g = 0; g < rule.num_groups; ++g) log_alpha[g] -= drift;
}

}  // namespace grpo
