"""Backwards that can be taken once, and say so when they are differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """PyTorch's `once_differentiable` raises only where the incoming gradient is differentiated. What the backward has
    saved is not traced either, and a penalty on a gradient, or a Hessian, would silently be zero: this raises there.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx: Any, *upstream: Tensor | None) -> Gradients:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the usual, without create_graph=True
            return once(ctx, *upstream)
        sources = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
        with torch.no_grad():
            grads = backward(ctx, *upstream)
        return tuple(None if grad is None else _Gradient.apply(grad, *sources) for grad in grads)

    return checked


class _Gradient(torch.autograd.Function):
    """A gradient that depends on ``sources``, in a way that nobody can differentiate."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Gradients:
        raise RuntimeError(
            "the losses of grpo_kernels are differentiable once: a second derivative (a penalty on a gradient, a "
            "Hessian) needs the loss in plain PyTorch, such as the functions of grpo_kernels.reference"
        )
