"""Logits with elements more than 2**32 apart, in memory that is hardly touched: offsets have 64 bits.

Those of the GPU kernels' machine code are in test_ptx.py.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest
import torch
from conftest import one_rounding
from torch import Tensor

import grpo_kernels as gk

APART = 2**32 + 24
LAYOUTS = {  # shape, strides, cu_seqlens
    "rows": ((2, 5, 21), (APART // 2 + 21, APART // 8, 1), None),
    "packed": ((5, 21), (APART // 4, 1), [0, 2, 5]),
    "vocabulary": ((2, 3, 5), (3, 1, APART // 4), None),
}


def loss(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, **options) -> Tensor:
    weights = gk.GroupWeights(group_sizes=[60, 40], step_size=0.3)
    loss_fn = gk.GroupRobustLoss(weights, reference_free=True, **options)
    return loss_fn(logits, labels, torch.tensor([1]), cu_seqlens=cu_seqlens).loss


def logps(logits: Tensor, labels: Tensor, cu_seqlens: Tensor | None, **options) -> Tensor:
    return gk.sequence_logps(logits, labels, cu_seqlens=cu_seqlens, **options)


@pytest.mark.interpreted(inplace=True)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [loss, logps])
def test_values_and_gradients(backend: str, function: Callable, layout: str, inplace: bool) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("a GPU's memory is there before it is touched")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shape, strides, ends = LAYOUTS[layout]
    dense = (3 * torch.randn(shape)).half()
    try:
        storage = torch.empty(APART + 42, dtype=dense.dtype)
    except RuntimeError:
        pytest.skip("the system lends no 8 GiB of addresses")
    logits = storage.as_strided(shape, strides).copy_(dense)
    labels = torch.arange(dense[..., 0].numel()).reshape(shape[:-1]) % shape[-1]
    labels.view(-1)[-1] = shape[-1] - 1  # the farthest element
    cu_seqlens = None if ends is None else torch.tensor(ends)

    exact_of, got_of = dense.double().requires_grad_(), logits.requires_grad_()
    exact = function(exact_of, labels, cu_seqlens, backend="reference")
    (exact_gradient,) = torch.autograd.grad(exact.sum(), exact_of)
    got = function(got_of, labels, cu_seqlens, backend=backend, inplace_backward=inplace)
    (gradient,) = torch.autograd.grad(got.sum(), got_of)

    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)
    rounding = 2 * one_rounding(dense.dtype, backend) * exact_gradient.abs().max()
    assert (gradient.double() - exact_gradient).abs().max() <= rounding
    assert (gradient.data_ptr() == logits.data_ptr()) == (inplace and backend != "reference")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"{grown} KiB of memory were touched"
