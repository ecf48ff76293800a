"""Token log-probabilities: one row of logits a program forward, one tile of a row a program backward.

    token_logp = logit[label] - max - log_sum        log_sum = log(sum_v exp(logit_v - max))
    dlogit_v = dtoken_logp * (1{v = label} - exp(logit_v - max - log_sum))

Traffic: the forward reads V, the backward reads V and writes V; an ignored row is not read, only its gradient written.

Each lane of 16 bytes keeps a running maximum and sum of its own columns, so that no step of the loop waits for other
threads. Lanes, and the splits of a row, are merged at the end in a fixed order.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.kernels.triton.tiles import row_splits, tile_for

# The running maximum starts at a finite number: at a masked logit, -inf minus -inf would be NaN.
LOWEST = tl.constexpr(-3.0e38)
MERGED_ROWS = 128
BYTES_A_LOAD = 16


@triton.jit
def row_offset(row, T, stride_s, stride_t):
    """Element offset of row number ``row`` (int64: rows * V passes 2**31)."""
    return (row // T) * stride_s + (row % T) * stride_t


@triton.jit
def _absorb(running_max, running_sum, x):
    """The online log-sum-exp of each lane: (lanes,) statistics, x (lanes, E)."""
    peak = tl.maximum(running_max, tl.max(x, 1))
    running_sum = running_sum * tl.exp(running_max - peak) + tl.sum(tl.exp(x - peak[:, None]), 1)
    return peak, running_sum


@triton.jit
def scan_row(
    logits_ptr,
    start,
    split,
    V,
    stride_v,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,  # elements in 16 bytes where rows may start off that boundary, else 1
    ACC: tl.constexpr,
):
    """(maximum, sum of exp(logit - maximum)) of one split of the row that begins at element ``start``."""
    # Tiles begin at the 16-byte boundary at or before the row, so that loads are 16 bytes wide in every row.
    shift = (start % ALIGN).to(tl.int32)
    base = logits_ptr + tl.multiple_of(start - shift, ALIGN)
    end = V + shift
    LANE: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth  # one 16-byte load of a thread
    LANES: tl.constexpr = BLOCK // LANE
    column = tl.arange(0, LANES)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    running_max = tl.full((LANES,), LOWEST, ACC)
    running_sum = tl.zeros((LANES,), ACC)

    tiles = tl.cdiv(end, BLOCK)
    tiles_a_split = tl.cdiv(tiles, SPLITS)
    first = split * tiles_a_split
    last = tl.minimum(first + tiles_a_split, tiles)
    complete = end // BLOCK  # tiles before this one end inside the row
    if ALIGN > 1:
        if first == 0:  # the tile that may begin before the row
            mask = (column >= shift) & (column < end)
            x = tl.load(base + column * stride_v, mask, other=-float("inf")).to(ACC)
            running_max, running_sum = _absorb(running_max, running_sum, x)
        first = tl.maximum(first, 1)
    for tile in range(first, tl.minimum(last, complete)):
        x = tl.load(base + (tile * BLOCK + column) * stride_v).to(ACC)
        running_max, running_sum = _absorb(running_max, running_sum, x)
    if (last > complete) & (complete >= first):  # the tile that ends behind the row
        mask = complete * BLOCK + column < end
        x = tl.load(base + (complete * BLOCK + column) * stride_v, mask, other=-float("inf")).to(ACC)
        running_max, running_sum = _absorb(running_max, running_sum, x)

    row_max = tl.max(running_max, 0)
    return row_max, tl.sum(running_sum * tl.exp(running_max - row_max), 0)


@triton.jit
def store_row(
    logits_ptr, token_logps_ptr, lse_ptr, row, start, stride_v, V, label, row_max, row_sum, ACC: tl.constexpr
):
    """What a counted row leaves behind; NaN where its label is outside the vocabulary."""
    known = (label >= 0) & (label < V)
    label_logit = tl.load(logits_ptr + start + label.to(tl.int64) * stride_v, known, other=float("nan")).to(ACC)
    log_sum = tl.where(known, tl.log(row_sum), float("nan"))
    tl.store(token_logps_ptr + row, label_logit - row_max - log_sum)
    tl.store(lse_ptr + 2 * row, row_max)
    tl.store(lse_ptr + 2 * row + 1, log_sum)


@triton.jit
def store_ignored_row(token_logps_ptr, lse_ptr, row):
    tl.store(token_logps_ptr + row, 0.0)
    tl.store(lse_ptr + 2 * row, 0.0)
    tl.store(lse_ptr + 2 * row + 1, 0.0)


@triton.jit
def store_partial(partial_ptr, num_rows, row, split, row_max, row_sum, SPLITS: tl.constexpr):
    tl.store(partial_ptr + row * SPLITS + split, row_max)
    tl.store(partial_ptr + (num_rows.to(tl.int64) + row) * SPLITS + split, row_sum)


@triton.jit
def merge_rows(
    logits_ptr,
    labels_ptr,
    token_logps_ptr,
    lse_ptr,
    partial_ptr,  # (2, rows, SPLITS)
    rows,
    inside,
    num_rows,
    T,
    V,
    stride_s,
    stride_t,
    stride_v,
    ignore_index,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Merge the splits of a block of rows, always in the same order, and store them; returns their token_logps."""
    label = tl.load(labels_ptr + rows, inside, other=0)
    counted = inside & (label != ignore_index)
    row_max = tl.full(rows.shape, LOWEST, ACC)
    row_sum = tl.zeros(rows.shape, ACC)
    for split in range(SPLITS):
        part_max = tl.load(partial_ptr + rows * SPLITS + split, counted, other=LOWEST, cache_modifier=".cg")
        part_sum = tl.load(
            partial_ptr + (num_rows.to(tl.int64) + rows) * SPLITS + split, counted, other=0.0, cache_modifier=".cg"
        )
        larger = tl.maximum(row_max, part_max)
        row_sum = row_sum * tl.exp(row_max - larger) + part_sum * tl.exp(part_max - larger)
        row_max = larger
    known = counted & (label >= 0) & (label < V)
    offset = row_offset(rows, T, stride_s, stride_t) + label.to(tl.int64) * stride_v
    label_logit = tl.load(logits_ptr + offset, known, other=float("nan")).to(ACC)
    log_sum = tl.where(known, tl.log(row_sum), float("nan"))
    token_logps = tl.where(counted, label_logit - row_max - log_sum, 0.0)
    tl.store(token_logps_ptr + rows, token_logps, inside)
    tl.store(lse_ptr + 2 * rows, tl.where(counted, row_max, 0.0), inside)
    tl.store(lse_ptr + 2 * rows + 1, tl.where(counted, log_sum, 0.0), inside)
    return token_logps


@triton.jit(do_not_specialize=["num_rows", "T"])
def _logps_fwd_kernel(
    logits_ptr,  # (S, T, V), or (rows, V) for packed rows, by its strides
    labels_ptr,  # (rows,)
    token_logps_ptr,  # (rows,)
    lse_ptr,  # (rows, 2)
    partial_ptr,  # (2, rows, SPLITS), or anything when SPLITS is 1
    num_rows,
    T,
    V,
    stride_s,
    stride_t,
    stride_v,
    ignore_index,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if split == 0:
            store_ignored_row(token_logps_ptr, lse_ptr, row)
        return
    start = row_offset(row, T, stride_s, stride_t)
    row_max, row_sum = scan_row(logits_ptr, start, split, V, stride_v, BLOCK, SPLITS, ALIGN, ACC)
    if SPLITS == 1:
        store_row(logits_ptr, token_logps_ptr, lse_ptr, row, start, stride_v, V, label, row_max, row_sum, ACC)
    else:
        store_partial(partial_ptr, num_rows, row, split, row_max, row_sum, SPLITS)


@triton.jit(do_not_specialize=["num_rows", "T"])
def _merge_splits_kernel(
    logits_ptr,
    labels_ptr,
    token_logps_ptr,
    lse_ptr,
    partial_ptr,
    num_rows,
    T,
    V,
    stride_s,
    stride_t,
    stride_v,
    ignore_index,
    MERGED_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    merge_rows(
        logits_ptr, labels_ptr, token_logps_ptr, lse_ptr, partial_ptr, rows, rows < num_rows, num_rows, T, V,
        stride_s, stride_t, stride_v, ignore_index, SPLITS, ACC,
    )  # fmt: skip


@triton.jit
def _store_gradient_tile(
    x_ptr, out_ptr, cols, mask, stride_v, out_stride_v, label_col, row_max, log_sum, scale, MASKED: tl.constexpr
):
    ACC: tl.constexpr = row_max.dtype
    if MASKED:
        x = tl.load(x_ptr + cols * stride_v, mask, other=-float("inf")).to(ACC)
    else:
        x = tl.load(x_ptr + cols * stride_v).to(ACC)
    gradient = scale * (tl.where(cols == label_col, 1.0, 0.0) - tl.exp(x - row_max - log_sum))
    gradient = gradient.to(out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + cols * out_stride_v, gradient, mask)
    else:
        tl.store(out_ptr + cols * out_stride_v, gradient)


@triton.jit(do_not_specialize=["T"])
def _logps_bwd_kernel(
    scale_ptr,  # (S, T) by its strides; (S,) when PACKED
    factor_ptr,  # 0-d, times every scale; or anything when HAS_FACTOR is false
    row_sequence_ptr,  # (rows,) when PACKED: the first index of a row's scale
    logits_ptr,
    labels_ptr,
    lse_ptr,  # (rows, 2)
    out_ptr,  # may be logits_ptr
    T,
    V,
    scale_stride_s,
    scale_stride_t,
    stride_s,
    stride_t,
    stride_v,
    out_stride_s,
    out_stride_t,
    out_stride_v,
    ignore_index,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,  # as in the forward, for logits and out alike
    HAS_FACTOR: tl.constexpr,
    PACKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    label = tl.load(labels_ptr + row)
    start = row_offset(row, T, stride_s, stride_t)
    out_start = row_offset(row, T, out_stride_s, out_stride_t)
    shift = (start % ALIGN).to(tl.int32)
    x_ptr = logits_ptr + tl.multiple_of(start - shift, ALIGN)
    o_ptr = out_ptr + tl.multiple_of(out_start - shift, ALIGN)
    cols = tile * BLOCK + tl.arange(0, BLOCK)
    end = V + shift
    whole = tile * BLOCK + BLOCK <= end
    if ALIGN > 1:
        whole = whole & (tile > 0)
    mask = (cols >= shift) & (cols < end)
    if label == ignore_index:
        tl.store(o_ptr + cols * out_stride_v, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask)
        return
    row_max = tl.load(lse_ptr + 2 * row)
    log_sum = tl.load(lse_ptr + 2 * row + 1)
    if PACKED:
        scale_offset = tl.load(row_sequence_ptr + row).to(tl.int64) * scale_stride_s
    else:
        scale_offset = row_offset(row, T, scale_stride_s, scale_stride_t)
    scale = tl.load(scale_ptr + scale_offset).to(row_max.dtype)
    if HAS_FACTOR:
        scale *= tl.load(factor_ptr).to(row_max.dtype)
    label_col = label.to(tl.int64) + shift
    if whole:
        _store_gradient_tile(
            x_ptr, o_ptr, cols, mask, stride_v, out_stride_v, label_col, row_max, log_sum, scale, MASKED=False
        )
    else:
        _store_gradient_tile(
            x_ptr, o_ptr, cols, mask, stride_v, out_stride_v, label_col, row_max, log_sum, scale, MASKED=True
        )


def token_logps_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """The contract's function. ``splits``: programs a row, by the table where None."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    token_logps = torch.empty(labels.shape, dtype=acc, device=logits.device)
    lse = torch.empty(*labels.shape, 2, dtype=acc, device=logits.device)
    num_rows, vocab_size = labels.numel(), logits.shape[-1]
    if num_rows == 0:
        return token_logps, lse
    tile = tile_for("forward", logits.itemsize, vocab_size)
    if splits is None:
        splits = row_splits(num_rows, vocab_size, tile.block, multiprocessors(logits.device))
    partial = torch.empty(2 * num_rows * splits, dtype=acc, device=logits.device) if splits > 1 else lse
    shape = (num_rows, positions(logits), vocab_size, *strides_of(logits), ignore_index)
    arguments = (logits, labels.contiguous(), token_logps, lse, partial, *shape)
    acc_type = tl.float64 if acc == torch.float64 else tl.float32
    with device_of(logits):
        _logps_fwd_kernel[(num_rows, splits)](
            *arguments,
            BLOCK=tile.block,
            SPLITS=splits,
            ALIGN=alignment(logits),
            ACC=acc_type,
            num_warps=tile.num_warps,
        )
        if splits > 1:
            _merge_splits_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
                *arguments, MERGED_ROWS=MERGED_ROWS, SPLITS=splits, ACC=acc_type, num_warps=4
            )
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    out: Tensor,
    factor: Tensor | None = None,
    row_sequence: Tensor | None = None,
) -> None:
    """The contract's function.

    ``factor`` (0-d) multiplies every dtoken_logps. With ``row_sequence`` (rows,), dtoken_logps is (S,), one for each
    sequence of packed rows.
    """
    num_rows, vocab_size = labels.numel(), logits.shape[-1]
    if num_rows == 0:
        return
    tile = tile_for("backward", logits.itemsize, vocab_size)
    align = max(alignment(logits), alignment(out))
    if strides_of(logits) != strides_of(out) and align > 1:
        align = 1  # rows of the two would begin at different distances from a boundary
    columns = vocab_size + align - 1
    scale_strides = (dtoken_logps.stride(0), 0) if row_sequence is not None else row_strides_of(dtoken_logps)
    with device_of(logits):
        _logps_bwd_kernel[(num_rows, triton.cdiv(columns, tile.block))](
            dtoken_logps,
            dtoken_logps if factor is None else factor,
            labels if row_sequence is None else row_sequence,
            logits,
            labels.contiguous(),
            lse,
            out,
            positions(logits),
            vocab_size,
            *scale_strides,
            *strides_of(logits),
            *strides_of(out),
            ignore_index,
            BLOCK=tile.block,
            ALIGN=align,
            HAS_FACTOR=factor is not None,
            PACKED=row_sequence is not None,
            num_warps=tile.num_warps,
        )


def positions(logits: Tensor) -> int:
    """T: row number r is position r % T of sequence r // T. Packed rows are one sequence."""
    return logits.shape[-2]


def strides_of(logits: Tensor) -> tuple[int, int, int]:
    """(sequence, position, vocabulary) strides in elements."""
    return (0, *logits.stride()) if logits.dim() == 2 else logits.stride()  # type: ignore[return-value]


def row_strides_of(values: Tensor) -> tuple[int, int]:
    """(sequence, position) strides of a tensor with one number a row; 0 where it was expanded."""
    return (0, *values.stride()) if values.dim() == 1 else values.stride()  # type: ignore[return-value]


def alignment(logits: Tensor) -> int:
    """Elements in 16 bytes if rows may begin off such a boundary; 1 if none does, or if columns are not neighbours."""
    stride_s, stride_t, stride_v = strides_of(logits)
    elements = BYTES_A_LOAD // logits.itemsize
    aligned = stride_s % elements == 0 and stride_t % elements == 0
    return 1 if aligned or stride_v != 1 else elements


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
