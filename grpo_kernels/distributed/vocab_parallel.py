"""Token log-probabilities of logits whose vocabulary is sharded over ranks.

Each rank has columns start:stop of every row. One all-gather of (lse, label's logit) a row gives every rank the same

    lse = log sum_r exp(lse_r)        token_logp = logit[label] - lse

and the backward needs no collective for dlogits: with p = softmax of the rank's own columns and q = exp(lse_r - lse),

    dlogit_v = dtoken_logp * (1{v = label} - q p_v)

which is the backward of the rank's own columns, times q, but for the label's column. `ShardKernels` says so in terms of
any backend's two functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels.batch import Rows
from grpo_kernels.kernels import linear
from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.linear_plan import LinearPlan
from grpo_kernels.kernels.memory import on_huge_pages
from grpo_kernels.kernels.once import differentiable_once
from grpo_kernels.kernels.rows import accumulation_dtype
from grpo_kernels.types import VocabShard

OWN, ALL = slice(0, 2), slice(2, 4)  # the two parts of a shard's lse and those of the whole row's, side by side


class ShardKernels:
    """A backend's functions (kernels/contract.py) on one shard: labels are global, and nothing is communicated."""

    def __init__(self, kernels: KernelBackend, shard: VocabShard) -> None:
        self.kernels, self.start, self.stop = kernels, shard.start, shard.stop

    def token_logps_forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The label's logit, NaN where another rank has it, and the shard's lse (..., 2)."""
        if logits.shape[-1] == 0:  # the last rank's, where the vocabulary is not a multiple of their number
            lse = logits.new_zeros((*labels.shape, 2), dtype=accumulation_dtype(logits))
            lse[..., 0] = -torch.inf
            return torch.full_like(lse[..., 0], torch.nan), lse
        owned, local = self._local(labels, ignore_index)
        _, lse = self.kernels.token_logps_forward(logits, local, ignore_index)
        label_logits = logits.gather(-1, local.clamp(min=0).long().unsqueeze(-1)).squeeze(-1).to(lse.dtype)
        return label_logits.masked_fill(~owned, torch.nan), lse

    def token_logps_backward(
        self, dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
    ) -> None:
        """``lse`` (..., 4): OWN and ALL."""
        if logits.shape[-1] == 0:
            return
        owned, local = self._local(labels, ignore_index)
        counted = labels != ignore_index
        column = local.masked_fill(~counted, 0).long().unsqueeze(-1)
        label_logits = logits.gather(-1, column).squeeze(-1).double()  # before `out`, perhaps the logits, is written
        own, whole = lse[..., OWN].double().sum(-1), lse[..., ALL].double().sum(-1)
        share = torch.where(counted, (own - whole).exp(), 0.0)
        local = local.masked_fill(own == -torch.inf, ignore_index)  # all masked: no softmax, and a gradient of 0
        self.kernels.token_logps_backward(
            dtoken_logps * share.to(dtoken_logps.dtype), logits, local, lse[..., OWN].contiguous(), ignore_index, out
        )
        at_label = dtoken_logps.double() * (owned.double() - (label_logits - whole).exp())
        at_label = torch.where(counted, at_label, 0.0)
        out.scatter_(-1, column, at_label.to(out.dtype).unsqueeze(-1))

    def _local(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """(which rows' labels are in this shard, labels as columns of it: 0 where another rank has them)."""
        owned = (labels >= self.start) & (labels < self.stop) & (labels != ignore_index)
        local = torch.where(owned, labels - self.start, 0)
        return owned, torch.where(labels == ignore_index, ignore_index, local)


def merge(
    label_logits: Tensor, lse: Tensor, labels: Tensor, ignore_index: int, process_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """token_logps (...) and lse (..., 4) from every rank's `ShardKernels.token_logps_forward`, by one all-gather.

    A label that no rank has, or a NaN in any shard, gives NaN.
    """
    own = lse.double().sum(-1)
    mine = torch.stack([own, label_logits.double()])
    size = dist.get_world_size(process_group)
    parts = mine.new_empty(size * mine.shape[0], *mine.shape[1:])
    dist.all_gather_into_tensor(parts, mine, group=process_group)
    parts = parts.unflatten(0, (size, mine.shape[0]))
    whole = torch.logsumexp(parts[:, 0], dim=0)
    missing = parts[:, 1].isnan()
    label_logit = torch.where(missing, 0.0, parts[:, 1]).sum(0).masked_fill(missing.all(0), torch.nan)
    counted = labels != ignore_index
    token_logps = torch.where(counted, label_logit - whole, 0.0).to(lse.dtype)
    whole = torch.where(counted, whole, 0.0)
    high = whole.to(lse.dtype)
    both = torch.stack([lse[..., 0], lse[..., 1], high, (whole - high.double()).to(lse.dtype)], dim=-1)
    return token_logps, both


class VocabParallelTokenLogps(torch.autograd.Function):
    """token_logps (...), the same on every rank, of a rank's columns of the logits (..., stop - start)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, inplace_backward: bool, kernels: KernelBackend) -> Tensor:
        shard, labels = shard_of(rows), rows.labels
        ctx.kernels = ShardKernels(kernels, shard)
        label_logits, lse = ctx.kernels.token_logps_forward(logits, labels, rows.ignore_index)
        token_logps, lse = merge(label_logits, lse, labels, rows.ignore_index, shard.process_group)
        ctx.save_for_backward(logits, labels, lse)
        ctx.ignore_index, ctx.inplace_backward = rows.ignore_index, inplace_backward
        return token_logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dtoken_logps: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        dlogits = logits if ctx.inplace_backward else on_huge_pages(logits.new_empty(logits.shape))
        ctx.kernels.token_logps_backward(dtoken_logps, logits, labels, lse, ctx.ignore_index, dlogits)
        if ctx.inplace_backward:
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None


class VocabParallelLinearTokenLogps(torch.autograd.Function):
    """The same from hidden (..., D), equal on every rank, and the rank's rows of the head's weight and bias.

    With ``shard.sequence_parallel`` a rank has its part of hidden's positions: they are gathered forward, and the
    gradient is reduced and scattered backward. Without, the gradient is summed over the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        of_logits: tuple[float, float],
        rows: Rows,
        plan: LinearPlan,
        kernels: KernelBackend,
    ) -> Tensor:
        shard = shard_of(rows)
        ctx.kernels, ctx.of_logits, ctx.rows, ctx.plan = ShardKernels(kernels, shard), of_logits, rows, plan
        whole_hidden = gather_positions(hidden, shard) if shard.sequence_parallel else hidden
        head = linear.LinearHead(weight, bias, *of_logits)
        label_logits, lse, kept = linear.linear_token_logps_forward(ctx.kernels, whole_hidden, head, rows, plan)
        token_logps, lse = merge(label_logits, lse, rows.labels, rows.ignore_index, shard.process_group)
        ctx.save_for_backward(whole_hidden, weight, bias, lse, kept)
        return token_logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dtoken_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, lse, kept = ctx.saved_tensors
        head, shard = linear.LinearHead(weight, bias, *ctx.of_logits), shard_of(ctx.rows)
        dhidden, dweight, dbias = linear.linear_token_logps_backward(
            ctx.kernels, dtoken_logps, hidden, head, ctx.rows, lse, ctx.plan, kept
        )
        if dhidden is not None and shard.sequence_parallel:
            dhidden = scatter_positions(dhidden, shard)
        elif dhidden is not None:
            dist.all_reduce(dhidden, group=shard.process_group)
        return dhidden, dweight, dbias, *[None] * 4


def shard_of(rows: Rows) -> VocabShard:
    assert rows.vocab_shard is not None  # asked before these functions are called
    return rows.vocab_shard


def like_whole_hidden(hidden: Tensor, shard: VocabShard) -> Tensor:
    """A tensor of the shape that hidden has when every rank's positions are together; no storage of its own."""
    if not shard.sequence_parallel:
        return hidden
    shape = list(hidden.shape)
    shape[-2] *= dist.get_world_size(shard.process_group)
    return hidden.new_empty(1).expand(shape)


def gather_positions(hidden: Tensor, shard: VocabShard) -> Tensor:
    """(S, T, D) or (N, D) from every rank's equal part of the positions, in the order of the ranks."""
    first = hidden.movedim(-2, 0).contiguous()
    size = dist.get_world_size(shard.process_group)
    parts = first.new_empty(size * first.shape[0], *first.shape[1:])
    dist.all_gather_into_tensor(parts, first, group=shard.process_group)
    return parts.movedim(0, -2)


def scatter_positions(dhidden: Tensor, shard: VocabShard) -> Tensor:
    """The rank's part of the positions of the gradient summed over ranks."""
    first = dhidden.movedim(-2, 0).contiguous()
    size = dist.get_world_size(shard.process_group)
    part = first.new_empty(first.shape[0] // size, *first.shape[1:])
    dist.reduce_scatter_tensor(part, first, group=shard.process_group)
    return part.movedim(0, -2)
