"""torch.library operators over the backends: schemas, fakes for tracing, and lazy launchers.

They are what torch.compile sees: opaque calls with known output shapes. ``backend`` is a name that dispatch selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels import dispatch
from grpo_kernels.kernels import linear

_LIBRARY = torch.library.Library("grpo_kernels", "DEF")
_SCHEMAS = (
    "token_logps(Tensor logits, Tensor labels, int ignore_index, str backend) -> (Tensor, Tensor)",
    "token_logps_backward(Tensor dtoken_logps, Tensor logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> Tensor",
    "token_logps_backward_(Tensor dtoken_logps, Tensor(a!) logits, Tensor labels, Tensor lse, int ignore_index, "
    "str backend) -> ()",
    "linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, str backend) "
    "-> (Tensor, Tensor)",
    "linear_token_logps_backward(Tensor dtoken_logps, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor lse, int ignore_index, bool[3] needs_grad, str backend) -> (Tensor, Tensor, Tensor)",
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
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    return linear.linear_token_logps_forward(dispatch.kernels_of(backend), hidden, weight, bias, labels, ignore_index)


def _linear_token_logps_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _token_logps_fake(hidden, labels, ignore_index, backend)


def _linear_token_logps_backward(
    dtoken_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_grad: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    grads = linear.linear_token_logps_backward(
        dispatch.kernels_of(backend), dtoken_logps, hidden, weight, bias, labels, lse, ignore_index, needs_grad
    )
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
    backend: str,
) -> tuple[Tensor, ...]:
    shapes = (hidden, weight, weight[:, 0])
    return tuple(
        torch.empty_like(x) if need else hidden.new_empty(0) for x, need in zip(shapes, needs_grad, strict=True)
    )


_OPERATORS = (
    ("token_logps", _token_logps, _token_logps_fake),
    ("token_logps_backward", _token_logps_backward, _token_logps_backward_fake),
    ("token_logps_backward_", _token_logps_backward_inplace, _token_logps_backward_inplace_fake),
    ("linear_token_logps", _linear_token_logps, _linear_token_logps_fake),
    ("linear_token_logps_backward", _linear_token_logps_backward, _linear_token_logps_backward_fake),
)

for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
for _name, _launcher, _fake in _OPERATORS:
    _LIBRARY.impl(_name, _launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"grpo_kernels::{_name}", _fake, lib=_LIBRARY)
