"""Thin autograd Functions: save, call one operator. No arithmetic here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels.batch import by_sequence
from grpo_kernels.kernels.once import Gradients, differentiable_once
from grpo_kernels.kernels.ops import HEAD, PAIRS, PLAN, ROWS


def _save(ctx: Any, values: tuple[Any, ...]) -> None:
    """Tensors where autograd watches over them, the rest beside."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in values)


def _saved(ctx: Any) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.others, strict=True)
    return tuple(other if tensor is None else tensor for tensor, other in pairs)


class TokenLogps(torch.autograd.Function):
    """token_logps (...) of logits (..., V)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, inplace_backward: bool, backend: str
    ) -> Tensor:
        token_logps, lse = torch.ops.grpo_kernels.token_logps(logits, labels, ignore_index, backend)
        _save(ctx, (logits, labels, lse, ignore_index, backend))
        ctx.inplace_backward = inplace_backward
        return token_logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dtoken_logps: Tensor) -> Gradients:
        saved = _saved(ctx)
        if ctx.inplace_backward and not torch.compiler.is_compiling():
            dlogits = saved[0]
            torch.ops.grpo_kernels.token_logps_backward_(dtoken_logps, *saved)
            # The operator does not tell autograd. Without this, another reader of the logits, or a second backward,
            # would silently use gradients as if they were logits; now PyTorch raises.
            torch.autograd.graph.increment_version(dlogits)
        else:
            dlogits = torch.ops.grpo_kernels.token_logps_backward(dtoken_logps, *saved)
        return dlogits, None, None, None, None


class LinearTokenLogps(torch.autograd.Function):
    """token_logps (...) of hidden (..., D) and a head, by kernels/linear.py, and their metrics (..., 4) or (0,).

    `flat` is HEAD, ROWS, PLAN, backend, with_metrics.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
        token_logps, lse, kept, metrics = torch.ops.grpo_kernels.linear_token_logps(hidden, *flat)
        *of_batch, backend, _ = flat
        _save(ctx, (hidden, *of_batch, lse, kept, backend))
        ctx.mark_non_differentiable(metrics)
        return token_logps, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dtoken_logps: Tensor, _: Any) -> Gradients:
        grads = torch.ops.grpo_kernels.linear_token_logps_backward(dtoken_logps, *_saved(ctx))
        return _of_inputs(ctx, grads)


class LinearPairLogps(torch.autograd.Function):
    """Sequence log-probabilities (2B,) from hidden states, by the sweep of kernels/linear_pairs.py.

    `flat` is HEAD, ROWS, PLAN, PAIRS, FORECAST, backend.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *flat: Any) -> Tensor:
        logps, *swept = torch.ops.grpo_kernels.linear_pair_logps(hidden, *flat)
        _save(ctx, (hidden, *flat[: HEAD.size + ROWS.size + PLAN.size], *swept, flat[-1]))
        return logps

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dlogps: Tensor) -> Gradients:
        return _of_inputs(ctx, torch.ops.grpo_kernels.linear_pair_logps_backward(dlogps, *_saved(ctx)))


def _of_inputs(ctx: Any, grads: tuple[Tensor, ...]) -> Gradients:
    """Gradients of hidden, weight and bias, the first inputs; an empty tensor stands for one that nobody asked for."""
    needs_grad = ctx.needs_input_grad
    found = [grad if need else None for grad, need in zip(grads, needs_grad[:3], strict=True)]
    return (*found, *[None] * (len(needs_grad) - 3))


class FusedGroupRobustLoss(torch.autograd.Function):
    """(loss, sequences, pairs, groups, counts): the tables of kernels/group_robust.py, from logits in one operator.

    `flat` is ROWS, PAIRS, GROUPS.
    """

    @staticmethod
    def forward(ctx: Any, inplace_backward: bool, backend: str, logits: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        loss, sequences, pairs, groups, counts, lse, row_sequence = torch.ops.grpo_kernels.group_robust_loss(
            logits, *flat, backend
        )
        rows = ROWS.unpack(flat[: ROWS.size])
        group_ids = PAIRS.unpack(flat[ROWS.size : ROWS.size + PAIRS.size]).group_ids
        of_tables = (lse, row_sequence, sequences, pairs, group_ids, rows.labels, rows.ignore_index, backend)
        _save(ctx, (logits, *of_tables))
        ctx.inplace_backward = inplace_backward
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return loss, sequences, pairs, groups, counts

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor | None) -> Gradients:
        saved = _saved(ctx)
        if ctx.inplace_backward and not torch.compiler.is_compiling():
            dlogits = saved[0]
            torch.ops.grpo_kernels.group_robust_loss_backward_(*upstream[:4], *saved)
            torch.autograd.graph.increment_version(dlogits)  # as in TokenLogps
        else:
            dlogits = torch.ops.grpo_kernels.group_robust_loss_backward(*upstream[:4], *saved)
        return (None, None, dlogits, *([None] * (len(ctx.needs_input_grad) - 3)))


class PairLosses(torch.autograd.Function):
    """Losses (B,) of log-probabilities (2B,), with the slopes of the table of pair losses; `flat` is PAIRS."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, *flat: Any) -> Tensor:
        pairs = PAIRS.unpack(flat)
        losses, slopes = pairs.losses_and_slopes(logps)
        ctx.save_for_backward(slopes, logps)  # the second only so that differentiable_once sees it
        ctx.interleaved = pairs.interleaved
        return losses

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dloss: Tensor) -> Gradients:
        slopes, _ = ctx.saved_tensors
        return (by_sequence(dloss * slopes, ctx.interleaved), *[None] * (len(ctx.needs_input_grad) - 1))
