"""The whole forward of GroupRobustLoss in one launch: rows, then sequences, then the loss.

Each program reads one row of logits (or a split of it) and takes a ticket of its sequence. The last one to arrive adds
up the sequence's token_logps and takes as many tickets of the launch as the sequence has rows; who takes the last of
those does what finish.py describes. Tickets are integers and sums are taken in a fixed order, so the result is the same
from run to run.

Traffic: one read of the logits of counted rows; 12 bytes a row of workspace; O(sequences + groups) at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels.group_robust import (
    FUSED_GROUPS,
    SUMS,
    GroupRobustTables,
    GroupState,
    finish_many_groups,
    new_tables,
)
from grpo_kernels.kernels.rows import accumulation_dtype, strides_of
from grpo_kernels.kernels.triton.finish import alpha_loss_and_coefficients, pairs_and_group_sums, split_number
from grpo_kernels.kernels.triton.launch import (
    aligned_origin,
    device_of,
    layout,
    multiprocessors,
    positions,
    triton_dtype,
)
from grpo_kernels.kernels.triton.logps import (
    NOT_SPECIALISED,
    label_of,
    merge_rows,
    row_offset,
    scan_row,
    store_ignored_row,
    store_partial,
    store_row,
)
from grpo_kernels.kernels.triton.tiles import row_splits, tile_for

# Blocks of the finishing program: an element a thread, so that it needs few registers: they are those of every program.
BLOCK_T = 128  # 256 spills on sm_100
BLOCK_B = 256
BLOCK_K = 256


@triton.jit
def _sequence_of(row, cu_seqlens_ptr, S):
    """The last s in [0, S) with cu_seqlens[s] <= row. Rows outside the sequences get one of them, too."""
    low = tl.zeros((), tl.int32)
    high = low + S
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle).to(tl.int64) <= row
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _finish_sequence(
    logits_ptr,
    labels_ptr,
    token_logps_ptr,
    lse_ptr,
    partial_ptr,
    logps_ptr,
    sequence,
    begin,
    end,
    num_rows,
    T,
    V,
    S,
    skipped,
    stride_s,
    stride_t,
    stride_v,
    ignore_index,
    SPLITS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum of token_logps and count of tokens over rows begin:end, in float64; merges the splits of rows first."""
    total = tl.zeros((BLOCK_T,), tl.float64)
    count = tl.zeros((BLOCK_T,), tl.int32)
    for first in range(begin, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        inside = rows < end
        if SPLITS == 1:
            token_logps = tl.load(token_logps_ptr + rows, inside, other=0.0, cache_modifier=".cg")
        else:
            token_logps = merge_rows(
                logits_ptr, labels_ptr, token_logps_ptr, lse_ptr, partial_ptr, rows, inside, num_rows, T, V, skipped,
                stride_s, stride_t, stride_v, ignore_index, SPLITS, ACC,
            )  # fmt: skip
        total += tl.where(inside, token_logps, 0.0).to(tl.float64)
        label = tl.load(labels_ptr + rows, inside, other=0)
        count += (inside & (label != ignore_index)).to(tl.int32)
    tl.store(logps_ptr + sequence, tl.sum(total, 0))
    tl.store(logps_ptr + S + sequence, tl.sum(count, 0).to(tl.float64))


@triton.jit(do_not_specialize=[*NOT_SPECIALISED, "S", "K"])
def _group_robust_fwd_kernel(
    logits_ptr,  # the 16-byte boundary at or before (S, T, V), or (rows, V) when PACKED, by its strides
    labels_ptr,  # (rows,)
    cu_seqlens_ptr,  # (S + 1,) when PACKED
    token_logps_ptr,  # (rows,)
    lse_ptr,  # (rows, 2)
    partial_ptr,  # (2, rows, SPLITS) when SPLITS > 1
    row_sequence_ptr,  # (rows,) when PACKED: -1 for rows of no sequence
    tickets_ptr,  # (S + 1,) zeros: one for each sequence, then that of the launch
    logps_ptr,  # (2, S) float64
    sequence_ptr,  # (4, S)
    pair_ptr,  # (3, B)
    group_ptr,  # (5, K) float64
    counts_ptr,  # (K,)
    loss_ptr,  # 0-d
    ref_ptr,  # (S,) when HAS_REF
    group_ids_ptr,  # (B,)
    beta_ptr,  # (B,) when HAS_BETA
    margin_ptr,  # (B,) when HAS_MARGIN
    weights_ptr,  # (B,) when HAS_WEIGHTS
    log_alpha_ptr,  # (K,) float64, and so on: the GroupWeights' buffers
    sizes_ptr,  # (K,) when IMPORTANCE or ADJUSTMENT
    pending_sums_ptr,
    pending_counts_ptr,
    skipped_ptr,
    num_rows,
    T,
    V,
    S,
    K,
    skipped,
    stride_s,
    stride_t,
    stride_v,
    ignore_index,
    gradient_scale,
    beta_high,
    beta_low,
    e_high,
    e_low,
    step_high,
    step_low,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    ALPHA: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    SPLITS: tl.constexpr,
    EDGES: tl.constexpr,
    STRIDED: tl.constexpr,
    ACC: tl.constexpr,
    LOSS: tl.constexpr,
    AVERAGE: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ADJUSTMENT: tl.constexpr,
    FLOOR: tl.constexpr,
    CHI: tl.constexpr,
    UPDATE: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Stages ROWS (a program for each row and split), PAIRS and ALPHA (the last of those, or one program alone)."""
    is_last = True
    if ROWS:
        row = tl.program_id(0).to(tl.int64)
        split = tl.program_id(1)
        total = num_rows.to(tl.int64)  # rows of all sequences
        if PACKED:
            sequence = _sequence_of(row, cu_seqlens_ptr, S)
            begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
            end = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64)
            total = tl.load(cu_seqlens_ptr + S).to(tl.int64) - tl.load(cu_seqlens_ptr).to(tl.int64)
            belongs = (row >= begin) & (row < end)
            if split == 0:
                tl.store(row_sequence_ptr + row, tl.where(belongs, sequence, -1))
        else:
            sequence = row.to(tl.int32) // T
            begin = sequence.to(tl.int64) * T
            end = begin + T
            belongs = True
        label = tl.load(labels_ptr + row)
        if (label != ignore_index) & belongs:
            start = skipped + row_offset(row, T, stride_s, stride_t)
            label_logit = label_of(logits_ptr, start, stride_v, V, label, ACC)
            row_max, row_sum = scan_row(
                logits_ptr, start, split, V, stride_v, BLOCK, THREADS, SPLITS, EDGES, STRIDED, ACC
            )
            if SPLITS == 1:
                store_row(token_logps_ptr, lse_ptr, row, label_logit, row_max, row_sum)
            else:
                store_partial(partial_ptr, num_rows, row, split, row_max, row_sum, SPLITS)
        elif split == 0:
            store_ignored_row(token_logps_ptr, lse_ptr, row)

        # Without any row in a sequence, somebody must do it.
        is_last = (total == 0) & (row == 0) & (split == 0)
        if belongs:
            # Each program's stores come before its ticket (release), the finisher's loads after it (acquire). The
            # barriers keep the block's other threads on the right side of the one that takes the ticket.
            tl.debug_barrier()
            arrived = tl.atomic_add(tickets_ptr + sequence, 1, sem="acq_rel", scope="gpu")
            tl.debug_barrier()
            if arrived == (end - begin) * SPLITS - 1:
                _finish_sequence(
                    logits_ptr, labels_ptr, token_logps_ptr, lse_ptr, partial_ptr, logps_ptr, sequence, begin, end,
                    num_rows, T, V, S, skipped, stride_s, stride_t, stride_v, ignore_index, SPLITS, ACC, BLOCK_T,
                )  # fmt: skip
                tl.debug_barrier()
                taken = (end - begin).to(tl.int32)
                before = tl.atomic_add(tickets_ptr + S, taken, sem="acq_rel", scope="gpu")
                is_last = before + taken == total
                tl.debug_barrier()
    if is_last:
        if PAIRS:
            pairs_and_group_sums(
                logps_ptr, sequence_ptr, pair_ptr, group_ptr, counts_ptr, ref_ptr, group_ids_ptr, beta_ptr, margin_ptr,
                weights_ptr, beta_high, beta_low, e_high, e_low, S, K, LOSS, AVERAGE, HAS_REF, HAS_BETA, HAS_MARGIN,
                HAS_WEIGHTS, CLEAR, BLOCK_B, BLOCK_K,
            )  # fmt: skip
        if ALPHA:
            alpha_loss_and_coefficients(
                logps_ptr, sequence_ptr, pair_ptr, group_ptr, counts_ptr, loss_ptr, group_ids_ptr, log_alpha_ptr,
                sizes_ptr, pending_sums_ptr, pending_counts_ptr, skipped_ptr, gradient_scale, step_high, step_low, S, K,
                AVERAGE, IMPORTANCE, ADJUSTMENT, FLOOR, CHI, UPDATE, BLOCK_B, BLOCK_K,
            )  # fmt: skip


def group_robust_forward(
    logits: Tensor,
    rows: Rows,
    pairs: Pairs,
    groups: GroupState,
    whole_batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    splits: int | None = None,
) -> GroupRobustTables:
    """As in contract.py. ``splits``: programs a row, by the table where None."""
    labels, num_sequences, num_groups = rows.labels, rows.num_sequences, groups.log_alpha.shape[0]
    num_rows, vocab_size = labels.numel(), logits.shape[-1]
    device, acc = logits.device, accumulation_dtype(logits)
    tile = tile_for("forward", logits.itemsize, vocab_size, logits.stride(-1) != 1)
    if splits is None:
        splits = row_splits(num_rows, vocab_size, tile.block, multiprocessors(device))

    tables, logps, tickets = new_tables(logits, rows, num_groups)
    token_logps = torch.empty(num_rows, dtype=acc, device=device)
    partial = token_logps.new_empty(2 * num_rows * splits) if splits > 1 else token_logps

    def pointer(tensor: Tensor | None) -> Tensor:
        return logps if tensor is None else tensor.contiguous()  # an unused pointer must point somewhere

    origin, skipped = aligned_origin(logits)
    betas, beta = (pairs.beta, 0.0) if isinstance(pairs.beta, Tensor) else (None, pairs.beta)
    assert pairs.group_ids is not None  # a loss with groups has made them
    arguments: dict[str, Any] = {
        "logits_ptr": origin,
        "labels_ptr": labels.contiguous(),
        "cu_seqlens_ptr": pointer(rows.cu_seqlens),
        "token_logps_ptr": token_logps,
        "lse_ptr": tables.lse,
        "partial_ptr": partial,
        "row_sequence_ptr": tables.row_sequence,
        "tickets_ptr": tickets,
        "logps_ptr": logps,
        "sequence_ptr": tables.sequences,
        "pair_ptr": tables.pairs,
        "group_ptr": tables.groups,
        "counts_ptr": tables.counts,
        "loss_ptr": tables.loss,
        "ref_ptr": pointer(pairs.ref_logps),
        "group_ids_ptr": pairs.group_ids.contiguous(),
        "beta_ptr": pointer(betas),
        "margin_ptr": pointer(pairs.margin),
        "weights_ptr": pointer(pairs.weights),
        "log_alpha_ptr": groups.log_alpha,
        "sizes_ptr": tables.counts if groups.group_sizes is None else groups.group_sizes,
        "pending_sums_ptr": groups.pending_sums,
        "pending_counts_ptr": groups.pending_counts,
        "skipped_ptr": groups.skipped_updates,
        "num_rows": num_rows,
        "T": positions(logits),
        "V": vocab_size,
        "S": num_sequences,
        "K": num_groups,
        **dict(zip(("skipped", "stride_s", "stride_t", "stride_v"), (skipped, *strides_of(logits)), strict=True)),
        "ignore_index": rows.ignore_index,
    }
    arguments["gradient_scale"] = groups.gradient_scale
    for name, value in (("beta", beta), ("e", float(pairs.label_smoothing)), ("step", groups.step_size)):
        arguments[f"{name}_high"], arguments[f"{name}_low"] = split_number(value)
    options = {
        "PACKED": rows.cu_seqlens is not None,
        "BLOCK": tile.block,
        "THREADS": tile.threads,
        "SPLITS": splits,
        **layout(logits, skipped),
        "ACC": triton_dtype(acc),
        "LOSS": pairs.loss_type,
        "AVERAGE": rows.average,
        "HAS_REF": pairs.ref_logps is not None,
        "HAS_BETA": betas is not None,
        "HAS_MARGIN": pairs.margin is not None,
        "HAS_WEIGHTS": pairs.weights is not None,
        "IMPORTANCE": groups.estimator == "importance",
        "ADJUSTMENT": groups.adjustment,
        "FLOOR": groups.floor,
        "CHI": groups.chi,
        "UPDATE": groups.update,
        "CLEAR": num_groups <= FUSED_GROUPS,
        "BLOCK_T": BLOCK_T,
        "BLOCK_B": BLOCK_B,
        "BLOCK_K": BLOCK_K,
        **tile.launch_options(),
    }
    fits, alone = num_groups <= FUSED_GROUPS, whole_batch is None

    def launch(*grid: int, **stages: bool) -> None:
        with device_of(logits):
            _group_robust_fwd_kernel[grid](**arguments, **options, **stages)

    grid = (num_rows, splits) if num_rows else (1,)
    launch(*grid, ROWS=num_rows > 0, PAIRS=True, ALPHA=fits and alone)
    if whole_batch is not None:
        sums, counts = whole_batch(tables.groups[SUMS], tables.counts)
        tables.groups[SUMS].copy_(sums)
        tables.counts.copy_(counts)
    if not fits:
        finish_many_groups(tables, pairs.group_ids, groups)
    elif not alone:
        launch(1, ROWS=False, PAIRS=False, ALPHA=True)
    return tables
