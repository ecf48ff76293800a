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
from grpo_kernels.groups.rules import moved_log_alpha
from grpo_kernels.kernels.rows import new_token_outputs

LOGPS, REWARDS, COEFFICIENTS, TOKEN_SCALES = range(4)
"""Rows of `sequences`: logp_s; beta * (logp_s - ref_s); d loss / d token_logp; d logp_s / d token_logp."""
PAIR_LOSSES, SLOPES, PAIR_FACTORS = range(3)
"""Rows of `pairs`: l_i; d l_i / d h_i; d L_g / d l_i for the pair's group g.

The losses that are fused are functions of the margin h: the slope in the rejected score is minus that in h."""
SUMS, GROUP_LOSSES, ALPHA, FACTORS, GROUP_COEFFICIENTS = range(5)
"""Rows of `groups`: the sums of l_i; L_g; alpha_g(new); d L_g / d l_i; d loss / d l_i."""

FUSED_GROUPS = 256
"""Up to so many groups, the last block of the forward's launch clears sums and moves alpha. Not measured yet."""


class GroupRobustTables(NamedTuple):
    loss: Tensor  # ()
    sequences: Tensor  # (4, S)
    pairs: Tensor  # (3, B)
    groups: Tensor  # (5, K) float64
    counts: Tensor  # (K,) int64
    lse: Tensor  # (..., 2)
    row_sequence: Tensor  # (rows,) int32 for packed rows, -1 for those of no sequence; else empty

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


def new_tables(logits: Tensor, rows: Rows, num_groups: int) -> tuple[GroupRobustTables, Tensor, Tensor]:
    """(tables, (2, S) float64 for sums of token_logps and counts of tokens, (S + 1,) int32 tickets) of a launch.

    The latter two are zeros, by one launch: a sequence without rows has no program that writes its sum. So are sums and
    counts of more than FUSED_GROUPS, which the one block that adds to them does not clear.
    """
    num_sequences = rows.num_sequences
    words = logits.new_zeros(5 * num_sequences + 1, dtype=torch.int32)
    logps = words[: 4 * num_sequences].view(torch.float64).view(2, num_sequences)
    tables = GroupRobustTables.empty(logits, rows, num_groups)
    if num_groups > FUSED_GROUPS:
        tables.groups[SUMS].zero_()
        tables.counts.zero_()
    return tables, logps, words[4 * num_sequences :]


def finish_many_groups(tables: GroupRobustTables, group_ids: Tensor, state: GroupState) -> None:
    """From the sums and counts: move alpha, fill the rest of the tables and the loss.

    What the one block of a kernel does for up to FUSED_GROUPS, by PyTorch's operators, which share many groups out.
    """
    log_alpha, sums, counts = state.log_alpha, tables.groups[SUMS], tables.counts
    num_groups = log_alpha.shape[0]
    sizes = torch.ones_like(log_alpha) if state.group_sizes is None else state.group_sizes.double()
    if state.estimator == "importance":  # an absent group's loss of 0 is unbiased as it stands
        factors = sizes.sum() / sizes / counts.sum().clamp(min=1)
        present = torch.ones_like(counts, dtype=torch.bool)
    else:
        factors = 1 / counts.clamp(min=1).double()
        present = counts > 0
    losses = factors * sums
    if state.update == "inline":
        finite = sums.isfinite().all()
        scores = losses + state.adjustment / sizes.sqrt() if state.adjustment else losses
        moved = moved_log_alpha(
            log_alpha,
            scores,
            present,
            log_alpha,
            rule="exponentiated_gradient",
            parameter=state.step_size * state.chi,
            floor=state.floor,
        )
        log_alpha.copy_(torch.where(finite & present.any() & counts.any(), moved, log_alpha))
        state.skipped_updates.add_(~finite)
    elif state.update == "lagged":
        state.pending_sums.add_(sums)
        state.pending_counts.add_(counts)
    alpha = log_alpha.exp()
    weights = (1 - state.chi) / num_groups + state.chi * alpha
    tables.loss.copy_((weights * losses).sum())
    factors = factors * state.gradient_scale  # from here on for gradients only
    torch.stack([losses, alpha, factors, weights * factors], out=tables.groups[GROUP_LOSSES:])
    group = torch.where((group_ids >= 0) & (group_ids < num_groups), group_ids, 0).long()
    tables.pairs[PAIR_FACTORS] = factors[group].to(tables.pairs.dtype)
    dh = tables.pairs[SLOPES].double() * tables.groups[GROUP_COEFFICIENTS, group]
    tables.sequences[COEFFICIENTS] = (torch.cat([dh, -dh]) * tables.sequences[TOKEN_SCALES]).to(tables.sequences.dtype)


class SequenceGradients(NamedTuple):
    """d loss / d token_logp, which is one number for all tokens of a sequence, times a factor."""

    scale: Tensor  # labels' shape, expanded; with row_sequence (S,)
    factor: Tensor | None = None  # 0-d
    row_sequence: Tensor | None = None  # (rows,) int32, of packed rows


Upstream = Tensor | SequenceGradients


def upstream_of(gradients: Upstream) -> SequenceGradients:
    return gradients if isinstance(gradients, SequenceGradients) else SequenceGradients(gradients)


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
