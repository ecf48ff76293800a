"""What a pair's weight in the loss will be, up to a factor that all pairs share, before the whole batch is known."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.kernels.linear_pairs import Forecast
from grpo_kernels.segments import segment_sum


def forecast_of(of_groups: GroupWeights, group_ids: Tensor, training: bool = True) -> Forecast | None:
    """None where a weight depends on more than its group's pairs of this rank's batch: other ranks, shares in several
    groups; a floor, chi < 1 or another rule than plain ascent while alpha moves.

    In docs/method.md's terms: the weight is alpha_g N / (N_g B) or alpha_g / n_g, and alpha_g is in proportion to
    alpha_g exp(eta (L_g + C / sqrt(N_g))) of before. With ``inner_tilt`` it is multiplied by that of groups/tilt.py.
    """
    num_groups = of_groups.num_groups
    if group_ids.dim() == 2:
        return None
    moves = training and of_groups.training and torch.is_grad_enabled()
    lagged = of_groups.update_mode == "lagged"
    mean_of_group = of_groups.estimator == "group_mean"
    of_batch = bool(of_groups.inner_tilt) and not (lagged and moves)  # a tilted mean of this very batch
    other_ranks = moves and of_groups.num_ranks > 1 and (num_groups > 1 or of_batch)
    may_move = moves and not lagged and num_groups > 1 and of_groups.chi > 0
    if other_ranks and (may_move or mean_of_group or of_batch):
        return None
    if may_move and (not of_groups.is_plain_ascent or of_groups.floor or of_groups.chi < 1):
        return None
    ids = group_ids.clamp(0, num_groups - 1)
    if mean_of_group:
        per_pair = 1 / segment_sum(torch.ones_like(ids, dtype=torch.float64), ids, num_groups).clamp(min=1)
        to_loss = per_pair
    else:
        assert of_groups.group_sizes is not None  # the importance estimator asked for them
        per_pair = 1 / of_groups.group_sizes.double()
        to_loss = per_pair * of_groups.group_sizes.double().sum() / max(1, ids.shape[0])
    accumulators = 2 if may_move or of_batch else 1
    tilt = of_groups.inner_tilt
    means = of_groups.tilted_means.clone() if tilt and not of_batch else None  # step() will overwrite them
    if not may_move or of_groups.update_of_forward(training) != "inline":  # a forward run again has the weights already
        log_weights = of_groups.loss_weights().log() + per_pair.log()
        return Forecast(log_weights, torch.zeros_like(log_weights), accumulators, tilt, means)
    offsets = of_groups.log_alpha + per_pair.log()
    if of_groups.adjustment:
        assert of_groups.group_sizes is not None
        offsets = offsets + of_groups.step_size * of_groups.adjustment / of_groups.group_sizes.double().sqrt()
    return Forecast(offsets, of_groups.step_size * to_loss, accumulators, tilt, means)
