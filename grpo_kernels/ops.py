"""torch.library operators over the backends: schemas, fakes for tracing, and lazy launchers.

They are what torch.compile sees: opaque calls with known output shapes. ``backend`` is a name that dispatch selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import dispatch
from grpo_kernels.distributed import group_sync
from grpo_kernels.kernels import group_robust, linear

_LIBRARY = torch.library.Library("grpo_kernels", "DEF")
_UPSTREAM = "Tensor? dloss, Tensor? dsequences, Tensor? dpairs, Tensor? dgroups"
_SAVED = (
    "Tensor labels, Tensor lse, Tensor row_sequence, Tensor sequences, Tensor pairs, Tensor group_ids, "
    "int ignore_index, bool packed"
)
_SCHEMAS = (
    "token_logps(Tensor logits, Tensor labels, int ignore_index, str backend) -> (Tensor, Tensor)",
    "token_logps_backward(Tensor dtoken_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> Tensor",
    "token_logps_backward_(Tensor dtoken_logps, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> ()",
    "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, str plan, "
    "int kept_rows, str backend) -> (Tensor, Tensor, Tensor)",
    "linear_token_logps_backward(Tensor dtoken_logps, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor lse, int ignore_index, bool[3] needs_grad, str plan, Tensor kept, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    # The tensors of kernels/group_robust.GroupRobustTables; moves the GroupWeights' buffers as `update` says.
    "group_robust_loss(Tensor logits, Tensor labels, Tensor? cu_seqlens, Tensor? ref_logps, Tensor group_ids, "
    "Tensor? betas, Tensor? margin, Tensor? weights, Tensor(a!) log_alpha, Tensor? group_sizes, "
    "Tensor(b!) pending_sums, Tensor(c!) pending_counts, Tensor(d!) skipped_updates, float beta, str loss_type, "
    "float label_smoothing, bool average, int ignore_index, str estimator, float step_size, float adjustment, "
    "float floor, float chi, str update, str process_group, float gradient_scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"group_robust_loss_backward({_UPSTREAM}, Tensor logits, {_SAVED}, str backend) -> Tensor",
    f"group_robust_loss_backward_({_UPSTREAM}, Tensor(a!) logits, {_SAVED}, str backend) -> ()",
)


def _token_logps(logits: Tensor, labels: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor]:
    return dispatch.kernels_of(backend).token_logps_forward(logits, labels, ignore_index)


def _token_logps_fake(logits: Tensor, labels: Tensor, ignore_index: int, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(labels.shape, dtype=dtype), logits.new_empty((*labels.shape, 2), dtype=dtype)


def _token_logps_backward(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> Tensor:
    dlogits = logits.new_empty(logits.shape)
    dispatch.kernels_of(backend).token_logps_backward(dtoken_logps, logits, labels, lse, ignore_index, dlogits)
    return dlogits


def _token_logps_backward_fake(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_logps_backward_inplace(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> None:
    dispatch.kernels_of(backend).token_logps_backward(dtoken_logps, logits, labels, lse, ignore_index, logits)


def _token_logps_backward_inplace_fake(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> None:
    return None


def _linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    plan: str,
    kept_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = dispatch.kernels_of(backend)
    return linear.linear_token_logps_forward(kernels, hidden, weight, bias, labels, ignore_index, plan, kept_rows)


def _linear_token_logps_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    plan: str,
    kept_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    token_logps, lse = _token_logps_fake(hidden, labels, ignore_index, backend)
    return token_logps, lse, hidden.new_empty(linear.kept_shape(plan, hidden, weight, kept_rows))


def _linear_token_logps_backward(
    dtoken_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_grad: Sequence[bool],
    plan: str,
    kept: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    arguments = (dtoken_logps, hidden, weight, bias, labels, lse, ignore_index, needs_grad, plan, kept)
    grads = linear.linear_token_logps_backward(dispatch.kernels_of(backend), *arguments)
    # An operator's schema has no optional results: an empty tensor stands for a gradient that nobody asked for.
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


def _linear_token_logps_backward_fake(
    dtoken_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_grad: Sequence[bool],
    plan: str,
    kept: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    shapes = (hidden, weight, weight[:, 0])
    return tuple(
        torch.empty_like(x) if need else hidden.new_empty(0) for x, need in zip(shapes, needs_grad, strict=True)
    )


def _group_robust_loss(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    group_ids: Tensor,
    betas: Tensor | None,
    margin: Tensor | None,
    weights: Tensor | None,
    log_alpha: Tensor,
    group_sizes: Tensor | None,
    pending_sums: Tensor,
    pending_counts: Tensor,
    skipped_updates: Tensor,
    beta: float,
    *options: Any,
) -> tuple[Tensor, ...]:
    *values, process_group, gradient_scale, backend = options
    names = ("loss_type", "label_smoothing", "average", "ignore_index", "estimator", "step_size", "adjustment", "floor")
    return dispatch.fused_kernels_of(backend).group_robust_forward(
        logits,
        labels,
        cu_seqlens,
        ref_logps,
        group_ids,
        beta if betas is None else betas,
        margin,
        weights,
        log_alpha,
        group_sizes,
        pending_sums,
        pending_counts,
        skipped_updates,
        **dict(zip((*names, "chi", "update"), values, strict=True)),
        gradient_scale=gradient_scale,
        whole_batch=_sum_over(process_group) if process_group else None,
    )


def _sum_over(process_group: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    group = group_sync.of_name(process_group)
    return lambda sums, counts: group_sync.sum_over_ranks(sums, counts, group)


def _group_robust_loss_fake(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    group_ids: Tensor,
    betas: Tensor | None,
    margin: Tensor | None,
    weights: Tensor | None,
    log_alpha: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_pairs, num_groups = group_ids.shape[0], log_alpha.shape[0]
    return (
        logits.new_empty((), dtype=dtype),
        logits.new_empty((4, 2 * num_pairs), dtype=dtype),
        logits.new_empty((3, num_pairs), dtype=dtype),
        logits.new_empty((5, num_groups), dtype=torch.float64),
        logits.new_empty(num_groups, dtype=torch.int64),
        logits.new_empty((*labels.shape, 2), dtype=dtype),
        logits.new_empty(0 if cu_seqlens is None else labels.shape[0], dtype=torch.int32),
    )


def _group_robust_loss_backward_into(
    out: Tensor,
    dloss: Tensor | None,
    dsequences: Tensor | None,
    dpairs: Tensor | None,
    dgroups: Tensor | None,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    row_sequence: Tensor,
    sequences: Tensor,
    pairs: Tensor,
    group_ids: Tensor,
    ignore_index: int,
    packed: bool,
    backend: str,
) -> None:
    scale, factor = group_robust.token_gradients(dloss, dsequences, dpairs, dgroups, sequences, pairs, group_ids)
    scale = scale if packed else scale.unsqueeze(1).expand(labels.shape)
    dispatch.fused_kernels_of(backend).token_logps_backward(
        scale, logits, labels, lse, ignore_index, out, factor, row_sequence if packed else None
    )


def _group_robust_loss_backward(*arguments: Any) -> Tensor:
    logits = arguments[4]
    dlogits = logits.new_empty(logits.shape)
    _group_robust_loss_backward_into(dlogits, *arguments)
    return dlogits


def _group_robust_loss_backward_fake(*arguments: Any) -> Tensor:
    return arguments[4].new_empty(arguments[4].shape)


def _group_robust_loss_backward_inplace(*arguments: Any) -> None:
    _group_robust_loss_backward_into(arguments[4], *arguments)


def _group_robust_loss_backward_inplace_fake(*_: Any) -> None:
    return None


_OPERATORS = (
    ("token_logps", _token_logps, _token_logps_fake),
    ("token_logps_backward", _token_logps_backward, _token_logps_backward_fake),
    ("token_logps_backward_", _token_logps_backward_inplace, _token_logps_backward_inplace_fake),
    ("linear_token_logps", _linear_token_logps, _linear_token_logps_fake),
    ("linear_token_logps_backward", _linear_token_logps_backward, _linear_token_logps_backward_fake),
    ("group_robust_loss", _group_robust_loss, _group_robust_loss_fake),
    ("group_robust_loss_backward", _group_robust_loss_backward, _group_robust_loss_backward_fake),
    (
        "group_robust_loss_backward_",
        _group_robust_loss_backward_inplace,
        _group_robust_loss_backward_inplace_fake,
    ),
)

for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
for _name, _launcher, _fake in _OPERATORS:
    _LIBRARY.impl(_name, _launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grpo_kernels::{_name}", _fake, lib=_LIBRARY)
