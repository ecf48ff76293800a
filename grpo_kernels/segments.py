"""Sums over segments (sequences of packed rows, groups of pairs) that come out the same from run to run."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(values: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """(num_segments,) float64 sums of ``values`` (N,) by ``segment_ids`` (N,), differentiable.

    index_add is serial on the CPU; on a GPU it adds atomically in any order, so there the sorted index_put is used.
    """
    sums = torch.zeros(num_segments, dtype=torch.float64, device=values.device)
    if values.device.type == "cpu":
        return sums.index_add(0, segment_ids, values.double())
    return sums.index_put((segment_ids.long(),), values.double(), accumulate=True)


def packed_sequence_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) int64: the sequence of each packed row; always in [0, S), whatever cu_seqlens holds."""
    rows = torch.arange(num_rows, device=cu_seqlens.device)
    ids = torch.searchsorted(cu_seqlens[1:].to(torch.int64).contiguous(), rows, right=True)
    return ids.clamp(max=cu_seqlens.shape[0] - 2)
