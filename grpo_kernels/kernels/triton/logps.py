"""Token log-probabilities: one row of logits a program forward, one tile of a row a program backward.

    token_logp = logit[label] - max - log_sum        log_sum = log(sum_v exp(logit_v - max))
    dlogit_v = dtoken_logp * (1{v = label} - exp(logit_v - max - log_sum))

Traffic: the forward reads V, the backward reads V and writes V; an ignored row is not read, only its gradient written.

A row is read 16 bytes at a time, from the first 16-byte boundary in it to the last: its vectors. The elements before
and behind them, fewer than 16 bytes each, are its edges. Each thread keeps a running maximum and sum of its own
columns, so that no step of the loop waits for others. Threads, and the splits of a row, are merged at the end in a
fixed order.

exp(x) is exp2(x * LOG2E), which is the instruction that GPUs have. LOG2E multiplies differences only: at a logit of 1e4
its product would be rounded by 1e-3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.kernels.group_robust import Upstream, upstream_of
from grpo_kernels.kernels.rows import accumulation_dtype, new_token_outputs, row_strides_of, strides_of
from grpo_kernels.kernels.triton.launch import (
    aligned_origin,
    alike,
    device_of,
    layout,
    multiprocessors,
    positions,
    triton_dtype,
)
from grpo_kernels.kernels.triton.tiles import row_splits, tile_for

# The running maximum starts at a finite number: at a masked logit, -inf minus -inf would be NaN.
LOWEST = tl.constexpr(-2.0e38)
LOG2E = tl.constexpr(1.4426950408889634)
MERGED_ROWS = 128


@triton.jit
def row_offset(row, T, stride_s, stride_t):
    """Element offset (int64: rows * V passes 2**31) of row number ``row`` (below 2**31, as the grid is)."""
    row = row.to(tl.uint32)  # whose division is the shorter one
    sequence = row // T.to(tl.uint32)
    return sequence.to(tl.int64) * stride_s + (row - sequence * T.to(tl.uint32)).to(tl.int64) * stride_t


@triton.jit
def _element(column, stride_v, STRIDED: tl.constexpr):
    """Offset of a column. A strided vocabulary, such as that of a transposed (V, N), needs 64 bits."""
    if STRIDED:
        return column.to(tl.int64) * stride_v
    else:
        return column


@triton.jit
def _multiple(offset, LANE: tl.constexpr):
    """An offset that is a multiple of LANE, so that Triton sees it. (The hint tl.multiple_of is lost by inlining.)"""
    return (offset.to(tl.uint64) // LANE * LANE).to(tl.int64)


@triton.jit
def _vectors_of(x_ptr, start, V, EDGES: tl.constexpr, STRIDED: tl.constexpr):
    """(pointer to the first vector, columns before it if there are so many, vectors) of the row that begins there."""
    LANE: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth  # elements of a vector
    if STRIDED:  # its vectors are only so called
        return x_ptr + start, V * 0, (V.to(tl.uint32) // LANE).to(tl.int32)
    if not EDGES:
        return x_ptr + _multiple(start, LANE), V * 0, (V.to(tl.uint32) // LANE).to(tl.int32)
    head = ((LANE - start % LANE) % LANE).to(tl.int32)
    vectors = (tl.maximum(V - head, 0).to(tl.uint32) // LANE).to(tl.int32)
    return x_ptr + _multiple(start + head, LANE), head, vectors


@triton.jit
def _edge_columns(head, vectors, V, LANE: tl.constexpr, LANES: tl.constexpr):
    """(columns relative to the first vector, which of them are edges): one a thread, for the first threads."""
    e = tl.arange(0, LANES)
    column = tl.where(e < LANE, e - head, vectors * LANE + e - LANE)
    return column, ((e < head) & (e < V)) | ((e >= LANE) & (e < 2 * LANE) & (column < V - head))


@triton.jit
def _absorb(running_max, running_sum, x):
    """The online log-sum-exp of each thread: (threads,) statistics, x (loads, threads, LANE)."""
    peak = tl.maximum(running_max, tl.max(tl.max(x, 2), 0))
    terms = tl.exp2((x - peak[None, :, None]) * LOG2E)
    running_sum = running_sum * tl.exp2((running_max - peak) * LOG2E) + tl.sum(tl.sum(terms, 2), 0)
    return peak, running_sum


@triton.jit
def scan_row(
    logits_ptr,
    start,
    split,
    V,
    stride_v,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    SPLITS: tl.constexpr,
    EDGES: tl.constexpr,
    STRIDED: tl.constexpr,
    ACC: tl.constexpr,
):
    """(maximum, sum of exp(logit - maximum)) of one split of the row that begins at element ``start``."""
    LANE: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // LANE
    WIDTH: tl.constexpr = min(THREADS, LANES)
    base, head, vectors = _vectors_of(logits_ptr, start, V, EDGES, STRIDED)
    if EDGES:  # asked for first, needed last
        column, is_edge = _edge_columns(head, vectors, V, LANE, WIDTH)
        edge = tl.load(base + _element(column, stride_v, STRIDED), is_edge & (split == 0), other=-float("inf"))

    lane = tl.arange(0, LANES // WIDTH)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    column = lane * LANE + tl.arange(0, LANE)[None, None, :]
    running_max = tl.full((WIDTH,), LOWEST, ACC)
    running_sum = tl.zeros((WIDTH,), ACC)
    tiles = tl.cdiv(vectors, LANES)
    tiles_a_split = tl.cdiv(tiles, SPLITS)
    first = split * tiles_a_split
    last = tl.minimum(first + tiles_a_split, tiles)
    complete = vectors // LANES
    for tile in range(first, tl.minimum(last, complete)):
        x = tl.load(base + _element(tile * BLOCK + column, stride_v, STRIDED)).to(ACC)
        running_max, running_sum = _absorb(running_max, running_sum, x)
    if (last > complete) & (complete >= first):  # whole vectors, not of all threads
        inside = (complete * LANES + lane) < vectors
        x = tl.load(base + _element(complete * BLOCK + column, stride_v, STRIDED), inside, other=-float("inf")).to(ACC)
        running_max, running_sum = _absorb(running_max, running_sum, x)
    if EDGES:
        running_max, running_sum = _absorb(running_max, running_sum, edge.to(ACC)[None, :, None])

    row_max = tl.max(running_max, 0)
    scaled = running_sum * tl.exp2((running_max - row_max) * LOG2E)
    # abs changes no value. Without it the product is fused into the sum with another lane's, which gets other bits so,
    # and Triton 3.9 lets all lanes of a warp store theirs to one place.
    return row_max, tl.sum(tl.abs(scaled), 0)


@triton.jit
def label_of(logits_ptr, start, stride_v, V, label, ACC: tl.constexpr):
    """The label's logit; NaN where the label is outside the vocabulary."""
    known = (label >= 0) & (label < V)
    return tl.load(logits_ptr + start + label.to(tl.int64) * stride_v, known, other=float("nan")).to(ACC)


@triton.jit
def _row_result(label_logit, row_max, row_sum):
    """(token_logps, log_sum); NaN where label_logit is."""
    log_sum = tl.where(label_logit == label_logit, tl.log(row_sum), float("nan"))
    return label_logit - row_max - log_sum, log_sum


@triton.jit
def store_row(token_logps_ptr, lse_ptr, row, label_logit, row_max, row_sum):
    """What a counted row leaves behind."""
    token_logp, log_sum = _row_result(label_logit, row_max, row_sum)
    tl.store(token_logps_ptr + row, token_logp)
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
    skipped,
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
    offset = skipped + row_offset(rows, T, stride_s, stride_t) + label.to(tl.int64) * stride_v
    label_logit = tl.load(logits_ptr + offset, known, other=float("nan")).to(ACC)
    token_logps, log_sum = _row_result(label_logit, row_max, row_sum)
    token_logps = tl.where(counted, token_logps, 0.0)
    tl.store(token_logps_ptr + rows, token_logps, inside)
    tl.store(lse_ptr + 2 * rows, tl.where(counted, row_max, 0.0), inside)
    tl.store(lse_ptr + 2 * rows + 1, tl.where(counted, log_sum, 0.0), inside)
    return token_logps


NOT_SPECIALISED = ["num_rows", "T", "V", "skipped", "stride_s", "stride_t", "stride_v", "ignore_index"]


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _logps_fwd_kernel(
    logits_ptr,  # the 16-byte boundary at or before (S, T, V), or (rows, V) for packed rows, by its strides
    labels_ptr,  # (rows,)
    token_logps_ptr,  # (rows,)
    lse_ptr,  # (rows, 2)
    partial_ptr,  # (2, rows, SPLITS), or anything when SPLITS is 1
    num_rows,
    T,
    V,
    skipped,  # elements between logits_ptr and the first logit
    stride_s,
    stride_t,
    stride_v,
    ignore_index,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    SPLITS: tl.constexpr,
    EDGES: tl.constexpr,  # whether rows may have any
    STRIDED: tl.constexpr,  # whether stride_v is not 1
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if split == 0:
            store_ignored_row(token_logps_ptr, lse_ptr, row)
        return
    start = skipped + row_offset(row, T, stride_s, stride_t)
    label_logit = label_of(logits_ptr, start, stride_v, V, label, ACC)
    row_max, row_sum = scan_row(logits_ptr, start, split, V, stride_v, BLOCK, THREADS, SPLITS, EDGES, STRIDED, ACC)
    if SPLITS == 1:
        store_row(token_logps_ptr, lse_ptr, row, label_logit, row_max, row_sum)
    else:
        store_partial(partial_ptr, num_rows, row, split, row_max, row_sum, SPLITS)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _merge_splits_kernel(
    logits_ptr,
    labels_ptr,
    token_logps_ptr,
    lse_ptr,
    partial_ptr,
    num_rows,
    T,
    V,
    skipped,
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
        logits_ptr, labels_ptr, token_logps_ptr, lse_ptr, partial_ptr, rows, rows < num_rows, num_rows, T, V, skipped,
        stride_s, stride_t, stride_v, ignore_index, SPLITS, ACC,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        *(*NOT_SPECIALISED, "tiles", "scale_stride_s", "scale_stride_t"),
        *("out_skipped", "out_stride_s", "out_stride_t", "out_stride_v"),
    ]
)
def _logps_bwd_kernel(
    scale_ptr,  # (S, T) by its strides; (S,) when PACKED
    factor_ptr,  # 0-d, times every scale; or anything when HAS_FACTOR is false
    row_sequence_ptr,  # (rows,) when PACKED: the first index of a row's scale; negative: none, the gradient is 0
    logits_ptr,
    labels_ptr,
    lse_ptr,  # (rows, 2)
    out_ptr,  # may be logits_ptr
    num_rows,
    tiles,  # programs a row
    T,
    V,
    scale_stride_s,
    scale_stride_t,
    skipped,
    stride_s,
    stride_t,
    stride_v,
    out_skipped,
    out_stride_s,
    out_stride_t,
    out_stride_v,
    ignore_index,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    EDGES: tl.constexpr,  # of the logits
    STRIDED: tl.constexpr,
    ALIKE: tl.constexpr,  # whether rows of the two begin at the same distance from a 16-byte boundary
    HAS_FACTOR: tl.constexpr,
    PACKED: tl.constexpr,
    ACC: tl.constexpr,
):
    # Last row first: the end of what the forward read may still be in the cache.
    program = tl.program_id(0).to(tl.uint32)
    back = program // tiles.to(tl.uint32)
    tile = (program - back * tiles.to(tl.uint32)).to(tl.int32)
    row = num_rows - 1 - back.to(tl.int32)
    LANE: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // LANE
    WIDTH: tl.constexpr = min(THREADS, LANES)
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    if PACKED:
        sequence = tl.load(row_sequence_ptr + row)
        counted = counted & (sequence >= 0)
    start = skipped + row_offset(row, T, stride_s, stride_t)
    out_start = out_skipped + row_offset(row, T, out_stride_s, out_stride_t)
    x_ptr, head, vectors = _vectors_of(logits_ptr, start, V, EDGES, STRIDED)
    if ALIKE:
        o_ptr = out_ptr + _multiple(out_start + head, LANE)
    else:
        o_ptr = out_ptr + out_start + head.to(tl.int64) * out_stride_v
    if EDGES:
        # One a thread: in place, a second thread would read an edge that the first may have written.
        edge, is_edge = _edge_columns(head, vectors, V, LANE, THREADS)
        is_edge = is_edge & (tile == 0)
        edge_out = o_ptr + _element(edge, out_stride_v, not ALIKE)
    # From here on columns, and vectors, count from the tile's first.
    o_ptr += _element(tile * BLOCK, out_stride_v, not ALIKE)
    lane = tl.arange(0, LANES // WIDTH)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, :, None]
    column = lane * LANE + tl.arange(0, LANE)[None, None, :]
    outs = o_ptr + _element(column, out_stride_v, not ALIKE)
    inside = lane < vectors - tile * LANES
    if not counted:
        tl.store(outs, tl.zeros(column.shape, OUT), inside)
        if EDGES:
            tl.store(edge_out, tl.zeros(edge.shape, OUT), is_edge)
        return
    xs = x_ptr + _element(tile * BLOCK, stride_v, STRIDED) + _element(column, stride_v, STRIDED)
    x = tl.load(xs, inside, other=0.0)
    if EDGES:
        edge_x = tl.load(x_ptr + _element(edge, stride_v, STRIDED), is_edge, other=0.0).to(ACC)
    row_max = tl.load(lse_ptr + 2 * row.to(tl.int64))
    log_sum = tl.load(lse_ptr + 2 * row.to(tl.int64) + 1)
    if PACKED:
        scale_offset = sequence.to(tl.int64) * scale_stride_s
    else:
        scale_offset = row_offset(row, T, scale_stride_s, scale_stride_t)
    scale = tl.load(scale_ptr + scale_offset).to(ACC)
    if HAS_FACTOR:
        scale *= tl.load(factor_ptr).to(ACC)
    shift = log_sum * LOG2E
    softmax = tl.exp2((x.to(ACC) - row_max) * LOG2E - shift)
    label_column = label.to(tl.int64) - head
    tile_column = label_column - tile.to(tl.int64) * BLOCK
    if (tile_column < 0) | (tile_column >= BLOCK):
        tl.store(outs, (-scale * softmax).to(OUT), inside)
    else:
        onehot = tl.where(column == tile_column.to(tl.int32), 1.0, 0.0)
        tl.store(outs, (scale * (onehot - softmax)).to(OUT), inside)
    if EDGES:
        softmax = tl.exp2((edge_x - row_max) * LOG2E - shift)
        onehot = tl.where(edge == label_column, 1.0, 0.0)
        tl.store(edge_out, (scale * (onehot - softmax)).to(OUT), is_edge)


def token_logps_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """The contract's function. ``splits``: programs a row, by the table where None."""
    token_logps, lse = new_token_outputs(logits, labels)
    num_rows, vocab_size = labels.numel(), logits.shape[-1]
    if num_rows == 0:
        return token_logps, lse
    tile = tile_for("forward", logits.itemsize, vocab_size, logits.stride(-1) != 1)
    if splits is None:
        splits = row_splits(num_rows, vocab_size, tile.block, multiprocessors(logits.device))
    partial = torch.empty(2 * num_rows * splits, dtype=lse.dtype, device=logits.device) if splits > 1 else lse
    origin, skipped = aligned_origin(logits)
    shape = (num_rows, positions(logits), vocab_size, skipped, *strides_of(logits), ignore_index)
    arguments = (origin, labels.contiguous(), token_logps, lse, partial, *shape)
    with device_of(logits):
        _logps_fwd_kernel[(num_rows, splits)](
            *arguments,
            BLOCK=tile.block,
            THREADS=tile.threads,
            SPLITS=splits,
            **layout(logits, skipped),
            ACC=triton_dtype(lse.dtype),
            **tile.launch_options(),
        )
        if splits > 1:
            _merge_splits_kernel[(triton.cdiv(num_rows, MERGED_ROWS),)](
                *arguments, MERGED_ROWS=MERGED_ROWS, SPLITS=splits, ACC=triton_dtype(lse.dtype), num_warps=4
            )
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Upstream, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    """The contract's function, of `FusedKernelBackend`."""
    dtoken_logps, factor, row_sequence = upstream_of(dtoken_logps)
    num_rows, vocab_size = labels.numel(), logits.shape[-1]
    if num_rows == 0 or vocab_size == 0:
        return
    tile = tile_for("backward", logits.itemsize, vocab_size, logits.stride(-1) != 1)
    tiles = triton.cdiv(vocab_size, tile.block)
    scale_strides = (dtoken_logps.stride(0), 0) if row_sequence is not None else row_strides_of(dtoken_logps)
    (origin, skipped), (out_origin, out_skipped) = aligned_origin(logits), aligned_origin(out)
    with device_of(logits):
        _logps_bwd_kernel[(num_rows * tiles,)](
            dtoken_logps,
            dtoken_logps if factor is None else factor,
            labels if row_sequence is None else row_sequence,
            origin,
            labels.contiguous(),
            lse,
            out_origin,
            num_rows,
            tiles,
            positions(logits),
            vocab_size,
            *scale_strides,
            skipped,
            *strides_of(logits),
            out_skipped,
            *strides_of(out),
            ignore_index,
            BLOCK=tile.block,
            THREADS=tile.threads,
            **layout(logits, skipped),
            ALIKE=alike(logits, out, skipped, out_skipped),
            HAS_FACTOR=factor is not None,
            PACKED=row_sequence is not None,
            ACC=triton_dtype(accumulation_dtype(logits)),
            **tile.launch_options(),
        )
