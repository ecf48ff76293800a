"""The `cuda` backend: csrc/cuda, bound as grpo_kernels._C.cuda, on the logits' device and PyTorch's current stream.

The launches are those of kernels/triton: one forward and one backward, reading V, then reading V and writing V. What a
launch needs of memory is allocated here; nothing synchronises, so that CUDA graphs can capture it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels.group_robust import (
    FUSED_GROUPS,
    SUMS,
    GroupRobustTables,
    GroupState,
    Upstream,
    finish_many_groups,
    new_tables,
    upstream_of,
)
from grpo_kernels.kernels.rows import DTYPE_NAMES, accumulation_dtype, new_token_outputs, row_strides_of, strides_of

try:
    from grpo_kernels._C import cuda as _built  # type: ignore[attr-defined, unused-ignore]
except ImportError:
    _built = None  # tests run these functions over the simulated kernels

launches: Any = _built
"""What launches the kernels; tests put the simulated ones here."""

# Rows, or parts of rows, for each multiprocessor, which has four at a time: with fewer, rows are split, because the
# last of them would leave most multiprocessors idle. Not measured yet.
BLOCKS_PER_MULTIPROCESSOR = 16
MAX_SPLITS = 32
BYTES_A_SPLIT = 1 << 15  # a shorter split costs more than it brings
NOTHING = (0, 0)


def token_logps_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """The contract's function. ``splits``: blocks a row, by the rule above where None."""
    token_logps, lse = new_token_outputs(logits, labels)
    splits = splits or row_splits(logits, labels.numel())
    partial = _partial(lse, labels.numel(), splits)
    labels = labels.contiguous()
    launches.logps_forward(
        _place(logits),
        _dtype(logits),
        _sizes(logits, labels, splits, ignore_index),
        _matrix(logits),
        _vector(labels),
        (token_logps.data_ptr(), lse.data_ptr(), partial.data_ptr()),
    )
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Upstream, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    """The contract's function, of `FusedKernelBackend`."""
    dtoken_logps, factor, row_sequence = upstream_of(dtoken_logps)
    acc = accumulation_dtype(logits)
    for name, tensor, wanted, dtype in (
        ("dtoken_logps", dtoken_logps, labels.shape if row_sequence is None else dtoken_logps.shape, acc),
        ("lse", lse, (*labels.shape, 2), acc),
        ("out", out, logits.shape, logits.dtype),
    ):
        if tensor.shape != wanted or tensor.dtype != dtype or tensor.device != logits.device:
            raise ValueError(
                f"{name} must be {tuple(wanted)} {dtype} on {logits.device}, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    of_rows = (dtoken_logps.stride(0), 0) if row_sequence is not None else row_strides_of(dtoken_logps)
    labels, lse = labels.contiguous(), lse.contiguous()
    launches.logps_backward(
        _place(logits),
        _dtype(logits),
        _sizes(logits, labels, 1, ignore_index),
        _matrix(logits),
        _vector(labels),
        lse.data_ptr(),
        (dtoken_logps.data_ptr(), *of_rows),
        _vector(factor),
        0 if row_sequence is None else row_sequence.data_ptr(),
        _matrix(out),
    )


def group_robust_forward(
    logits: Tensor,
    rows: Rows,
    pairs: Pairs,
    groups: GroupState,
    whole_batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    splits: int | None = None,
) -> GroupRobustTables:
    """As in contract.py. ``splits``: blocks a row, by the rule above where None."""
    num_sequences, num_rows, num_groups = rows.num_sequences, rows.labels.numel(), groups.log_alpha.shape[0]
    device, acc = logits.device, accumulation_dtype(logits)
    splits = splits or row_splits(logits, num_rows)
    tables, logps, tickets = new_tables(logits, rows, num_groups)
    token_logps = torch.empty(num_rows, dtype=acc, device=device)
    partial = _partial(tables.lse, num_rows, splits)
    betas, beta = (pairs.beta, 0.0) if isinstance(pairs.beta, Tensor) else (None, pairs.beta)
    assert pairs.group_ids is not None  # a loss with groups has made them
    # Copies, where one is needed, must live until the last launch below.
    labels, ids = rows.labels.contiguous(), pairs.group_ids.contiguous()
    ends = None if rows.cu_seqlens is None else rows.cu_seqlens.contiguous()
    given = [_as_reals(x) for x in (pairs.ref_logps, betas, pairs.margin, pairs.weights)]
    in_tables = (tables.row_sequence, tickets, logps, *tables[1:3], tables.groups, tables.counts, tables.loss)
    state = (
        *(groups.log_alpha, groups.group_sizes),
        *(groups.pending_sums, groups.pending_counts, groups.skipped_updates),
    )
    of_alpha = (groups.step_size, groups.adjustment, groups.floor, groups.chi)
    arguments = (
        _place(logits),
        _dtype(logits),
        _sizes(logits, labels, splits, rows.ignore_index),
        _matrix(logits),
        _vector(labels),
        (token_logps.data_ptr(), tables.lse.data_ptr(), partial.data_ptr()),
        _vector(ends),
        (num_sequences, num_groups),
        tuple(x.data_ptr() for x in in_tables),
        _vector(ids),
        [_vector(x) for x in given],
        tuple(_vector(x)[0] for x in state),
        (beta, pairs.label_smoothing, *of_alpha, groups.gradient_scale),
        (pairs.loss_type, groups.estimator, groups.update),
        rows.average,
    )
    fits, alone = num_groups <= FUSED_GROUPS, whole_batch is None
    # Stages: rows, clear, pairs, alpha.
    launches.group_robust_forward(*arguments, (num_rows > 0, fits, True, fits and alone))
    if whole_batch is not None:
        sums, counts = whole_batch(tables.groups[SUMS], tables.counts)
        tables.groups[SUMS].copy_(sums)
        tables.counts.copy_(counts)
    if not fits:
        finish_many_groups(tables, ids, groups)
    elif not alone:
        launches.group_robust_forward(*arguments, (False, False, False, True))
    return tables


def row_splits(logits: Tensor, num_rows: int) -> int:
    """Blocks a row."""
    wanted = -(-BLOCKS_PER_MULTIPROCESSOR * _multiprocessors(logits.device) // max(1, num_rows))
    useful = -(-logits.shape[-1] * logits.itemsize // BYTES_A_SPLIT)
    return max(1, min(wanted, useful, MAX_SPLITS))


def _partial(like: Tensor, num_rows: int, splits: int) -> Tensor:
    """(2, rows, splits) where rows are split; otherwise nothing reads it."""
    return like.new_empty(2 * num_rows * splits) if splits > 1 else like


@functools.lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _place(logits: Tensor) -> tuple[int, int]:
    """(device, stream)"""
    if logits.device.type != "cuda":
        return (0, 0)  # the simulator
    return logits.get_device(), torch.cuda.current_stream(logits.device).cuda_stream


def _dtype(logits: Tensor) -> str:
    if logits.dtype not in DTYPE_NAMES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    return DTYPE_NAMES[logits.dtype]


def _sizes(logits: Tensor, labels: Tensor, splits: int, ignore_index: int) -> tuple[int, ...]:
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must have shape (S, T, V) or (N, V), got {tuple(logits.shape)}")
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        raise ValueError(
            f"labels must have shape {tuple(logits.shape[:-1])} on {logits.device}, "
            f"got {tuple(labels.shape)} on {labels.device}"
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    return labels.numel(), logits.shape[-2], logits.shape[-1], splits, ignore_index


def _matrix(logits: Tensor) -> tuple[int, ...]:
    """(address, sequence, position and vocabulary strides)"""
    return (logits.data_ptr(), *strides_of(logits))


def _vector(x: Tensor | None) -> tuple[int, int]:
    return NOTHING if x is None else (x.data_ptr(), x.itemsize)


def _as_reals(x: Tensor | None) -> Tensor | None:
    if x is None:
        return None
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous()
