"""Backwards that can be taken once, and say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """PyTorch's `once_differentiable` that also raises where the incoming gradient is a constant.

    A second derivative would be zero without any error there: what the backward reads was saved, and is not traced.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> Gradients:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # no create_graph=True; AOTAutograd raises
            return once(ctx, *upstream)
        # Gradients of a tensor that requires grad get PyTorch's own node, which raises when it is differentiated.
        return once(ctx, *(x if x is None or x.requires_grad else x.detach().requires_grad_() for x in upstream))

    return checked
