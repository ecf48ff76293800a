"""The linear path's "sweep": three products and no kept logits, although alpha depends on the whole batch.

    dweight = sum_s dlogp_s A_s       A_s = G_s^T hidden_s over the tokens of sequence s       dlogp_s = c a_s

c, one number, is known only in the backward. The forecast a_s is known as soon as the losses of its pair's group are:
a = u_g times the slope of the pair's loss, log u_g = offset_g + rate_g * (the group's sum of pair losses), for alpha
moved by exponentiated gradient; with rates of 0 at once. So chunks hold whole pairs, and where rates are not 0 whole
groups: a chunk then adds sum_s a_s A_s to dweight's sum before the next one overwrites its logits. A group larger than
a chunk has chunks, and a sum, of its own until its last pair. G weight is kept for dhidden.

The backward measures c and does not trust the forecast: where dlogp_s - c a_s is more than rounding (a gradient of the
log-probabilities from elsewhere), or where a pair was longer than a chunk, it computes those sequences again. So the
result is exact, whatever was forecast.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.linear import LinearHead, add_products, gradient_sums, linear_token_logps_backward, scaled
from grpo_kernels.kernels.linear_plan import LinearPlan
from grpo_kernels.kernels.memory import on_huge_pages
from grpo_kernels.kernels.rows import new_token_outputs
from grpo_kernels.segments import segment_sum

# Of the largest |dlogp|: what c times the forecast leaves is rounding below it.
ROUNDINGS = 32
# exp(+-60) and sums of it hold in float32; a group beyond it is computed again.
MAX_EXPONENT = 60.0


class Forecast(NamedTuple):
    """A pair of group g weighs exp(offset_g + rate_g * (the batch's sum of g's pair losses)), up to a factor that all
    pairs share; groups/forecast.py makes it.

    ``accumulators``: sums of dweight that the sweep needs. ``tilt``: tau, 0 for none. Where it is not 0 a pair's weight
    is also multiplied by exp((l - nu_g) / tau), with nu_g of ``tilted_means`` (NaN: not multiplied), or the tilted mean
    of the batch's pairs of g where these are None; the sum of g's pair losses is then so many times the tilted mean.
    """

    offsets: Tensor  # (K,) float64
    rates: Tensor  # (K,) float64
    accumulators: int
    tilt: float = 0.0
    tilted_means: Tensor | None = None  # (K,) float64


class Swept(NamedTuple):
    """What a `Sweep` gives. A gradient that nobody asks for has no rows."""

    logps: Tensor  # (2B,)
    lse: Tensor  # (N, 2)
    states: Tensor  # (N, D): G weight
    dweight: Tensor  # (V, D): sum_s a_s A_s
    dbias: Tensor  # (V,)
    forecast: Tensor  # (2B,) float64: a
    is_swept: Tensor  # (2B,) bool: False for pairs longer than a chunk

    @classmethod
    def zeros(cls, hidden: Tensor, weight: Tensor, rows: Rows, plan: LinearPlan) -> Swept:
        token_logps, lse = new_token_outputs(hidden, rows.labels.reshape(-1))
        dweight, dbias = gradient_sums(hidden, weight, plan)
        num_states = rows.labels.numel() if plan.needs_grad[0] else 0
        return cls(
            token_logps.new_zeros(rows.num_sequences),
            lse.zero_(),
            on_huge_pages(hidden.new_empty(num_states, hidden.shape[-1])).zero_(),
            hidden.new_zeros(0, 0) if dweight is None else dweight,
            hidden.new_zeros(0) if dbias is None else dbias,
            hidden.new_zeros(rows.num_sequences, dtype=torch.float64),
            hidden.new_zeros(rows.num_sequences, dtype=torch.bool),
        )


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


class Sweep:
    """The forward: one sweep over the batch, and the tensors that it fills chunk by chunk."""

    def __init__(
        self,
        kernels: KernelBackend,
        hidden: Tensor,
        head: LinearHead,
        rows: Rows,
        pairs: Pairs,
        forecast: Forecast,
        plan: LinearPlan,
    ) -> None:
        assert pairs.group_ids is not None  # a loss with groups has made them
        device, num_sequences = hidden.device, rows.num_sequences
        self.kernels, self.rows, self.pairs, self.plan = kernels, rows, pairs, plan
        self.head = head.to(hidden.dtype)
        self.hidden, self.labels = hidden.reshape(-1, hidden.shape[-1]), rows.labels.reshape(-1)
        self.sequence, self.num_pairs = rows.sequence_ids(), num_sequences // 2
        self.sequences_of_pair = pairs.by_pair(torch.arange(num_sequences)).t().tolist()
        self.pair_of_sequence = pairs.by_sequence(torch.arange(self.num_pairs, device=device).expand(2, -1))
        self.token_slopes = rows.token_slopes()
        self.token_weights = None if rows.token_weights is None else rows.token_weights.reshape(-1)
        # The batch's groups, numbered anew; an id outside [0, K) reads nothing out of bounds (its loss will be NaN).
        ids = pairs.group_ids.clamp(0, forecast.offsets.shape[0] - 1).long()
        present, self.groups = ids.unique(return_inverse=True)
        self.offsets, self.rates = forecast.offsets[present], forecast.rates[present]

        self.counted = rows.counted.reshape(-1).nonzero().squeeze(1)
        self.counts = segment_sum(torch.ones_like(self.counted), self.sequence[self.counted], num_sequences)
        self.ends = self.counts.long().cumsum(0).tolist()
        self.starts = [0, *self.ends[:-1]]
        self.swept = Swept.zeros(hidden, self.head.weight, rows, plan)
        self.sums = torch.zeros(num_sequences, dtype=torch.float64, device=device)
        self.slopes = torch.zeros(2, self.num_pairs, dtype=torch.float64, device=device)
        self.group_sums = torch.zeros(present.shape, dtype=torch.float64, device=device)
        self.sizes = torch.bincount(self.groups)
        self.tilt, self.tilts_by_batch = forecast.tilt, bool(forecast.tilt) and forecast.tilted_means is None
        # What pairs are tilted about. Of a batch's own mean any number near it does: it cancels.
        means = None if forecast.tilted_means is None else forecast.tilted_means[present]
        self.centres = torch.full_like(self.group_sums, torch.nan) if means is None else means
        self.highest: Tensor | None = None  # log of the largest weight that a group is thought to get
        self.pairs_seen = 0

    def run(self) -> Swept:
        """Once."""
        lengths = [sum(self.ends[s] - self.starts[s] for s in sequences) for sequences in self.sequences_of_pair]
        too_long, chunks = chunks_of_pairs(
            self.groups.tolist(), lengths, self.plan.chunk_rows, moving=self.tilts_by_batch or bool(self.rates.any())
        )
        swept, needs_grad = self.swept, self.plan.needs_grad
        total = (swept.dweight if needs_grad[1] else None, swept.dbias if needs_grad[2] else None)
        any_open = any(chunk.is_open for chunk in chunks)
        opened = gradient_sums(self.hidden, self.head.weight, self.plan) if any_open else total
        sizes = [sum(lengths[pair] for pair in chunk.pairs) for chunk in chunks]
        num_rows = max([*sizes, self.plan.chunk_rows if too_long else 0])
        buffer = on_huge_pages(self.hidden.new_empty(num_rows, self.head.num_columns))
        if too_long:  # forward only, and first: their groups' losses must be complete, too
            for rows in self._rows_of(too_long).split(self.plan.chunk_rows):
                self._take_logits(rows, buffer)
            self._take_losses(too_long)
        for chunk in chunks:
            rows = self._rows_of(chunk.pairs)
            unit = self._take_logits(rows, buffer, makes_gradient=True)
            self._take_losses(chunk.pairs)
            swept.is_swept[self._sequences_of(chunk.pairs)] = True
            if needs_grad[0]:
                swept.states[rows] = unit @ self.head.weight
            factors = self._factors(rows, of_groups=not chunk.is_open)
            add_products(*(opened if chunk.is_open else total), unit, self.hidden[rows], factors)
            if chunk.is_last:
                weight = self._group_weights()[self.groups[chunk.pairs[0]]]
                for whole, part in zip(total, opened, strict=True):
                    if whole is not None and part is not None:
                        whole.add_(part.mul_(weight))
                        part.zero_()
        slopes = self.slopes if self.highest is None else self.slopes * self._group_weights()[self.groups]
        forecast = torch.where(swept.is_swept, self.pairs.by_sequence(slopes), 0)
        return swept._replace(logps=self._logps(), forecast=forecast)

    def _sequences_of(self, pairs: list[int]) -> list[int]:
        return [s for pair in pairs for s in self.sequences_of_pair[pair]]

    def _rows_of(self, pairs: list[int]) -> Tensor:
        """The counted rows of some pairs."""
        return torch.cat([self.counted[self.starts[s] : self.ends[s]] for s in self._sequences_of(pairs)])

    def _take_logits(self, rows: Tensor, buffer: Tensor, makes_gradient: bool = False) -> Tensor:
        """The rows' logits, or G, in the buffer; their log-probabilities are added to their sequences'."""
        logits = self.head.logits(self.hidden[rows], buffer)
        arguments = (logits, self.labels[rows], self.rows.ignore_index)
        if makes_gradient:
            logps, self.swept.lse[rows] = self.head.token_logps_and_unit_gradient(self.kernels, *arguments)
        else:
            logps, self.swept.lse[rows] = self.kernels.token_logps_forward(*arguments)
        if self.token_weights is not None:
            logps = logps * self.token_weights[rows]
        self.sums.add_(segment_sum(logps, self.sequence[rows], self.rows.num_sequences))
        return logits

    def _logps(self) -> Tensor:
        return (self.sums / self.counts.clamp(min=1) if self.rows.average else self.sums).to(self.swept.logps.dtype)

    def _take_losses(self, pairs: list[int]) -> None:
        these = torch.tensor(pairs, device=self.sums.device)
        losses, slopes = self.pairs.losses_and_slopes(self._logps(), these)
        groups, num_groups = self.groups[these], self.group_sums.shape[0]
        slopes, summed = slopes.double(), losses
        if self.tilt:
            if self.tilts_by_batch:  # the mean of the first pairs that come
                means = segment_sum(losses, groups, num_groups) / torch.bincount(groups, minlength=num_groups)
                self.centres = torch.where(self.centres.isnan(), means, self.centres)
            exponents = (losses.double() - self.centres[groups]) / self.tilt
            factors = torch.where(exponents.isnan(), 1, exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp())
            slopes = slopes * factors
            summed = factors if self.tilts_by_batch else losses
        self.slopes[:, these] = slopes
        self.group_sums.add_(segment_sum(summed, groups, num_groups))
        self.pairs_seen += len(pairs)

    def _factors(self, rows: Tensor, of_groups: bool) -> Tensor:
        """(n, 1): what the gradient of each row's log-probability is multiplied by, its group's weight if asked."""
        if self.highest is None:  # the scale of the weights: about that of the group that will weigh most
            sums, _ = self._loss_sums()
            self.highest = (self.offsets + self.rates * (sums.sum() / self.pairs_seen) * self.sizes).amax()
        sequence = self.sequence[rows]
        factors = self.pairs.by_sequence(self.slopes)[sequence]
        if self.token_slopes is not None:
            factors = factors * self.token_slopes[rows]
        if of_groups:
            factors = factors * self._group_weights()[self.groups[self.pair_of_sequence[sequence]]]
        return factors.to(self.swept.logps.dtype).unsqueeze(1)

    def _loss_sums(self) -> tuple[Tensor, Tensor | float]:
        """Of the present groups what is called the sum of their losses, and the log of the mean of the factors that are
        in their pairs' slopes; 0 for groups that have not come yet."""
        if not self.tilts_by_batch:
            return self.group_sums, 0.0
        log_means = torch.where(self.group_sums > 0, (self.group_sums / self.sizes).log(), 0)
        return torch.where(self.centres.isnan(), 0, self.sizes * (self.centres + self.tilt * log_means)), log_means

    def _group_weights(self) -> Tensor:
        """Of the present groups, as the losses seen so far have them, in units of the highest."""
        assert self.highest is not None  # _factors has set it
        sums, log_mean_factors = self._loss_sums()
        exponents = self.offsets + self.rates * sums - log_mean_factors - self.highest
        return exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def sweep_backward(
    kernels: KernelBackend,
    dlogps: Tensor,
    hidden: Tensor,
    head: LinearHead,
    rows: Rows,
    swept: Swept,
    plan: LinearPlan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), contiguous; None where nobody asks for it."""
    sequence, token_slopes = rows.sequence_ids(), rows.token_slopes()

    def to_tokens(of_sequences: Tensor) -> Tensor:
        """(N,): a gradient of each sequence's log-probability as one of its rows'."""
        of_rows = of_sequences[sequence]
        return (of_rows if token_slopes is None else of_rows * token_slopes).to(dlogps.dtype)

    exact = dlogps.double()
    ratio = (exact @ swept.forecast) / (swept.forecast @ swept.forecast)
    usable = bool(torch.isfinite(ratio))  # not where a loss was NaN, or every slope 0
    rest = exact - ratio * swept.forecast if usable else exact
    largest = exact.abs().max() if exact.numel() else 0.0
    rounding = ROUNDINGS * torch.finfo(dlogps.dtype).eps * largest
    again = ~(rest.abs() <= rounding) | ~swept.is_swept  # NaN is computed again, too

    dhidden = None
    if plan.needs_grad[0]:
        scale = to_tokens(torch.where(swept.is_swept, exact, 0))
        scale = scale.masked_fill(~rows.counted.reshape(-1), 0)  # which NaN would not be
        dhidden = scaled(swept.states, scale.unsqueeze(1), hidden.dtype).view(hidden.shape)
    dweight = _scaled(swept.dweight, ratio, usable, head.weight.dtype) if plan.needs_grad[1] else None
    dbias = _scaled(swept.dbias, ratio, usable, head.weight.dtype) if plan.needs_grad[2] else None
    if not bool(again.any()):
        return dhidden, dweight, dbias
    if bool((again & swept.is_swept).any()) and usable:
        warnings.warn(
            f"{int(again.sum())} of {rows.num_sequences} sequences had gradients of their log-probabilities that are "
            "not those of the loss (another loss uses them, too?): their logits were computed once more. plan='keep' "
            "or 'recompute' is faster then",
            RuntimeWarning,
            stacklevel=2,
        )
    shape = rows.labels.shape
    some_labels = torch.where(again[sequence], rows.labels.reshape(-1), rows.ignore_index).view(shape)
    of_rest = linear_token_logps_backward(
        kernels,
        to_tokens(rest).view(shape),
        hidden,
        head,
        replace(rows, labels=some_labels),
        swept.lse.view(*shape, 2),
        plan,
        swept.states.new_empty(0),
    )
    if dhidden is not None and of_rest[0] is not None:
        dhidden = torch.where(swept.is_swept[sequence].view(*shape, 1), dhidden, of_rest[0])
    for whole, part in ((dweight, of_rest[1]), (dbias, of_rest[2])):
        if whole is not None and part is not None:
            whole += part
    return dhidden, dweight, dbias


def _scaled(sums: Tensor, ratio: Tensor, usable: bool, dtype: torch.dtype) -> Tensor:
    return scaled(sums, ratio, dtype) if usable else sums.new_zeros(sums.shape, dtype=dtype)
