"""torch.library operators over the backends: schemas, fakes for tracing, and lazy launchers.

They are what torch.compile sees: opaque calls with known output shapes. ``backend`` is a name that dispatch selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.distributed import group_sync
from grpo_kernels.kernels import dispatch, group_robust, linear, linear_pairs

_LIBRARY = torch.library.Library("grpo_kernels", "DEF")
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, float logit_scale, float softcap"
_SWEEP = "int ignore_index, bool average, int chunk_rows, ScalarType accumulate_dtype, bool[3] needs_grad, str backend"
_UPSTREAM = "Tensor? dloss, Tensor? dsequences, Tensor? dpairs, Tensor? dgroups"
_SAVED = (
    "Tensor labels, Tensor lse, Tensor row_sequence, Tensor sequences, Tensor pairs, Tensor group_ids, "
    "int ignore_index, bool packed"
)
_SCHEMAS = (
    "copy_in_forward(Tensor x) -> Tensor",
    "token_logps(Tensor logits, Tensor labels, int ignore_index, str backend) -> (Tensor, Tensor)",
    "token_logps_backward(Tensor dtoken_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> Tensor",
    "token_logps_backward_(Tensor dtoken_logps, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> ()",
    f"linear_token_logps({_HEAD}, Tensor labels, int ignore_index, int chunk_rows, str plan, int kept_rows, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    f"linear_token_logps_backward(Tensor dtoken_logps, {_HEAD}, Tensor labels, Tensor lse, bool[3] needs_grad, "
    "int ignore_index, int chunk_rows, ScalarType accumulate_dtype, str plan, Tensor kept, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    # The tensors of kernels/linear_pairs.Swept.
    f"linear_pair_logps({_HEAD}, Tensor labels, Tensor? cu_seqlens, Tensor group_ids, Tensor? ref_logps, "
    "Tensor? margin, Tensor? weights, Tensor? betas, float beta, str loss_type, float label_smoothing, "
    f"Tensor offsets, Tensor rates, {_SWEEP}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"linear_pair_logps_backward(Tensor dlogps, {_HEAD}, Tensor labels, Tensor? cu_seqlens, Tensor lse, "
    "Tensor states, Tensor sum_dweight, Tensor sum_dbias, Tensor forecast, Tensor is_swept, "
    f"{_SWEEP}) -> (Tensor, Tensor, Tensor)",
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


def _check_in_forward() -> None:
    """A compiled forward cannot know that it is run again: it would move alpha once more."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a compiled GroupRobustLoss cannot be run again inside a backward by activation checkpointing: "
            "keep the loss outside the checkpointed region"
        )


def _copy_in_forward(x: Tensor) -> Tensor:
    _check_in_forward()
    return x.clone()


def _copy_in_forward_fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


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


def _token_logps_backward_fake(dtoken_logps: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _token_logps_backward_inplace(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> None:
    dispatch.kernels_of(backend).token_logps_backward(dtoken_logps, logits, labels, lse, ignore_index, logits)


def _token_logps_backward_inplace_fake(*_: Any) -> None:
    return None


def _linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    labels: Tensor,
    ignore_index: int,
    chunk_rows: int,
    plan: str,
    kept_rows: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    head = linear.LinearHead(weight, bias, logit_scale, softcap)
    return linear.linear_token_logps_forward(
        dispatch.kernels_of(backend), hidden, head, labels, ignore_index, chunk_rows, plan, kept_rows
    )


def _linear_token_logps_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float, labels: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ignore_index, _, plan, kept_rows, backend = rest
    token_logps, lse = _token_logps_fake(hidden, labels, ignore_index, backend)
    return token_logps, lse, hidden.new_empty(linear.kept_shape(plan, hidden, weight, kept_rows))


def _linear_token_logps_backward(
    dtoken_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    labels: Tensor,
    lse: Tensor,
    needs_grad: Sequence[bool],
    ignore_index: int,
    *options: Any,
) -> tuple[Tensor, ...]:
    *options_of_plan, backend = options
    head = linear.LinearHead(weight, bias, logit_scale, softcap)
    arguments = (dtoken_logps, hidden, head, labels, lse, ignore_index, needs_grad, *options_of_plan)
    grads = linear.linear_token_logps_backward(dispatch.kernels_of(backend), *arguments)
    return _no_nones(hidden, grads)


def _linear_backward_fake(
    upstream: Tensor, hidden: Tensor, weight: Tensor, *_: Any, needs_grad: Sequence[bool]
) -> tuple[Tensor, ...]:
    shapes = (hidden, weight, weight[:, 0])
    return tuple(
        torch.empty_like(x) if need else hidden.new_empty(0) for x, need in zip(shapes, needs_grad, strict=True)
    )


def _linear_token_logps_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _linear_backward_fake(*arguments[:3], needs_grad=arguments[8])


def _linear_pair_logps(
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
    betas: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    offsets: Tensor,
    rates: Tensor,
    ignore_index: int,
    average: bool,
    chunk_rows: int,
    accumulate_dtype: torch.dtype,
    needs_grad: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    terms = linear_pairs.PairTerms(
        group_ids,
        ref_logps,
        margin,
        weights,
        beta if betas is None else betas,
        loss_type,
        label_smoothing,
        offsets,
        rates,
    )
    head = linear.LinearHead(weight, bias, logit_scale, softcap)
    options = (ignore_index, average, chunk_rows, needs_grad, accumulate_dtype)
    return tuple(
        linear_pairs.sweep_forward(dispatch.kernels_of(backend), hidden, head, labels, cu_seqlens, terms, *options)
    )


def _linear_pair_logps_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float, labels: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    group_ids, (accumulate_dtype, needs_grad, _) = rest[1], rest[-3:]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    sum_dtype = dtype if dtype == torch.float64 else accumulate_dtype
    num_sequences, num_rows = 2 * group_ids.shape[0], labels.numel()
    return (
        hidden.new_empty(num_sequences, dtype=dtype),
        hidden.new_empty((num_rows, 2), dtype=dtype),
        hidden.new_empty((num_rows if needs_grad[0] else 0, hidden.shape[-1])),
        hidden.new_empty(weight.shape if needs_grad[1] else (0, 0), dtype=sum_dtype),
        hidden.new_empty(weight.shape[:1] if needs_grad[2] else (0,), dtype=sum_dtype),
        hidden.new_empty(num_sequences, dtype=torch.float64),
        hidden.new_empty(num_sequences, dtype=torch.bool),
    )


def _linear_pair_logps_backward(
    dlogps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *swept, ignore_index, average, chunk_rows, accumulate_dtype, needs_grad, backend = rest
    head = linear.LinearHead(weight, bias, logit_scale, softcap)
    arguments = (dlogps, hidden, head, labels, cu_seqlens, linear_pairs.Swept(dlogps, *swept))
    options = (ignore_index, average, chunk_rows, needs_grad, accumulate_dtype)
    grads = linear_pairs.sweep_backward(dispatch.kernels_of(backend), *arguments, *options)
    return _no_nones(hidden, grads)


def _linear_pair_logps_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    return _linear_backward_fake(*arguments[:3], needs_grad=arguments[-2])


def _no_nones(hidden: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An operator's schema has no optional results: an empty tensor stands for a gradient that nobody asked for."""
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


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
    *values, update, process_group, gradient_scale, backend = options
    if update != "none":
        _check_in_forward()
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
        **dict(zip((*names, "chi"), values, strict=True)),
        update=update,
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
    ("copy_in_forward", _copy_in_forward, _copy_in_forward_fake),
    ("token_logps", _token_logps, _token_logps_fake),
    ("token_logps_backward", _token_logps_backward, _token_logps_backward_fake),
    ("token_logps_backward_", _token_logps_backward_inplace, _token_logps_backward_inplace_fake),
    ("linear_token_logps", _linear_token_logps, _linear_token_logps_fake),
    ("linear_token_logps_backward", _linear_token_logps_backward, _linear_token_logps_backward_fake),
    ("linear_pair_logps", _linear_pair_logps, _linear_pair_logps_fake),
    ("linear_pair_logps_backward", _linear_pair_logps_backward, _linear_pair_logps_backward_fake),
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
