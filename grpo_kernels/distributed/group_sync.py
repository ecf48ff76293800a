"""Group statistics of the whole batch from those of each data-parallel rank."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def data_parallel_size(process_group: dist.ProcessGroup | None) -> int:
    """Ranks whose pairs make one batch: those of the group, or all where torch.distributed is initialised."""
    if not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size(process_group)


def name_of(process_group: dist.ProcessGroup | None) -> str:
    """What an operator's schema can carry in place of the group."""
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None  # only asked for where torch.distributed is initialised
    return group.group_name


def of_name(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def is_pipeline_inference() -> bool:
    """True when torch's pipeline calls the loss once more before the first step, only to learn shapes of gradients.

    It does so with real tensors and gradients on; its function's name on the stack is the only sign.
    """
    if "torch.distributed.pipelining.stage" not in sys.modules:
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_backward_metadata_inference":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


@dataclass
class PendingSum:
    """An all-reduce that is under way."""

    packed: Tensor
    work: dist.Work
    count_dtype: torch.dtype

    def wait(self) -> tuple[Tensor, Tensor]:
        self.work.wait()
        return _unpacked(self.packed, self.count_dtype)


def begin_sum_over_ranks(
    group_loss_sums: Tensor, group_counts: Tensor, process_group: dist.ProcessGroup | None
) -> PendingSum:
    packed = _packed(group_loss_sums, group_counts)
    work = dist.all_reduce(packed, group=process_group, async_op=True)
    return PendingSum(packed, work, group_counts.dtype)


def sum_over_ranks(
    group_loss_sums: Tensor, group_counts: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(K,) sums and counts of all ranks, the same on each to the bit, by one all-reduce of 2K float64.

    A NaN or inf of one rank's sums is in every rank's result, so that all of them skip the update alike.
    """
    packed = _packed(group_loss_sums, group_counts)
    dist.all_reduce(packed, group=process_group)  # torch.compile cannot trace begin_sum_over_ranks
    return _unpacked(packed, group_counts.dtype)


def _packed(group_loss_sums: Tensor, group_counts: Tensor) -> Tensor:
    return torch.cat([group_loss_sums.double(), group_counts.double()])


def _unpacked(packed: Tensor, count_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    sums, counts = packed.chunk(2)
    return sums, counts.to(count_dtype)


class SharedGroup:
    """Holds a process group, which can be neither copied nor pickled: copies share it, and a pickle drops it."""

    def __init__(self, value: dist.ProcessGroup | None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedGroup, (None,)
