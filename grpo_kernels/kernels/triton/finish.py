"""What one program does when all sequence log-probabilities are there: pairs, group sums, alpha, loss, coefficients.

    h_i = (logp_w - ref_w) - (logp_l - ref_l) - margin_i        l_i = weight_i l(h_i)
    S_g = sum of l_i over the group's pairs                     L_g = S_g N / (N_g B),  or S_g / count_g
    log alpha_g <- log alpha_g + eta L_g - log(sum)             loss = sum_g w_g L_g,   w = (1 - chi) / K + chi alpha
    d loss / d logp_s = +- w_g (L_g / S_g) weight_i l'(h_i)

In float64, in a fixed order, without atomics; GroupWeights has the same update in PyTorch. A launch passes numbers as
float32, so an option comes in two parts: `split_number`.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl

from grpo_kernels.kernels import group_robust as tables

LOWEST = tl.constexpr(-1.0e300)

# Rows of the tables that a kernel fills.
LOGPS, REWARDS, COEFFICIENTS, TOKEN_SCALES = (
    tl.constexpr(row) for row in (tables.LOGPS, tables.REWARDS, tables.COEFFICIENTS, tables.TOKEN_SCALES)
)
PAIR_LOSSES, SLOPES, PAIR_FACTORS = (
    tl.constexpr(row) for row in (tables.PAIR_LOSSES, tables.SLOPES, tables.PAIR_FACTORS)
)
SUMS, GROUP_LOSSES, ALPHA, FACTORS, GROUP_COEFFICIENTS = (
    tl.constexpr(row)
    for row in (tables.SUMS, tables.GROUP_LOSSES, tables.ALPHA, tables.FACTORS, tables.GROUP_COEFFICIENTS)
)


def split_number(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is ``value`` to 48 bits."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@triton.jit
def _nothing(never_negative):
    """0, which the compiler cannot know. Sizes to which it is added make addresses anew; else the compiler keeps those
    of the first loop until the last, in more registers than there are.
    """
    return tl.minimum(never_negative, 0.0).to(tl.int32)


@triton.jit
def _join(high, low):
    return tl.zeros((), tl.float64) + high + low


@triton.jit
def _log1p(x):
    """For x >= 0. log(1 + x) alone would lose the digits of a small x (Kahan's correction)."""
    one_more = 1.0 + x
    exact = one_more == 1.0
    return tl.where(exact, x, tl.log(one_more) * (x / tl.where(exact, 1.0, one_more - 1.0)))


@triton.jit
def pair_loss(h, beta, e, LOSS: tl.constexpr):
    """(l(h), dl/dh): the entry of PAIR_LOSSES named LOSS. A NaN margin gives NaN for both."""
    if LOSS == "sigmoid" or LOSS == "robust":
        x = beta * h
        small = tl.exp(-tl.abs(x))
        # -log sigmoid(x) = below + log1p(small), -log sigmoid(-x) = above + log1p(small)
        below, above = tl.where(x > 0, 0.0, -x), tl.where(x < 0, 0.0, x)
        # sigmoid(-x) and sigmoid(x), times 1 + small
        minus, plus = tl.where(x > 0, small, 1.0), tl.where(x < 0, small, 1.0)
        if LOSS == "sigmoid":
            value = _log1p(small) + (1 - e) * below + e * above
            slope = beta * (e * plus - (1 - e) * minus) / (1.0 + small)
        else:
            value = _log1p(small) + ((1 - e) * below - e * above) / (1 - 2 * e)
            slope = -beta * ((1 - e) * minus + e * plus) / (1.0 + small) / (1 - 2 * e)
    elif LOSS == "ipo":
        gap = h - 0.5 / beta
        value = gap * gap
        slope = 2 * gap
    else:
        tl.static_assert(LOSS == "hinge", "unknown loss_type")
        gap = 1 - beta * h
        value = tl.where(gap <= 0, 0.0, gap)
        slope = tl.where(gap <= 0, 0.0, -beta)
        slope = tl.where(gap != gap, gap, slope)
    return value, slope


@triton.jit
def pairs_and_group_sums(
    logps_ptr,  # (2, S) float64: sums of token_logps, which pairs' margins h replace, then counts of tokens
    sequence_ptr,
    pair_ptr,
    group_ptr,
    counts_ptr,
    ref_ptr,
    group_ids_ptr,
    beta_ptr,
    margin_ptr,
    weights_ptr,
    beta_high,
    beta_low,
    e_high,
    e_low,
    S,
    K,
    LOSS: tl.constexpr,
    AVERAGE: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Fill LOGPS, REWARDS, PAIR_LOSSES and SLOPES; add to SUMS and the counts, which are zeros unless CLEAR."""
    B = S // 2
    e = _join(e_high, e_low)
    if CLEAR:
        for first in range(0, K, BLOCK_K):
            groups = first + tl.arange(0, BLOCK_K)
            tl.store(group_ptr + SUMS * K + groups, tl.zeros((BLOCK_K,), tl.float64), groups < K)
            tl.store(counts_ptr + groups, tl.zeros((BLOCK_K,), tl.int64), groups < K)
    for first in range(0, B, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        inside = i < B
        chosen = tl.load(logps_ptr + i, inside, other=0.0, cache_modifier=".cg")
        rejected = tl.load(logps_ptr + B + i, inside, other=0.0, cache_modifier=".cg")
        chosen_scale = _token_scale(logps_ptr + S + i, inside, AVERAGE)
        rejected_scale = _token_scale(logps_ptr + S + B + i, inside, AVERAGE)
        tl.store(sequence_ptr + TOKEN_SCALES * S + i, chosen_scale, inside)
        tl.store(sequence_ptr + TOKEN_SCALES * S + B + i, rejected_scale, inside)
        chosen *= chosen_scale
        rejected *= rejected_scale
        tl.store(sequence_ptr + LOGPS * S + i, chosen, inside)
        tl.store(sequence_ptr + LOGPS * S + B + i, rejected, inside)
        if HAS_REF:
            chosen -= tl.load(ref_ptr + i, inside, other=0.0).to(tl.float64)
            rejected -= tl.load(ref_ptr + B + i, inside, other=0.0).to(tl.float64)
        beta = _beta(beta_ptr, beta_high, beta_low, i, inside, HAS_BETA)
        tl.store(sequence_ptr + REWARDS * S + i, beta * chosen, inside)
        tl.store(sequence_ptr + REWARDS * S + B + i, beta * rejected, inside)
        h = chosen - rejected
        if HAS_MARGIN:
            h -= tl.load(margin_ptr + i, inside, other=0.0).to(tl.float64)
        tl.store(logps_ptr + i, h, inside)
    for first in range(0, B, BLOCK_B):  # a loop of its own: addresses and loss together would spill registers
        i = first + tl.arange(0, BLOCK_B)
        inside = i < B
        h = tl.load(logps_ptr + i, inside, other=0.0)
        beta = _beta(beta_ptr, beta_high, beta_low, i, inside, HAS_BETA)
        value, slope = pair_loss(h, beta, e, LOSS)
        if HAS_WEIGHTS:
            weight = tl.load(weights_ptr + i, inside, other=0.0).to(tl.float64)
            value *= weight
            slope *= weight
        group = tl.load(group_ids_ptr + i, inside, other=0)
        known = (group >= 0) & (group < K)
        tl.store(pair_ptr + PAIR_LOSSES * B + i, tl.where(known, value, float("nan")), inside)
        tl.store(pair_ptr + SLOPES * B + i, tl.where(known, slope, 0.0), inside)
    tl.debug_barrier()  # pair losses are read by other threads; zeros of SUMS must not come after the sums
    for first in range(0, B, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        inside = i < B
        group = _safe_group(group_ids_ptr, i, inside, K)
        total = tl.zeros((BLOCK_B,), tl.float64)
        count = tl.zeros((BLOCK_B,), tl.int64)
        for j in range(first, tl.minimum(first + BLOCK_B, B)):
            same = group == _safe_group(group_ids_ptr, j, j < B, K)
            total += tl.where(same, tl.load(pair_ptr + PAIR_LOSSES * B + j).to(tl.float64), 0.0)
            count += same.to(tl.int64)
        # Every pair of a group adds the same numbers to the same sum, and stores the same.
        total += tl.load(group_ptr + SUMS * K + group, inside, other=0.0)
        count += tl.load(counts_ptr + group, inside, other=0)
        tl.debug_barrier()  # all have read
        tl.store(group_ptr + SUMS * K + group, total, inside)
        tl.store(counts_ptr + group, count, inside)
        tl.debug_barrier()  # sums are read by the next block's threads


@triton.jit
def _beta(beta_ptr, beta_high, beta_low, i, inside, HAS_BETA: tl.constexpr):
    """That of the pairs i, one for all without HAS_BETA."""
    if HAS_BETA:
        beta = tl.load(beta_ptr + i, inside, other=1.0).to(tl.float64)
    else:
        beta = tl.zeros(inside.shape, tl.float64) + _join(beta_high, beta_low)
    return beta


@triton.jit
def _token_scale(counts_ptr, inside, AVERAGE: tl.constexpr):
    """d logp / d token_logp of sequences whose counts of tokens are at ``counts_ptr``."""
    if AVERAGE:
        scale = 1.0 / tl.maximum(tl.load(counts_ptr, inside, other=1.0, cache_modifier=".cg"), 1.0)
    else:
        scale = tl.full(inside.shape, 1.0, tl.float64)
    return scale


@triton.jit
def _safe_group(group_ids_ptr, i, inside, K):
    """Ids to index with: those outside [0, K) are 0, and their pairs' losses NaN."""
    group = tl.load(group_ids_ptr + i, inside, other=0)
    return tl.where((group >= 0) & (group < K), group, 0).to(tl.int32)


@triton.jit
def _group_block(
    group_ptr, counts_ptr, sizes_ptr, first, K, pairs, total_size, IMPORTANCE: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A block of groups: (groups, inside, present, L_g / S_g, L_g)."""
    groups = first + tl.arange(0, BLOCK_K)
    inside = groups < K
    sums = tl.load(group_ptr + SUMS * K + groups, inside, other=0.0)
    counts = tl.load(counts_ptr + groups, inside, other=0)
    if IMPORTANCE:  # an absent group's loss of 0 is unbiased as it stands
        sizes = tl.load(sizes_ptr + groups, inside, other=1).to(tl.float64)
        factor = total_size / sizes / tl.maximum(pairs, 1.0)
        present = inside
    else:
        factor = 1.0 / tl.maximum(counts.to(tl.float64), 1.0)
        present = inside & (counts > 0)
    return groups, inside, present, factor, sums * factor


@triton.jit
def _score(log_alpha, losses, sizes_ptr, groups, inside, present, step, ADJUSTMENT: tl.constexpr):
    """log alpha + eta * (L_g + C / sqrt(N_g)); very low where the group takes no part."""
    if ADJUSTMENT != 0.0:
        sizes = tl.load(sizes_ptr + groups, inside, other=1).to(tl.float64)
        losses += ADJUSTMENT / tl.sqrt(sizes)
    return tl.where(present, log_alpha + step * losses, LOWEST)


@triton.jit
def _add_block(maximum, total, x):
    """The online log-sum-exp over blocks: scalars (maximum, sum)."""
    larger = tl.maximum(maximum, tl.max(x, 0))
    return larger, total * tl.exp(maximum - larger) + tl.sum(tl.exp(x - larger), 0)


@triton.jit
def alpha_loss_and_coefficients(
    logps_ptr,
    sequence_ptr,
    pair_ptr,
    group_ptr,
    counts_ptr,
    loss_ptr,
    group_ids_ptr,
    log_alpha_ptr,
    sizes_ptr,
    pending_sums_ptr,
    pending_counts_ptr,
    skipped_ptr,
    gradient_scale,
    step_high,
    step_low,
    S,
    K,
    AVERAGE: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ADJUSTMENT: tl.constexpr,
    FLOOR: tl.constexpr,
    CHI: tl.constexpr,
    UPDATE: tl.constexpr,  # "inline", "lagged" or "none"
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """From SUMS and the counts (of all ranks): move alpha, fill the rest of the tables, and store the loss."""
    step = _join(step_high, step_low) * CHI
    pairs = tl.full((), 0.0, tl.float64)
    total_size = tl.full((), 0.0, tl.float64)
    broken = tl.full((), 0, tl.int32)
    for first in range(0, K, BLOCK_K):
        groups = first + tl.arange(0, BLOCK_K)
        inside = groups < K
        sums = tl.load(group_ptr + SUMS * K + groups, inside, other=0.0)
        pairs += tl.sum(tl.load(counts_ptr + groups, inside, other=0), 0).to(tl.float64)
        broken += tl.sum((sums - sums != 0.0).to(tl.int32), 0)
        if IMPORTANCE:
            total_size += tl.sum(tl.load(sizes_ptr + groups, inside, other=0), 0).to(tl.float64)

    nothing = _nothing(pairs)
    S += nothing
    K += nothing
    if UPDATE == "inline":
        # An atomic is one thread's. A load is every thread's, and would race the store of the first.
        tl.atomic_add(skipped_ptr, (broken > 0).to(tl.int64), sem="relaxed")
        if (broken == 0) & (pairs > 0):
            _move_alpha(
                group_ptr, counts_ptr, log_alpha_ptr, sizes_ptr, K, pairs, total_size, step,
                IMPORTANCE, ADJUSTMENT, FLOOR, BLOCK_K,
            )  # fmt: skip

    S += nothing
    K += nothing
    B = S // 2
    loss = tl.full((), 0.0, tl.float64)
    for first in range(0, K, BLOCK_K):
        groups, inside, _, factor, losses = _group_block(
            group_ptr, counts_ptr, sizes_ptr, first, K, pairs, total_size, IMPORTANCE, BLOCK_K
        )
        alpha = tl.exp(tl.load(log_alpha_ptr + groups, inside, other=LOWEST))
        weight = tl.where(inside, (1.0 - CHI) / K.to(tl.float64) + CHI * alpha, 0.0)
        loss += tl.sum(tl.where(inside, weight * losses, 0.0), 0)
        tl.store(group_ptr + GROUP_LOSSES * K + groups, losses, inside)
        tl.store(group_ptr + ALPHA * K + groups, alpha, inside)
        factor *= gradient_scale  # from here on for gradients only
        tl.store(group_ptr + FACTORS * K + groups, factor, inside)
        tl.store(group_ptr + GROUP_COEFFICIENTS * K + groups, weight * factor, inside)
        if UPDATE == "lagged":
            sums = tl.load(group_ptr + SUMS * K + groups, inside, other=0.0)
            counts = tl.load(counts_ptr + groups, inside, other=0)
            tl.store(pending_sums_ptr + groups, tl.load(pending_sums_ptr + groups, inside) + sums, inside)
            tl.store(pending_counts_ptr + groups, tl.load(pending_counts_ptr + groups, inside) + counts, inside)
    tl.store(loss_ptr, loss)
    tl.debug_barrier()  # coefficients of groups are read by other threads

    for first in range(0, B, BLOCK_B):
        i = first + tl.arange(0, BLOCK_B)
        inside = i < B
        group = _safe_group(group_ids_ptr, i, inside, K)
        slope = tl.load(pair_ptr + SLOPES * B + i, inside, other=0.0).to(tl.float64)
        tl.store(pair_ptr + PAIR_FACTORS * B + i, tl.load(group_ptr + FACTORS * K + group, inside), inside)
        dh = slope * tl.load(group_ptr + GROUP_COEFFICIENTS * K + group, inside, other=0.0)
        chosen_scale = _token_scale(logps_ptr + S + i, inside, AVERAGE)
        rejected_scale = _token_scale(logps_ptr + S + B + i, inside, AVERAGE)
        tl.store(sequence_ptr + COEFFICIENTS * S + i, dh * chosen_scale, inside)
        tl.store(sequence_ptr + COEFFICIENTS * S + B + i, -dh * rejected_scale, inside)


@triton.jit
def _move_alpha(
    group_ptr,
    counts_ptr,
    log_alpha_ptr,
    sizes_ptr,
    K,
    pairs,
    total_size,
    step,
    IMPORTANCE: tl.constexpr,
    ADJUSTMENT: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """moved_log_alpha of groups/rules.py: the present groups share their mass anew, the absent ones keep theirs."""
    score_max = tl.full((), LOWEST, tl.float64)
    score_sum = tl.full((), 0.0, tl.float64)
    mass_max = tl.full((), LOWEST, tl.float64)
    mass_sum = tl.full((), 0.0, tl.float64)
    num_present = tl.full((), 0.0, tl.float64)
    for first in range(0, K, BLOCK_K):
        groups, inside, present, _, losses = _group_block(
            group_ptr, counts_ptr, sizes_ptr, first, K, pairs, total_size, IMPORTANCE, BLOCK_K
        )
        log_alpha = tl.load(log_alpha_ptr + groups, inside, other=LOWEST)
        score = _score(log_alpha, losses, sizes_ptr, groups, inside, present, step, ADJUSTMENT)
        score_max, score_sum = _add_block(score_max, score_sum, score)
        mass_max, mass_sum = _add_block(mass_max, mass_sum, tl.where(present, log_alpha, LOWEST))
        num_present += tl.sum(present.to(tl.float64), 0)
    log_score = score_max + tl.log(score_sum)
    log_mass = mass_max + tl.log(mass_sum)
    if FLOOR != 0.0:
        least = FLOOR / K.to(tl.float64)
        above = tl.exp(log_mass) - least * num_present
        log_mass = tl.log(tl.where(above < 0.0, 0.0, above))  # of what is shared above the floor

    moved_max = tl.full((), LOWEST, tl.float64)
    moved_sum = tl.full((), 0.0, tl.float64)
    for first in range(0, K, BLOCK_K):
        groups, inside, present, _, losses = _group_block(
            group_ptr, counts_ptr, sizes_ptr, first, K, pairs, total_size, IMPORTANCE, BLOCK_K
        )
        log_alpha = tl.load(log_alpha_ptr + groups, inside, other=LOWEST)
        moved = log_mass + _score(log_alpha, losses, sizes_ptr, groups, inside, present, step, ADJUSTMENT) - log_score
        if FLOOR != 0.0:
            moved = tl.log(tl.exp(moved) + FLOOR / K.to(tl.float64))
        moved = tl.where(present, moved, log_alpha)
        moved_max, moved_sum = _add_block(moved_max, moved_sum, moved)
        # To where alpha will be: log_alpha is still read by the next block's scores only, each by its own threads.
        tl.store(log_alpha_ptr + groups, moved, inside)
    tl.debug_barrier()  # read again by whichever threads
    log_total = moved_max + tl.log(moved_sum)
    for first in range(0, K, BLOCK_K):
        groups = first + tl.arange(0, BLOCK_K)
        inside = groups < K
        log_alpha = tl.load(log_alpha_ptr + groups, inside, other=LOWEST)
        tl.store(log_alpha_ptr + groups, log_alpha - log_total, inside)
    tl.debug_barrier()
