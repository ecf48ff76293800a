"""The tables that a fused forward of GroupRobustLoss leaves behind, and the way back through them.

A backend that fuses the loss has `group_robust_forward` besides the two functions of contract.py, and its
token_logps_backward takes a gradient for each sequence (kernels/triton has both).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOGPS, REWARDS, COEFFICIENTS, TOKEN_SCALES = range(4)
"""Rows of `sequences`: logp_s; beta * (logp_s - ref_s); d loss / d token_logp; d logp_s / d token_logp."""
PAIR_LOSSES, SLOPES, PAIR_FACTORS = range(3)
"""Rows of `pairs`: l_i; d l_i / d h_i; d L_g / d l_i for the pair's group g."""
SUMS, GROUP_LOSSES, ALPHA, FACTORS, GROUP_COEFFICIENTS = range(5)
"""Rows of `groups`: the sums of l_i; L_g; alpha_g(new); d L_g / d l_i; d loss / d l_i."""


class GroupRobustTables(NamedTuple):
    loss: Tensor  # ()
    sequences: Tensor  # (4, S)
    pairs: Tensor  # (3, B)
    groups: Tensor  # (5, K) float64
    counts: Tensor  # (K,) int64
    lse: Tensor  # (..., 2)
    row_sequence: Tensor  # (rows,) int32 for packed rows, else empty


def token_gradients(
    dloss: Tensor | None,
    dsequences: Tensor | None,
    dpairs: Tensor | None,
    dgroups: Tensor | None,
    sequences: Tensor,
    pairs: Tensor,
    group_ids: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """(S,) gradients of the tokens of each sequence, and a 0-d factor of all of them.

    None stands for an output that nobody used. Nearly always that is all but the loss: then this computes nothing.
    """
    if dsequences is None and dpairs is None and dgroups is None:
        if dloss is None:
            return torch.zeros_like(sequences[COEFFICIENTS]), None
        return sequences[COEFFICIENTS], dloss
    dlogps = torch.zeros_like(sequences[LOGPS]) if dsequences is None else dsequences[LOGPS]
    dpair = torch.zeros_like(pairs[PAIR_LOSSES]) if dpairs is None else dpairs[PAIR_LOSSES]
    if dgroups is not None:
        known = (group_ids >= 0) & (group_ids < dgroups.shape[1])
        of_group = dgroups[GROUP_LOSSES, torch.where(known, group_ids, 0).long()]
        dpair = dpair + of_group.to(pairs.dtype) * pairs[PAIR_FACTORS]
    dh = dpair * pairs[SLOPES]
    total = (torch.cat([dh, -dh]) + dlogps) * sequences[TOKEN_SCALES]
    return total if dloss is None else total + dloss * sequences[COEFFICIENTS], None
