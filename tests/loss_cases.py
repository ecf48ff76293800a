"""One batch of four pairs in three groups, and the loss of it: what the tests of the losses share."""

from __future__ import annotations

import torch
from conftest import batch

import grpo_kernels as gk

SIZES = [60, 35, 5]


def ids() -> torch.Tensor:
    """Groups of four pairs, on the default device."""
    return torch.tensor([1, 0, 2, 1])


def make(backend: str = "auto", **options) -> gk.GroupRobustLoss:
    weight_options = {name: options.pop(name) for name in ("estimator", "update", "step_size") if name in options}
    weights = gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.3, **weight_options})
    return gk.GroupRobustLoss(weights, **{"beta": 0.1, "backend": backend, **options})


def inputs(dtype: torch.dtype = torch.float64):
    logits, labels = batch(num_pairs=4, dtype=dtype)
    return logits, labels, torch.randn(8, dtype=torch.float64).mul(3).to(torch.float64)
