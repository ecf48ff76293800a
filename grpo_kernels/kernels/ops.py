"""torch.library operators over the backends: schemas, fakes for tracing, and lazy launchers.

They are what torch.compile sees: opaque calls with known output shapes. ``backend`` is a name that dispatch selected.
What travels as one object elsewhere (a batch's rows and pairs, the head, the plan) is flat in a schema; kernels/flat.py
packs and unpacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.distributed import group_sync
from grpo_kernels.kernels import dispatch, group_robust, linear, linear_pairs, token_metrics
from grpo_kernels.kernels.flat import Flat, split
from grpo_kernels.kernels.group_robust import GroupRobustTables, GroupState, SequenceGradients
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_pairs import Forecast, Swept
from grpo_kernels.kernels.linear_plan import LinearPlan
from grpo_kernels.kernels.memory import on_huge_pages
from grpo_kernels.kernels.rows import empty_gradient, new_token_outputs

ROWS = Flat(Rows, outside=("vocab_shard", "context_group"))
PAIRS = Flat(Pairs)
HEAD = Flat(LinearHead)
PLAN = Flat(LinearPlan, outside=("products", "extra_bytes"))
FORECAST = Flat(Forecast)
SWEPT = Flat(Swept, outside=("logps",))
GROUPS = Flat(GroupState, mutated=("log_alpha", "pending_sums", "pending_counts", "skipped_updates"))

_LIBRARY = torch.library.Library("grpo_kernels", "DEF")
_UPSTREAM = "Tensor? dloss, Tensor? dsequences, Tensor? dpairs, Tensor? dgroups"
_OF_TABLES = (
    "Tensor lse, Tensor row_sequence, Tensor sequences, Tensor pairs, Tensor group_ids, Tensor labels, "
    "int ignore_index, str backend"
)
_SCHEMAS = (
    "copy_in_forward(Tensor x) -> Tensor",
    "token_logps(Tensor logits, Tensor labels, int ignore_index, str backend) -> (Tensor, Tensor)",
    "token_logps_backward(Tensor dtoken_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> Tensor",
    "token_logps_backward_(Tensor dtoken_logps, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> ()",
    "token_metrics(Tensor logits, Tensor labels, int ignore_index) -> Tensor",
    f"linear_token_logps(Tensor hidden, {HEAD.schema}, {ROWS.schema}, {PLAN.schema}, str backend, "
    "bool with_metrics) -> (Tensor, Tensor, Tensor, Tensor)",
    f"linear_token_logps_backward(Tensor dtoken_logps, Tensor hidden, {HEAD.schema}, {ROWS.schema}, {PLAN.schema}, "
    "Tensor lse, Tensor kept, str backend) -> (Tensor, Tensor, Tensor)",
    f"linear_pair_logps(Tensor hidden, {HEAD.schema}, {ROWS.schema}, {PLAN.schema}, {PAIRS.schema}, {FORECAST.schema}, "
    f"str backend) -> ({', '.join(['Tensor'] * len(Swept._fields))})",
    f"linear_pair_logps_backward(Tensor dlogps, Tensor hidden, {HEAD.schema}, {ROWS.schema}, {PLAN.schema}, "
    f"{SWEPT.schema}, str backend) -> (Tensor, Tensor, Tensor)",
    # Moves the GroupWeights' buffers as `update` says.
    f"group_robust_loss(Tensor logits, {ROWS.schema}, {PAIRS.schema}, {GROUPS.schema}, str backend) "
    f"-> ({', '.join(['Tensor'] * len(GroupRobustTables._fields))})",
    f"group_robust_loss_backward({_UPSTREAM}, Tensor logits, {_OF_TABLES}) -> Tensor",
    f"group_robust_loss_backward_({_UPSTREAM}, Tensor(a!) logits, {_OF_TABLES}) -> ()",
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
    return new_token_outputs(logits, labels)


def _token_logps_backward(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> Tensor:
    dlogits = on_huge_pages(empty_gradient(logits))
    dispatch.kernels_of(backend).token_logps_backward(dtoken_logps, logits, labels, lse, ignore_index, dlogits)
    return dlogits


def _token_logps_backward_fake(dtoken_logps: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return empty_gradient(logits)


def _token_logps_backward_inplace(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, backend: str
) -> None:
    dispatch.kernels_of(backend).token_logps_backward(dtoken_logps, logits, labels, lse, ignore_index, logits)


def _nothing(*_: Any) -> None:
    return None


def _token_metrics_fake(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    return token_metrics.new_metrics(logits, labels)


def _linear_token_logps(hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rows, plan, (backend, with_metrics) = split(flat, HEAD, ROWS, PLAN)
    metrics = token_metrics.new_metrics(hidden, rows.labels) if with_metrics else None
    found = linear.linear_token_logps_forward(dispatch.kernels_of(backend), hidden, head, rows, plan, metrics)
    return *found, hidden.new_empty(0) if metrics is None else metrics


def _linear_token_logps_fake(hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rows, plan, (_, with_metrics) = split(flat, HEAD, ROWS, PLAN)
    kept = hidden.new_empty(linear.kept_shape(plan, hidden, head.weight))
    metrics = token_metrics.new_metrics(hidden, rows.labels) if with_metrics else hidden.new_empty(0)
    return *new_token_outputs(hidden, rows.labels), kept, metrics


def _linear_token_logps_backward(dtoken_logps: Tensor, hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rows, plan, (lse, kept, backend) = split(flat, HEAD, ROWS, PLAN)
    kernels = dispatch.kernels_of(backend)
    grads = linear.linear_token_logps_backward(kernels, dtoken_logps, hidden, head, rows, lse, plan, kept)
    return _no_nones(hidden, grads)


def _linear_backward_fake(upstream: Tensor, hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, _, plan, _ = split(flat, HEAD, ROWS, PLAN)
    like = (hidden, head.weight, head.weight[:, 0])
    return tuple(
        x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(like, plan.needs_grad, strict=True)
    )


def _linear_pair_logps(hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rows, plan, pairs, forecast, (backend,) = split(flat, HEAD, ROWS, PLAN, PAIRS, FORECAST)
    return linear_pairs.Sweep(dispatch.kernels_of(backend), hidden, head, rows, pairs, forecast, plan).run()


def _linear_pair_logps_fake(hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rows, plan, _ = split(flat, HEAD, ROWS, PLAN)
    return Swept.zeros(hidden, head.weight, rows, plan)


def _linear_pair_logps_backward(dlogps: Tensor, hidden: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    head, rows, plan, of_swept = split(flat, HEAD, ROWS, PLAN)
    *rest, backend = of_swept
    kernels, swept = dispatch.kernels_of(backend), Swept(dlogps, *rest)
    return _no_nones(hidden, linear_pairs.sweep_backward(kernels, dlogps, hidden, head, rows, swept, plan))


def _no_nones(hidden: Tensor, grads: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An operator's schema has no optional results: an empty tensor stands for a gradient that nobody asked for."""
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


def _group_robust_loss(logits: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    rows, pairs, groups, (backend,) = split(flat, ROWS, PAIRS, GROUPS)
    if groups.update != "none":
        _check_in_forward()
    whole_batch = None if groups.clock is None else _sum_over(groups.process_group, groups.clock)
    return dispatch.fused_kernels_of(backend).group_robust_forward(logits, rows, pairs, groups, whole_batch)


def _sum_over(process_group: str, clock: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    group = group_sync.of_name(process_group)
    return lambda sums, counts: group_sync.sum_over_ranks(sums, counts, group, clock)


def _group_robust_loss_fake(logits: Tensor, *flat: Any) -> tuple[Tensor, ...]:
    rows, _, groups, _ = split(flat, ROWS, PAIRS, GROUPS)
    return GroupRobustTables.empty(logits, rows, groups.log_alpha.shape[0])


def _group_robust_loss_backward_into(out: Tensor, arguments: tuple[Any, ...]) -> None:
    *upstream, logits, lse, row_sequence, sequences, pairs, group_ids, labels, ignore_index, backend = arguments
    scale, factor = group_robust.token_gradients(tuple(upstream), sequences, pairs, group_ids)
    if labels.dim() == 1:
        gradients = SequenceGradients(scale, factor, row_sequence)
    else:
        gradients = SequenceGradients(scale.unsqueeze(1).expand(labels.shape), factor)
    dispatch.fused_kernels_of(backend).token_logps_backward(gradients, logits, labels, lse, ignore_index, out)


def _logits_of(arguments: tuple[Any, ...]) -> Tensor:
    """They stand behind the gradients of loss, sequences, pairs and groups."""
    logits: Tensor = arguments[4]
    return logits


def _group_robust_loss_backward(*arguments: Any) -> Tensor:
    dlogits = on_huge_pages(_group_robust_loss_backward_fake(*arguments))
    _group_robust_loss_backward_into(dlogits, arguments)
    return dlogits


def _group_robust_loss_backward_fake(*arguments: Any) -> Tensor:
    return empty_gradient(_logits_of(arguments))


def _group_robust_loss_backward_inplace(*arguments: Any) -> None:
    _group_robust_loss_backward_into(_logits_of(arguments), arguments)


_OPERATORS = (
    ("copy_in_forward", _copy_in_forward, _copy_in_forward_fake),
    ("token_logps", _token_logps, _token_logps_fake),
    ("token_logps_backward", _token_logps_backward, _token_logps_backward_fake),
    ("token_logps_backward_", _token_logps_backward_inplace, _nothing),
    ("token_metrics", token_metrics.token_metrics, _token_metrics_fake),
    ("linear_token_logps", _linear_token_logps, _linear_token_logps_fake),
    ("linear_token_logps_backward", _linear_token_logps_backward, _linear_backward_fake),
    ("linear_pair_logps", _linear_pair_logps, _linear_pair_logps_fake),
    ("linear_pair_logps_backward", _linear_pair_logps_backward, _linear_backward_fake),
    ("group_robust_loss", _group_robust_loss, _group_robust_loss_fake),
    ("group_robust_loss_backward", _group_robust_loss_backward, _group_robust_loss_backward_fake),
    ("group_robust_loss_backward_", _group_robust_loss_backward_inplace, _nothing),
)

for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
for _name, _launcher, _fake in _OPERATORS:
    _LIBRARY.impl(_name, _launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grpo_kernels::{_name}", _fake, lib=_LIBRARY)
