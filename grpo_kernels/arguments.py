"""What every call does with its arguments first: they are checked, once, and come out as rows, head and backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import reference, validation
from grpo_kernels.batch import Rows
from grpo_kernels.distributed import dtensor, vocab_parallel
from grpo_kernels.kernels import dispatch
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_plan import BUDGET_OPTIONS, Budget
from grpo_kernels.types import RowOptions, TokenOptions


def backend_of(argument: str, tensor: Tensor, name: str) -> dispatch.BackendEntry:
    return dispatch.select(name, dispatch.Request(argument, tuple(tensor.shape), tensor.dtype, tensor.device))


def checked_scale_and_softcap(options: dict[str, Any]) -> tuple[float, float]:
    """Taken out of the options; a softcap of 0 is none."""
    logit_scale, softcap = options.pop("logit_scale", 1.0), options.pop("softcap", None)
    validation.check_logit_options(logit_scale, softcap)
    return float(logit_scale), float(softcap or 0)


def checked_head(weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> LinearHead:
    """Its scale and softcap are taken out of the options."""
    validation.check_float_tensor("weight", weight)
    return LinearHead(weight, bias, *checked_scale_and_softcap(options))


def checked_head_and_budget(
    weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> tuple[LinearHead, Budget, dict[str, Any]]:
    """And the options that are left: those of rows."""
    head = checked_head(weight, bias, options)
    of_budget = {name: options.pop(name) for name in BUDGET_OPTIONS if name in options}
    return head, Budget(**of_budget), options


def rows_of_logits(
    logits: Tensor, labels: Tensor, options: RowOptions | TokenOptions | dict[str, Any]
) -> tuple[Tensor, Rows]:
    """The rank's own logits, and their rows: what every function of logits does first."""
    logits, vocab_shard = dtensor.local_logits(logits, options.get("vocab_shard"))
    labels, given = _unwrapped(labels, options)
    num_columns = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 0
    of_head = checked_scale_and_softcap(given)
    rows = Rows.of("logits", logits, num_columns, labels, {**given, "vocab_shard": vocab_shard})
    return reference.capped_logits(logits, *of_head), rows


def rows_of_hidden(
    hidden: Tensor, head: LinearHead, labels: Tensor, options: RowOptions | dict[str, Any]
) -> tuple[Tensor, LinearHead, Rows]:
    """The rank's own hidden states and head, under autocast in its dtype, and their rows."""
    validation.check_float_tensor("hidden", hidden)
    hidden, weight, bias, vocab_shard = dtensor.local_head(hidden, head.weight, head.bias, options.get("vocab_shard"))
    hidden, head = _autocast(hidden), head._replace(weight=weight, bias=bias)
    validation.check_head(hidden, weight, bias)
    labels, given = _unwrapped(labels, options)
    like = hidden if vocab_shard is None else vocab_parallel.like_whole_hidden(hidden, vocab_shard)
    rows = Rows.of("hidden", like, head.num_columns, labels, {**given, "vocab_shard": vocab_shard})
    return hidden, head, rows


def _unwrapped(labels: Tensor, options: Mapping[str, object]) -> tuple[Tensor, dict[str, Any]]:
    given: dict[str, Any] = {**options}
    names = [name for name in ("cu_seqlens", "token_weights") if given.get(name) is not None]
    labels, *plain = dtensor.unwrapped(labels=labels, **{name: given[name] for name in names})
    return labels, {**given, **dict(zip(names, plain, strict=True))}


def _autocast(hidden: Tensor) -> Tensor:
    """As torch.nn.functional.linear would cast it; the weight is cast where the products are made."""
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(device_type))
