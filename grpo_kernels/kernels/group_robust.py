"""The tables that a fused forward of GroupRobustLoss leaves behind, and the way back through them.

A backend that fuses the loss has `group_robust_forward` besides the two functions of contract.py, and its
token_logps_backward takes a gradient for each sequence (kernels/triton has both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.batch import Rows
from grpo_kernels.kernels.rows import new_token_outputs

LOGPS, REWARDS, COEFFICIENTS, TOKEN_SCALES = range(4)
"""Rows of `sequences`: logp_s; beta * (logp_s - ref_s); d loss / d token_logp; d logp_s / d token_logp."""
PAIR_LOSSES, SLOPES, PAIR_FACTORS = range(3)
"""Rows of `pairs`: l_i; d l_i / d h_i; d L_g / d l_i for the pair's group g.

The losses that are fused are functions of the margin h: the slope in the rejected score is minus that in h."""
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

    @classmethod
    def empty(cls, logits: Tensor, rows: Rows, num_groups: int) -> GroupRobustTables:
        token_logps, lse = new_token_outputs(logits, rows.labels)
        num_sequences = rows.num_sequences
        return cls(
            loss=token_logps.new_empty(()),
            sequences=token_logps.new_empty((4, num_sequences)),
            pairs=token_logps.new_empty((3, num_sequences // 2)),
            groups=logits.new_empty((5, num_groups), dtype=torch.float64),
            counts=logits.new_empty(num_groups, dtype=torch.int64),
            lse=lse,
            row_sequence=logits.new_empty(0 if rows.cu_seqlens is None else rows.labels.shape[0], dtype=torch.int32),
        )


@dataclass(frozen=True)
class GroupState:
    """What a fused forward reads of GroupWeights, and the buffers that it moves as ``update`` says.

    ``update``: "inline", "lagged" or "none". ``process_group``: the name of the data-parallel group whose statistics
    are summed, "" where there is none; the rank's own gradients are then multiplied by ``gradient_scale``, and
    ``clock`` says at which step it is.
    """

    log_alpha: Tensor  # (K,) float64
    group_sizes: Tensor | None  # (K,) int64
    pending_sums: Tensor  # (K,) float64
    pending_counts: Tensor  # (K,) int64
    skipped_updates: Tensor  # ()
    estimator: str
    step_size: float
    adjustment: float
    floor: float
    chi: float
    update: str
    process_group: str = ""
    gradient_scale: float = 1.0
    clock: Tensor | None = None  # (3,) int64


def token_gradients(
    upstream: tuple[Tensor | None, ...], sequences: Tensor, pairs: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """(S,) gradients of the tokens of each sequence, and a 0-d factor of all of them.

    ``upstream``: gradients of loss, sequences, pairs and groups. None stands for one that nobody used; nearly always
    that is all but the loss: then this computes nothing.
    """
    dloss, dsequences, dpairs, dgroups = upstream
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
