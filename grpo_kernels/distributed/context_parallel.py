"""Sums per sequence over ranks that each have some of its positions (context or sequence parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks, the same on each; its gradient goes back unchanged.

    Every rank computes the same loss from the sum, so each rank's own gradient is whole: an all-reduce in the backward
    would count it once for each rank.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, process_group: dist.ProcessGroup) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total, group=process_group)
        return total

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor, None]:
        return dtotal, None
