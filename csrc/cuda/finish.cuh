// What one block does when all sequence log-probabilities are there: pairs, group sums, alpha, loss, coefficients.
//
//     h_i = (logp_w - ref_w) - (logp_l - ref_l) - margin_i        l_i = weight_i l(h_i)
//     S_g = sum of l_i over the group's pairs                     L_g = factor_g S_g,  loss = sum_g w_g L_g
//     d loss / d logp_s = +- w_g factor_g weight_i l'(h_i)
//
// In float64, sums in a fixed order, without atomics. The formulas are those of csrc/common.
#pragma once

#include "block.cuh"
#include "launches.h"

namespace grpo::cuda {

// Rows of the tables, as in kernels/group_robust.py.
enum { kLogps, kRewards, kCoefficients, kTokenScales };
enum { kPairLosses, kSlopes, kPairFactors };
enum { kSums, kGroupLosses, kAlpha, kFactors, kGroupCoefficients };

// Ids to index with: those outside [0, K) are 0, and their pairs' losses NaN.
__device__ __forceinline__ bool is_group(const Loss& loss, int64_t group) {
  return group >= 0 && group < loss.rule.num_groups;
}

__device__ __forceinline__ int64_t safe_group(const Loss& loss, int64_t i) {
  const int64_t group = loss.group_ids[i];
  return is_group(loss, group) ? group : 0;
}

// d logp_s / d token_logp
__device__ __forceinline__ double token_scale(const Loss& loss, int64_t sequence) {
  const double count = loss.logps[loss.num_sequences + sequence];
  return loss.average && count > 1 ? 1 / count : 1;
}

template <class Real>
__device__ __forceinline__ void do_pair(const Loss& loss, int64_t i) {
  const int64_t S = loss.num_sequences, B = S / 2;
  Real* sequences = static_cast<Real*>(loss.sequences);
  Real* pairs = static_cast<Real*>(loss.pairs);
  const double beta = loss.betas ? loss.betas[i] : loss.beta;
  double ratios[2];
  for (int side = 0; side < 2; ++side) {
    const int64_t s = side * B + i;
    const double scale = token_scale(loss, s), logp = loss.logps[s] * scale;
    ratios[side] = loss.ref_logps ? logp - loss.ref_logps[s] : logp;
    sequences[kTokenScales * S + s] = scale;
    sequences[kLogps * S + s] = logp;
    sequences[kRewards * S + s] = beta * ratios[side];
  }
  const double h = ratios[0] - ratios[1] - (loss.margin ? loss.margin[i] : 0);
  const ValueAndSlope<double> of_pair = pair_loss(loss.type, h, beta, loss.label_smoothing);
  const double weight = loss.weights ? loss.weights[i] : 1;
  const bool known = is_group(loss, loss.group_ids[i]);
  pairs[kPairLosses * B + i] = known ? weight * of_pair.value : std::numeric_limits<double>::quiet_NaN();
  pairs[kSlopes * B + i] = known ? weight * of_pair.slope : 0;
}

// The first of the pairs `first` .. `end` - 1 of a group adds those up, in the order of pairs.
template <class Real>
__device__ __forceinline__ void sum_group_of(const Loss& loss, int64_t i, int64_t first, int64_t end) {
  const int64_t B = loss.num_sequences / 2, group = safe_group(loss, i);
  const Real* losses = static_cast<const Real*>(loss.pairs) + kPairLosses * B;
  double sum = 0;
  int64_t count = 0;
  for (int64_t j = first; j < end; ++j) {
    if (safe_group(loss, j) != group) continue;
    if (j < i) return;
    sum += losses[j];
    ++count;
  }
  loss.groups[kSums * loss.rule.num_groups + group] += sum;
  loss.counts[group] += count;
}

template <class Real>
__device__ __forceinline__ void pairs_and_group_sums(const Loss& loss, const Block& block) {
  const int64_t B = loss.num_sequences / 2;
  if (loss.clear) {
    for (int64_t g = block.first(); g < loss.rule.num_groups; g += block.step()) {
      loss.groups[kSums * loss.rule.num_groups + g] = 0;
      loss.counts[g] = 0;
    }
  }
  for (int64_t i = block.first(); i < B; i += block.step()) do_pair<Real>(loss, i);
  __syncthreads();  // pair losses are read by other threads; the zeros must not come after the sums
  for (int64_t first = 0; first < B; first += block.step()) {
    const int64_t i = first + block.first(), end = first + block.step() < B ? first + block.step() : B;
    if (i < end) sum_group_of<Real>(loss, i, first, end);
    __syncthreads();  // sums are read, and added to, by other threads
  }
}

// From the sums and counts (of all ranks): move alpha, fill the rest of the tables.
template <class Real>
__device__ __forceinline__ void alpha_loss_and_coefficients(const Loss& loss, const Block& block) {
  const int64_t S = loss.num_sequences, B = S / 2, K = loss.rule.num_groups;
  double* sums = loss.groups + kSums * K;
  const GroupStatistics<double> batch = statistics_of(loss.rule, sums, loss.counts, block);
  if (loss.update == Update::inline_) {
    move_log_alpha(loss.rule, batch, loss.log_alpha, block);
    if (threadIdx.x == 0) *loss.skipped_updates += !batch.finite;
  }
  double total = 0;
  for (int64_t g = block.first(); g < K; g += block.step()) {  // each thread moved the same groups
    const double factor = group_factor(loss.rule, batch, g), of_group = group_loss(loss.rule, batch, g);
    const double weight = loss_weight(loss.rule, loss.log_alpha[g]);
    total += weight * of_group;
    loss.groups[kGroupLosses * K + g] = of_group;
    loss.groups[kAlpha * K + g] = std::exp(loss.log_alpha[g]);
    loss.groups[kFactors * K + g] = factor * loss.gradient_scale;
    loss.groups[kGroupCoefficients * K + g] = weight * factor * loss.gradient_scale;
    if (loss.update == Update::lagged) {
      loss.pending_sums[g] += sums[g];
      loss.pending_counts[g] += loss.counts[g];
    }
  }
  total = block.total(total);
  if (threadIdx.x == 0) *static_cast<Real*>(loss.loss) = total;
  __syncthreads();  // coefficients of groups are read by other threads
  Real* sequences = static_cast<Real*>(loss.sequences);
  Real* pairs = static_cast<Real*>(loss.pairs);
  for (int64_t i = block.first(); i < B; i += block.step()) {
    const int64_t group = safe_group(loss, i);
    const double dh = double(pairs[kSlopes * B + i]) * loss.groups[kGroupCoefficients * K + group];
    pairs[kPairFactors * B + i] = loss.groups[kFactors * K + group];
    sequences[kCoefficients * S + i] = dh * token_scale(loss, i);
    sequences[kCoefficients * S + B + i] = -dh * token_scale(loss, B + i);
  }
}

template <class Real>
__device__ __forceinline__ void finish(const Loss& loss) {
  const Block block;
  if (loss.do_pairs) pairs_and_group_sums<Real>(loss, block);
  if (loss.do_alpha) alpha_loss_and_coefficients<Real>(loss, block);
}

}  // namespace grpo::cuda
