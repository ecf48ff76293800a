"""Thin autograd Functions: save, call one operator. No arithmetic here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo_kernels.kernels import ops  # noqa: F401  (defines torch.ops.grpo_kernels)
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
    """token_logps (...) of hidden (..., D) and a head (weight, bias, logit_scale, softcap), by kernels/linear.py."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        labels: Tensor,
        ignore_index: int,
        chunk_rows: int,
        accumulate_dtype: torch.dtype,
        plan: str,
        kept_rows: int,
        backend: str,
    ) -> Tensor:
        head = (weight, bias, logit_scale, softcap)
        token_logps, lse, kept = torch.ops.grpo_kernels.linear_token_logps(
            hidden, *head, labels, ignore_index, chunk_rows, plan, kept_rows, backend
        )
        ctx.save_for_backward(hidden, weight, bias, labels, lse, kept)
        ctx.options = (logit_scale, softcap), (ignore_index, chunk_rows, accumulate_dtype, plan), backend
        return token_logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtoken_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, lse, kept = ctx.saved_tensors
        of_logits, options, backend = ctx.options
        needs_grad = ctx.needs_input_grad[:3]
        grads = torch.ops.grpo_kernels.linear_token_logps_backward(
            dtoken_logps, hidden, weight, bias, *of_logits, labels, lse, needs_grad, *options, kept, backend
        )
        found = (grad if need else None for grad, need in zip(grads, needs_grad, strict=True))
        return (*found, *[None] * 9)


class LinearPairLogps(torch.autograd.Function):
    """Sequence log-probabilities (2B,) from hidden states, by the sweep of kernels/linear_pairs.py."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        softcap: float,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        group_ids: Tensor,
        ref_logps: Tensor | None,
        margin: Tensor | None,
        weights: Tensor | None,
        beta: Beta,
        loss_type: str,
        label_smoothing: float,
        offsets: Tensor,
        rates: Tensor,
        ignore_index: int,
        average: bool,
        chunk_rows: int,
        accumulate_dtype: torch.dtype,
        needs_grad: tuple[bool, bool, bool],
        backend: str,
    ) -> Tensor:
        options = (ignore_index, average, chunk_rows, accumulate_dtype, needs_grad, backend)
        betas = beta if isinstance(beta, Tensor) else None
        logps, *swept = torch.ops.grpo_kernels.linear_pair_logps(
            hidden,
            weight,
            bias,
            logit_scale,
            softcap,
            labels,
            cu_seqlens,
            group_ids,
            ref_logps,
            margin,
            weights,
            betas,
            0.0 if isinstance(beta, Tensor) else float(beta),
            loss_type,
            label_smoothing,
            offsets,
            rates,
            *options,
        )
        ctx.save_for_backward(hidden, weight, bias, labels, cu_seqlens, *swept)
        ctx.of_logits, ctx.options, ctx.needs_grad = (logit_scale, softcap), options, needs_grad
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, cu_seqlens, *swept = ctx.saved_tensors
        grads = torch.ops.grpo_kernels.linear_pair_logps_backward(
            dlogps, hidden, weight, bias, *ctx.of_logits, labels, cu_seqlens, *swept, *ctx.options
        )
        found = (grad if need else None for grad, need in zip(grads, ctx.needs_grad, strict=True))
        return (*found, *[None] * 19)


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
