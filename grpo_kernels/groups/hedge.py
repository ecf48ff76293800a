"""AdaHedge: the step size of exponentiated gradient ascent chosen by what it has cost so far.

    eta = log K / D;  w = softmax(eta G);  the batch's losses L arrive
    d = (1/eta) log sum_g w_g exp(eta L_g) - <w, L>  >= 0;  D <- D + d;  G <- G + L

D, the sum of the mixability gaps d, is what finite step sizes have lost against the soft maximum; G is what each group
has lost so far. While D is 0 eta is infinite, and w is uniform on the groups of the largest G: at the start on all. No
scale, no horizon: losses in other units, or shifted alike for all groups, give the same w. If each batch's losses are
within S of each other, the sum of <w, L> over T batches is at most S sqrt(T log K) + S (4/3 log K + 2) below that of
the worst group. De Rooij, van Erven, Gruenwald and Koolen 2014 (arXiv:1301.0534), for losses of experts; here the
weight goes to the group that does *worst*, so that a group's loss is a gain of its weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_size(gap_sum: Tensor, num_groups: int) -> Tensor:
    """eta, infinite where D is 0 (of a single group, too)."""
    return torch.where(gap_sum > 0, math.log(num_groups) / gap_sum, math.inf)


def log_weights(gains: Tensor, gap_sum: Tensor) -> Tensor:
    """(..., K) log w from G (..., K) and D (...)."""
    return _scores(gains, gap_sum, torch.ones_like(gains, dtype=torch.bool)).log_softmax(-1)


def after_batch(gains: Tensor, gap_sum: Tensor, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """(G, D) after a batch: float64, G with a largest entry of 0.

    An absent group gains what the present ones do together, by their soft maximum: with the same eta its weight would
    stay as it is.

    Args:
        gains: (..., K). gap_sum: (...,).
        losses: (..., K); those of absent groups are not looked at.
        present: (..., K) bool, at least one.
    """
    losses = torch.where(present, losses, 0)
    before = _scores(gains, gap_sum, present)
    mass = log_weights(gains, gap_sum).masked_fill(~present, -math.inf).logsumexp(-1).exp()
    mean = (before.softmax(-1) * losses).sum(-1)
    mixed = _soft_maximum(gains + losses, gap_sum, present) - _soft_maximum(gains, gap_sum, present)
    gap_sum = gap_sum + mass * (mixed - mean).clamp(min=0)  # below 0 by rounding only
    gains = gains + torch.where(present, losses, mixed.unsqueeze(-1))
    return gains - gains.amax(-1, keepdim=True), gap_sum


def _scores(gains: Tensor, gap_sum: Tensor, present: Tensor) -> Tensor:
    """eta (G - max G) of those present, whose largest is 0 even where eta is infinite; -inf for the others."""
    below = gains - gains.masked_fill(~present, -math.inf).amax(-1, keepdim=True)
    scores = torch.where(below == 0, 0, below * step_size(gap_sum, gains.shape[-1]).unsqueeze(-1))
    return scores.masked_fill(~present, -math.inf)


def _soft_maximum(gains: Tensor, gap_sum: Tensor, present: Tensor) -> Tensor:
    """(1/eta) log sum_g exp(eta G_g) over those present: their maximum where eta is infinite."""
    largest = gains.masked_fill(~present, -math.inf).amax(-1)
    of_scores = _scores(gains, gap_sum, present).logsumexp(-1)
    num_groups = gains.shape[-1]
    return largest + (gap_sum / math.log(num_groups) * of_scores if num_groups > 1 else 0)
