"""Group statistics of the whole batch from those of each data-parallel rank."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_kernels import validation


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


def shares_ranks(data_parallel: dist.ProcessGroup | None, other: dist.ProcessGroup) -> bool:
    """True where more than one rank of ``other`` is a data-parallel rank as well."""
    ranks = dist.get_process_group_ranks(dist.group.WORLD if data_parallel is None else data_parallel)
    return len(set(ranks) & set(dist.get_process_group_ranks(other))) > 1


def check_made_alike(made_with: dict[str, Any], process_group: dist.ProcessGroup | None, device: torch.device) -> None:
    """A collective of 8 bytes a rank.

    Args:
        made_with: options by name, as `GroupWeights` has them.

    Raises:
        RuntimeError: on every rank, where they are not the same on all; names the options that differ.
    """
    own = torch.tensor([zlib.crc32(repr(made_with).encode())], device=device)
    everyones = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyones, own, group=process_group)
    if all(torch.equal(own, other) for other in everyones):
        return
    options: list[Any] = [None] * len(everyones)
    dist.all_gather_object(options, made_with, group=process_group)
    rank = next(rank for rank, other in enumerate(options) if other != options[0])
    differ = [name for name in options[0] if options[0][name] != options[rank][name]]
    each = (" ".join(f"{name}={options[r][name]!s:.200}" for name in differ) for r in (0, rank))
    raise RuntimeError(
        f"GroupWeights must have the same groups and options on all ranks, got {next(each)} on rank 0 and {next(each)} "
        f"on rank {rank}: sizes are of the whole training set, not of a rank's part"
    )


def sum_over_ranks(
    group_loss_sums: Tensor, group_counts: Tensor, process_group: dist.ProcessGroup | None, clock: Tensor
) -> tuple[Tensor, Tensor]:
    """(K,) sums and counts of all ranks, the same on each to the bit, by one all-reduce of 2K + 2 float64.

    A NaN or inf of one rank's sums is in every rank's result, so that all of them skip the update alike.

    Args:
        clock: (3,) int64, (updates over all ranks so far, forwards since the last step, 1 in `GroupWeights.step`), the
            same on ranks that are at the same step.

    Raises:
        RuntimeError: ranks are at different steps. (On a GPU, and compiled, the sums are NaN instead: telling takes a
            host synchronisation, which GRPO_KERNELS_DEBUG=1 allows.)
    """
    updates, forwards, in_step = clock.unbind()
    # Below 2**16, so that the sum of squares is exact: n sum t^2 = (sum t)^2 where all are alike, and only there.
    time = (updates % 256) * 256 + torch.where(in_step > 0, 255, forwards % 255)
    times = torch.stack([time, time * time]).double()
    packed = torch.cat([group_loss_sums.double(), group_counts.double(), times])
    dist.all_reduce(packed, group=process_group)
    sums, counts = packed[:-2].chunk(2)
    time_sum, square_sum = packed[-2:].long().unbind()
    alike = dist.get_world_size(process_group) * square_sum == time_sum * time_sum
    readable = packed.device.type == "cpu" and not torch.compiler.is_compiling()
    if (readable or validation.debug_checks_on()) and not bool(alike):
        raise RuntimeError(_at_different_steps(clock, process_group))
    return torch.where(alike, sums, torch.nan), counts.to(group_counts.dtype)


def _at_different_steps(clock: Tensor, process_group: dist.ProcessGroup | None) -> str:
    """All ranks come here together: each has the same sums of clocks."""
    clocks = [torch.empty_like(clock) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(clocks, clock, group=process_group)
    first: dict[tuple[int, ...], int] = {}
    for rank, other in enumerate(clocks):
        first.setdefault(tuple(other.tolist()), rank)
    places = [
        f"rank {rank} after {updates} updates, in {'step()' if in_step else f'forward {forwards + 1} since the last'}"
        for (updates, forwards, in_step), rank in first.items()
    ]
    return (
        f"all ranks must be at the same step of alpha, got {'; '.join(places)}. Each rank must call step() and "
        "training forwards equally often (forwards with total_pairs communicate nothing, and may be of any number), "
        "update alpha with sum_over_ranks, and load the same checkpoint"
    )


class SharedGroup:
    """Holds a process group, which can be neither copied nor pickled: copies share it, and a pickle drops it."""

    def __init__(self, value: dist.ProcessGroup | None) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedGroup, (None,)
