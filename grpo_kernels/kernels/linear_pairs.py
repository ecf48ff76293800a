"""The linear path's "sweep": three products and no kept logits, although alpha depends on the whole batch.

    dweight = sum_s dlogp_s A_s       A_s = G_s^T hidden_s over the tokens of sequence s       dlogp_s = c a_s

c, one number, is known only in the backward. The forecast a_s is known as soon as the losses of its pair's group are:
a = +-u_g l'(h), log u_g = offset_g + rate_g * (the group's sum of pair losses), for alpha moved by exponentiated
gradient; with rates of 0 at once. So chunks hold whole pairs, and where rates are not 0 whole groups: a chunk then adds
sum_s a_s A_s to dweight's sum before the next one overwrites its logits. A group larger than a chunk has chunks, and a
sum, of its own until its last pair. G weight is kept for dhidden.

The backward measures c and does not trust the forecast: where dlogp_s - c a_s is more than rounding (a gradient of the
log-probabilities from elsewhere), or where a pair was longer than a chunk, it computes those sequences again. So the
result is exact, whatever was forecast.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.linear import LinearHead, add_products, gradient_sums, linear_token_logps_backward
from grpo_kernels.kernels.rows import accumulation_dtype
from grpo_kernels.pair_losses import PAIR_LOSSES
from grpo_kernels.segments import packed_sequence_ids, segment_sum

# Of the largest |dlogp|: what c times the forecast leaves is rounding below it.
ROUNDINGS = 32
# exp(+-60) and sums of it hold in float32; a group beyond it is computed again.
MAX_EXPONENT = 60.0


class PairTerms(NamedTuple):
    """What a pair's loss takes besides its log-probabilities, and the forecast's offsets and rates (K,) float64."""

    group_ids: Tensor
    ref_logps: Tensor | None
    margin: Tensor | None
    weights: Tensor | None
    beta: float | Tensor
    loss_type: str
    label_smoothing: float
    offsets: Tensor
    rates: Tensor

    def losses_and_slopes(self, logps: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) float64 of some pairs, rounded before as functional.preference_losses and its gradient round."""
        ratios = logps if self.ref_logps is None else logps - self.ref_logps
        h = ratios[pairs] - ratios[pairs + logps.shape[0] // 2]
        if self.margin is not None:
            h = h - self.margin[pairs]
        beta = self.beta[pairs] if isinstance(self.beta, Tensor) else self.beta
        kind = PAIR_LOSSES[self.loss_type]
        losses, slopes = kind.value(h, beta, self.label_smoothing), kind.derivative(h, beta, self.label_smoothing)
        if self.weights is not None:
            losses, slopes = losses * self.weights[pairs], slopes * self.weights[pairs]
        return losses.double(), slopes.double()


class Swept(NamedTuple):
    """What `sweep_forward` gives. A gradient that nobody asks for has no rows."""

    logps: Tensor  # (2B,)
    lse: Tensor  # (N, 2)
    states: Tensor  # (N, D): G weight
    dweight: Tensor  # (V, D): sum_s a_s A_s
    dbias: Tensor  # (V,)
    forecast: Tensor  # (2B,) float64: a
    is_swept: Tensor  # (2B,) bool: False for pairs longer than a chunk


class Chunk(NamedTuple):
    """Pairs computed at once. Not ``is_open``: each of their groups is whole, or its weight is known anyway."""

    pairs: list[int]
    is_open: bool = False
    is_last: bool = False


def chunks_of_pairs(
    groups: Sequence[int], lengths: Sequence[int], chunk_rows: int, moving: bool
) -> tuple[list[int], list[Chunk]]:
    """(pairs that are longer than a chunk, chunks of the others), from each pair's group and number of tokens."""
    too_long = [pair for pair, length in enumerate(lengths) if length > chunk_rows]
    others = [pair for pair, length in enumerate(lengths) if length <= chunk_rows]
    if not moving:
        return too_long, [Chunk(pairs) for pairs in _packed([[pair] for pair in others], lengths, chunk_rows)]
    members: dict[int, list[int]] = {}
    for pair in others:
        members.setdefault(groups[pair], []).append(pair)
    small: list[list[int]] = []
    large: list[list[int]] = []
    for pairs in members.values():
        fits = sum(lengths[pair] for pair in pairs) <= chunk_rows
        (small if fits else large).append(pairs)
    chunks = [Chunk(pairs) for pairs in _packed(small, lengths, chunk_rows)]
    for pairs in large:
        parts = _packed([[pair] for pair in pairs], lengths, chunk_rows)
        chunks += [Chunk(part, is_open=True, is_last=part is parts[-1]) for part in parts]
    return too_long, chunks


def _packed(blocks: Iterable[list[int]], lengths: Sequence[int], chunk_rows: int) -> list[list[int]]:
    """Neighbouring blocks of pairs put together while they fit."""
    packed: list[list[int]] = []
    room = 0
    for block in blocks:
        size = sum(lengths[pair] for pair in block)
        if not packed or size > room:
            packed.append([])
            room = chunk_rows
        packed[-1].extend(block)
        room -= size
    return packed


def sweep_forward(
    kernels: KernelBackend,
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    terms: PairTerms,
    ignore_index: int,
    average: bool,
    chunk_rows: int,
    needs_grad: Sequence[bool],
    accumulate_dtype: torch.dtype,
) -> Swept:
    head, device, dtype = head.to(hidden.dtype), hidden.device, accumulation_dtype(hidden)
    rows, row_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    row_sequence, num_sequences = sequence_of_rows(labels, cu_seqlens)
    num_pairs = num_sequences // 2
    counted = (row_labels != ignore_index).nonzero().squeeze(1)
    counts = segment_sum(torch.ones_like(counted, dtype=dtype), row_sequence[counted], num_sequences)
    # The batch's groups, numbered anew; an id outside [0, K) reads nothing out of bounds (its loss will be NaN).
    present, groups = terms.group_ids.clamp(0, terms.offsets.shape[0] - 1).long().unique(return_inverse=True)
    offsets, rates = terms.offsets[present], terms.rates[present]

    ends = counts.long().cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    lengths = [ends[p] - starts[p] + ends[p + num_pairs] - starts[p + num_pairs] for p in range(num_pairs)]
    too_long, chunks = chunks_of_pairs(groups.tolist(), lengths, chunk_rows, moving=bool(rates.any()))

    token_logps = torch.zeros(row_labels.shape, dtype=dtype, device=device)
    lse = torch.zeros(*row_labels.shape, 2, dtype=dtype, device=device)
    states = torch.zeros_like(rows) if needs_grad[0] else rows.new_empty(0, rows.shape[1])
    total = gradient_sums(head, needs_grad, accumulate_dtype)
    opened = gradient_sums(head, needs_grad, accumulate_dtype) if any(chunk.is_open for chunk in chunks) else total
    sums = torch.zeros(num_sequences, dtype=torch.float64, device=device)
    slopes = torch.zeros(num_pairs, dtype=torch.float64, device=device)
    group_sums = torch.zeros(present.shape, dtype=torch.float64, device=device)
    is_swept = torch.zeros(num_sequences, dtype=torch.bool, device=device)
    sizes = [sum(lengths[pair] for pair in chunk.pairs) for chunk in chunks]
    buffer = rows.new_empty(max([*sizes, chunk_rows if too_long else 0]), head.weight.shape[0])

    def rows_of(pairs: list[int]) -> Tensor:
        sequences = [s for pair in pairs for s in (pair, pair + num_pairs)]
        return torch.cat([counted[starts[s] : ends[s]] for s in sequences])

    def logits_of(chunk: Tensor) -> Tensor:
        logits = head.logits(rows[chunk], buffer)
        token_logps[chunk], lse[chunk] = kernels.token_logps_forward(logits, row_labels[chunk], ignore_index)
        sums.add_(segment_sum(token_logps[chunk], row_sequence[chunk], num_sequences))
        return logits

    def sequence_logps() -> Tensor:
        return (sums / counts.clamp(min=1) if average else sums).to(dtype)

    def take_losses(pairs: list[int]) -> None:
        these = torch.tensor(pairs, device=device)
        losses, slopes[these] = terms.losses_and_slopes(sequence_logps(), these)
        group_sums.add_(segment_sum(losses, groups[these], present.shape[0]))

    if too_long:  # forward only, and first: their groups' losses must be complete, too
        for chunk in rows_of(too_long).split(chunk_rows):
            logits_of(chunk)
        take_losses(too_long)
    highest: Tensor | None = None
    for pairs, is_open, is_last in chunks:
        chunk = rows_of(pairs)
        unit = logits_of(chunk)
        take_losses(pairs)
        is_swept[pairs] = is_swept[[pair + num_pairs for pair in pairs]] = True
        head.to_unit_gradient(kernels, unit, row_labels[chunk], lse[chunk], ignore_index)
        if needs_grad[0]:
            states[chunk] = unit @ head.weight
        factors = torch.cat([slopes, -slopes])[row_sequence[chunk]]
        if average:
            factors = factors / counts[row_sequence[chunk]]
        if highest is None:  # the scale of u: about that of the group that will weigh most
            mean_loss = group_sums.sum() / (len(too_long) + len(pairs))
            highest = (offsets + rates * mean_loss * torch.bincount(groups)).amax()
        u = _weights(offsets, rates, group_sums, highest)
        if not is_open:
            factors = factors * u[groups[row_sequence[chunk] % num_pairs]]
        sums_of_chunk = opened if is_open else total
        add_products(*sums_of_chunk, unit, rows[chunk], factors.to(dtype).unsqueeze(1))
        if is_last:
            for whole, part in zip(total, opened, strict=True):
                if whole is not None and part is not None:
                    whole.add_(part.mul_(u[groups[pairs[0]]]))
                    part.zero_()
    forecast = slopes if highest is None else slopes * _weights(offsets, rates, group_sums, highest)[groups]
    return Swept(
        sequence_logps(),
        lse,
        states,
        head.weight.new_empty(0, 0) if total[0] is None else total[0],
        head.weight.new_empty(0) if total[1] is None else total[1],
        torch.where(is_swept, torch.cat([forecast, -forecast]), 0),
        is_swept,
    )


def _weights(offsets: Tensor, rates: Tensor, group_sums: Tensor, highest: Tensor) -> Tensor:
    return (offsets + rates * group_sums - highest).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def sweep_backward(
    kernels: KernelBackend,
    dlogps: Tensor,
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    swept: Swept,
    ignore_index: int,
    average: bool,
    chunk_rows: int,
    needs_grad: Sequence[bool],
    accumulate_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), None where nobody asks for it."""
    row_sequence, num_sequences = sequence_of_rows(labels, cu_seqlens)
    per_token = torch.ones_like(dlogps, dtype=torch.float64)
    if average:
        counts = segment_sum((labels.reshape(-1) != ignore_index).double(), row_sequence, num_sequences)
        per_token = 1 / counts.clamp(min=1)
    exact = dlogps.double()
    ratio = (exact @ swept.forecast) / (swept.forecast @ swept.forecast)
    usable = bool(torch.isfinite(ratio))  # not where a loss was NaN, or every slope 0
    rest = exact - ratio * swept.forecast if usable else exact
    rounding = ROUNDINGS * torch.finfo(dlogps.dtype).eps * exact.abs().max()
    again = ~(rest.abs() <= rounding) | ~swept.is_swept  # NaN is computed again, too

    dhidden = None
    if needs_grad[0]:
        scale = torch.where(swept.is_swept, exact * per_token, 0).to(dlogps.dtype)[row_sequence]
        scale = scale.masked_fill(labels.reshape(-1) == ignore_index, 0)  # which NaN would not be
        dhidden = torch.mul(swept.states, scale.unsqueeze(1)).to(hidden.dtype).view(hidden.shape)
    dweight = _scaled(swept.dweight, ratio, usable, head.weight.dtype) if needs_grad[1] else None
    dbias = _scaled(swept.dbias, ratio, usable, head.weight.dtype) if needs_grad[2] else None
    if not bool(again.any()):
        return dhidden, dweight, dbias
    if bool((again & swept.is_swept).any()) and usable:
        warnings.warn(
            f"{int(again.sum())} of {num_sequences} sequences had gradients of their log-probabilities that are not "
            "those of the loss (another loss uses them, too?): their logits were computed once more. plan='keep' or "
            "'recompute' is faster then",
            RuntimeWarning,
            stacklevel=2,
        )
    row_labels = labels.reshape(-1)
    some_labels = torch.where(again[row_sequence], row_labels, ignore_index).view(labels.shape)
    drest = (rest * per_token).to(dlogps.dtype)[row_sequence].view(labels.shape)
    lse = swept.lse.view(*labels.shape, 2)
    of_rest = linear_token_logps_backward(
        kernels, drest, hidden, head, some_labels, lse, ignore_index, needs_grad, chunk_rows, accumulate_dtype
    )
    if dhidden is not None and of_rest[0] is not None:
        dhidden = torch.where(swept.is_swept[row_sequence].view(*labels.shape, 1), dhidden, of_rest[0])
    for whole, part in ((dweight, of_rest[1]), (dbias, of_rest[2])):
        if whole is not None and part is not None:
            whole += part
    return dhidden, dweight, dbias


def _scaled(sums: Tensor, ratio: Tensor, usable: bool, dtype: torch.dtype) -> Tensor:
    scaled = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    return torch.mul(sums, ratio, out=scaled) if usable else scaled.zero_()


def sequence_of_rows(labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """((N,) sequence of each row, number of sequences)."""
    if cu_seqlens is not None:
        return packed_sequence_ids(cu_seqlens, labels.shape[0]), cu_seqlens.shape[0] - 1
    ids = torch.arange(labels.shape[0], device=labels.device)
    return ids.repeat_interleave(labels.shape[1]), labels.shape[0]
