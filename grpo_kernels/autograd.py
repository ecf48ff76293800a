"""Thin autograd Functions: save, call one operator. No arithmetic here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels import ops  # noqa: F401  (defines torch.ops.grpo_kernels)
from grpo_kernels.pair_losses import PAIR_LOSSES, Beta


class TokenLogps(torch.autograd.Function):
    """token_logps (...) of logits (..., V)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, inplace_backward: bool, backend: str
    ) -> Tensor:
        token_logps, lse = torch.ops.grpo_kernels.token_logps(logits, labels, ignore_index, backend)
        ctx.save_for_backward(logits, labels, lse)
        ctx.options = (ignore_index, backend)
        ctx.inplace_backward = inplace_backward
        return token_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken_logps: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        if ctx.inplace_backward and not torch.compiler.is_compiling():
            torch.ops.grpo_kernels.token_logps_backward_(dtoken_logps, logits, labels, lse, *ctx.options)
            # The operator does not tell autograd. Without this, another reader of the logits, or a second backward,
            # would silently use gradients as if they were logits; now PyTorch raises.
            torch.autograd.graph.increment_version(logits)
            return logits, None, None, None, None
        dlogits = torch.ops.grpo_kernels.token_logps_backward(dtoken_logps, logits, labels, lse, *ctx.options)
        return dlogits, None, None, None, None


class LinearTokenLogps(torch.autograd.Function):
    """token_logps (...) of hidden (..., D), weight (V, D) and bias (V,), by a plan of kernels/linear.py."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        plan: str,
        kept_rows: int,
        backend: str,
    ) -> Tensor:
        token_logps, lse, kept = torch.ops.grpo_kernels.linear_token_logps(
            hidden, weight, bias, labels, ignore_index, plan, kept_rows, backend
        )
        ctx.save_for_backward(hidden, weight, bias, labels, lse, kept)
        ctx.options = (ignore_index, plan, backend)
        return token_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse, kept = ctx.saved_tensors
        ignore_index, plan, backend = ctx.options
        needs_grad = ctx.needs_input_grad[:3]
        grads = torch.ops.grpo_kernels.linear_token_logps_backward(
            dtoken_logps, hidden, weight, bias, labels, lse, ignore_index, needs_grad, plan, kept, backend
        )
        found = (grad if need else None for grad, need in zip(grads, needs_grad, strict=True))
        return (*found, None, None, None, None, None)


class FusedGroupRobustLoss(torch.autograd.Function):
    """(loss, sequences, pairs, groups, counts): the tables of kernels/group_robust.py, from logits in one operator."""

    @staticmethod
    def forward(
        ctx: Any,
        inplace_backward: bool,
        backend: str,
        ignore_index: int,
        logits: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        ref_logps: Tensor | None,
        group_ids: Tensor,
        *arguments: Any,
    ) -> tuple[Tensor, ...]:
        loss, sequences, pairs, groups, counts, lse, row_sequence = torch.ops.grpo_kernels.group_robust_loss(
            logits, labels, cu_seqlens, ref_logps, group_ids, *arguments
        )
        ctx.save_for_backward(logits, labels, lse, row_sequence, sequences, pairs, group_ids)
        ctx.options = (ignore_index, cu_seqlens is not None, backend)
        ctx.inplace_backward = inplace_backward
        ctx.num_inputs = 8 + len(arguments)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return loss, sequences, pairs, groups, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, *saved = ctx.saved_tensors
        arguments = (*upstream[:4], logits, *saved, *ctx.options)
        if ctx.inplace_backward and not torch.compiler.is_compiling():
            torch.ops.grpo_kernels.group_robust_loss_backward_(*arguments)
            torch.autograd.graph.increment_version(logits)  # as in TokenLogps
            dlogits = logits
        else:
            dlogits = torch.ops.grpo_kernels.group_robust_loss_backward(*arguments)
        return (None, None, None, dlogits, *([None] * (ctx.num_inputs - 4)))


class PairLossFunction(torch.autograd.Function):
    """l(h) (B,) with the derivative from the table of pair losses."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, beta: Beta, loss_type: str, label_smoothing: float) -> Tensor:
        tensors = (h, beta) if isinstance(beta, Tensor) else (h,)
        ctx.save_for_backward(*tensors)
        ctx.beta = None if isinstance(beta, Tensor) else beta
        ctx.options = (loss_type, label_smoothing)
        return PAIR_LOSSES[loss_type].value(h, beta, label_smoothing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        h, *rest = ctx.saved_tensors
        beta = rest[0] if rest else ctx.beta
        loss_type, label_smoothing = ctx.options
        return dloss * PAIR_LOSSES[loss_type].derivative(h, beta, label_smoothing), None, None, None
