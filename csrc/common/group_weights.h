// One step of alpha, as grpo_kernels/groups/updates.py defines it: group losses by the estimator,
// exponentiated gradient ascent in the log domain, floor, chi. No scratch memory: K groups are passed over a few times.
//
// A team shares the groups out among threads: g = team.first(), then every team.step()-th. What is made of all groups
// goes through team.total() and team.merged(), which give every thread the same number. On the CPU a thread is Alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math.h"
#include "max_sum.h"

namespace grpo {

struct Alone {
  GRPO_HD int64_t first() const { return 0; }
  GRPO_HD int64_t step() const { return 1; }
  template <class T>
  GRPO_HD T total(T x) const {
    return x;
  }
  template <class T>
  GRPO_HD MaxSum<T> merged(MaxSum<T> x) const {
    return x;
  }
};

enum class Estimator { importance, group_mean };

template <class T>
struct GroupRule {
  int64_t num_groups;
  Estimator estimator;
  T step_size;
  T adjustment;                // C: C / sqrt(N_g) is added to the losses that move alpha
  T floor;                     // no alpha falls below floor / K
  T chi;                       // 1: the method; 0: uniform weights
  const int64_t* group_sizes;  // (K,) N_g, or null where neither importance nor the adjustment asks for them
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

template <class T, class Team = Alone>
GRPO_HD GroupStatistics<T> statistics_of(const GroupRule<T>& rule, const T* loss_sums, const int64_t* counts,
                                         const Team& team = {}) {
  int64_t count = 0, size = 0, broken = 0;
  for (int64_t g = team.first(); g < rule.num_groups; g += team.step()) {
    count += counts[g];
    if (rule.group_sizes != nullptr) size += rule.group_sizes[g];
    broken += !std::isfinite(loss_sums[g]);
  }
  count = team.total(count);
  size = team.total(size);
  return {loss_sums, counts, count, T(size), team.total(broken) == 0};
}

// d L_g / d (sum of the group's pair losses)
template <class T>
GRPO_HD T group_factor(const GroupRule<T>& rule, const GroupStatistics<T>& batch, int64_t g) {
  if (rule.estimator == Estimator::group_mean) return T(1) / T(batch.counts[g] > 1 ? batch.counts[g] : 1);
  return batch.total_size / T(rule.group_sizes[g]) / T(batch.total_count > 1 ? batch.total_count : 1);
}

// L_g
template <class T>
GRPO_HD T group_loss(const GroupRule<T>& rule, const GroupStatistics<T>& batch, int64_t g) {
  return group_factor(rule, batch, g) * batch.loss_sums[g];
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
  if (rule.adjustment != T(0)) loss += rule.adjustment / std::sqrt(T(rule.group_sizes[g]));
  return log_alpha[g] + rule.step_size * rule.chi * loss;
}

// alpha_g <- floor/K + (mass of the moving groups - floor/K each) * softmax_g(score) over them; the others keep theirs.
// Moves log_alpha (K,) in place; a thread touches its own groups only. A batch that is empty, or whose sums are not all
// finite, moves nothing.
template <class T, class Team = Alone>
GRPO_HD void move_log_alpha(const GroupRule<T>& rule, const GroupStatistics<T>& batch, T* log_alpha,
                            const Team& team = {}) {
  if (!batch.finite || batch.total_count == 0) return;
  MaxSum<T> scores, mass;
  int64_t moving = 0;
  for (int64_t g = team.first(); g < rule.num_groups; g += team.step()) {
    if (!moves(rule, batch, g)) continue;
    scores = merge(scores, MaxSum<T>{score(rule, batch, log_alpha, g), T(1)});
    mass = merge(mass, MaxSum<T>{log_alpha[g], T(1)});
    ++moving;
  }
  const T log_scores = team.merged(scores).log_sum_exp(), log_mass = team.merged(mass).log_sum_exp();
  const bool have_mass = log_mass >= std::numeric_limits<T>::lowest();  // another rule may have left them none
  const T least = rule.floor / T(rule.num_groups);
  const T above = std::exp(log_mass) - least * T(team.total(moving));
  MaxSum<T> all;
  for (int64_t g = team.first(); g < rule.num_groups; g += team.step()) {
    if (moves(rule, batch, g)) {
      const T log_share = have_mass ? score(rule, batch, log_alpha, g) - log_scores : T(0);
      log_alpha[g] = rule.floor > T(0)
                         ? log_add_exp(std::log(least), std::log(above > T(0) ? above : T(0)) + log_share)
                         : log_mass + log_share;
    }
    all = merge(all, MaxSum<T>{log_alpha[g], T(1)});
  }
  const T drift = team.merged(all).log_sum_exp();  // rounding must not leave the simplex over a million steps
  for (int64_t g = team.first(); g < rule.num_groups; g += team.step()) log_alpha[g] -= drift;
}

}  // namespace grpo
