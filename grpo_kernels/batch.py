"""What travels with a batch's logits or hidden states: its rows and its pairs, each made and checked once.

The public functions make them of what the caller gave; everything below takes them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.loss_spec import LossSpec, Sequences, value_and_slopes
from grpo_kernels.segments import packed_sequence_ids, segment_sum
from grpo_kernels.types import IGNORE_INDEX, RowOptions, VocabShard


@dataclass(frozen=True)
class Rows:
    """The positions of a batch: the label that each predicts, and the sequence that it belongs to.

    ``labels`` are aligned: row t of the logits predicts labels[t]. Of ``vocab_shard`` and ``context_group`` no kernel
    knows: they say what is communicated around the kernels.
    """

    labels: Tensor  # (S, T), or packed (N,) with cu_seqlens
    cu_seqlens: Tensor | None = None  # (S + 1,)
    token_weights: Tensor | None = None  # labels' shape
    ignore_index: int = IGNORE_INDEX
    average: bool = False
    vocab_shard: VocabShard | None = None
    context_group: Any = None  # a ProcessGroup

    @classmethod
    def of(
        cls, argument: str, tensor: Tensor, num_columns: int, labels: Tensor, options: RowOptions | dict[str, Any]
    ) -> Rows:
        """Of what a public function was given for ``tensor`` (logits, or hidden states), called ``argument`` there.

        ``num_columns``: of the logits, on this rank.
        """
        validation.check_option_names(options, RowOptions)
        given: dict[str, Any] = {**options}
        shift_labels = given.pop("shift_labels", False)
        rows = cls(labels, **given)
        shard = rows.vocab_shard
        validation.check_rows_and_labels(
            argument, tensor, labels, rows.cu_seqlens, rows.ignore_index, num_columns if shard is None else None
        )
        if shard is not None:
            validation.check_vocab_shard(shard, "logits" if argument == "logits" else "weight", num_columns)
        if rows.token_weights is not None:
            validation.check_token_weights(rows.token_weights, labels)
        if not shift_labels:
            return rows._without_ignored_weights()
        if rows.context_group is not None:
            raise ValueError(
                "shift_labels must be False with context_group: a rank does not have the label after its last "
                "position. Shift the labels before they are split over the ranks"
            )
        given["token_weights"] = None if rows.token_weights is None else rows._shifted(rows.token_weights, 0)
        return cls(rows._shifted(labels, rows.ignore_index), **given)._without_ignored_weights()

    @property
    def num_sequences(self) -> int:
        return self.labels.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def counted(self) -> Tensor:
        """(...,) bool, labels' shape."""
        return self.labels != self.ignore_index

    def sequence_ids(self) -> Tensor:
        """(N,) int64: the sequence of each row."""
        if self.cu_seqlens is not None:
            return packed_sequence_ids(self.cu_seqlens, self.labels.shape[0])
        ids = torch.arange(self.labels.shape[0], device=self.labels.device)
        return ids.repeat_interleave(self.labels.shape[1])

    def sums(self, token_values: Tensor) -> Tensor:
        """(S,) float64 of values in labels' shape, in float64 so that thousands of tokens cost no digits."""
        if self.cu_seqlens is None:
            return token_values.double().sum(-1)
        return segment_sum(token_values, self.sequence_ids(), self.num_sequences)

    def counts(self) -> Tensor:
        """(S,) float64: counted rows of each sequence."""
        return self.sums(self.counted)

    def are_empty(self) -> Tensor:
        """(S,) bool: no row of the sequence counts."""
        if self.cu_seqlens is None:
            return ~self.counted.any(-1)
        counted_before = torch.nn.functional.pad(self.counted.cumsum(0), (1, 0))  # row 0, 1, ..., N
        return counted_before[self.cu_seqlens.long().clamp(0, self.labels.shape[0])].diff() == 0

    def weighted(self, token_logps: Tensor) -> Tensor:
        return token_logps if self.token_weights is None else token_logps * self.token_weights

    def token_slopes(self) -> Tensor | None:
        """(N,) float64, d logp_s / d token_logp of each row; None where all are 1."""
        slopes = None if self.token_weights is None else self.token_weights.reshape(-1).double()
        if not self.average:
            return slopes
        per_token = (1 / self.counts().clamp(min=1))[self.sequence_ids()]
        return per_token if slopes is None else per_token * slopes

    def _without_ignored_weights(self) -> Rows:
        """A weight of 0 where the label is ignored: nobody has filled it in, and 0 times NaN would be NaN."""
        if self.token_weights is None:
            return self
        return replace(self, token_weights=self.token_weights.masked_fill(~self.counted, 0))

    def _shifted(self, values: Tensor, last: int) -> Tensor:
        """Moved one to the left: row t holds what it predicts, and the last row of a sequence predicts nothing."""
        if values.shape[-1] == 0:
            return values
        shifted = torch.cat([values[..., 1:], values.new_full((*values.shape[:-1], 1), last)], dim=-1)
        if self.cu_seqlens is None:
            return shifted
        ids = self.sequence_ids()
        next_is_other = torch.cat([ids[1:] != ids[:-1], ids.new_ones(1, dtype=torch.bool)])
        return shifted.masked_fill(next_is_other, last)


def by_sequence(of_pairs: Tensor, interleaved: bool) -> Tensor:
    """(2B,) of (2, B); a function, for torch.compile makes no `Pairs` in a backward."""
    return (of_pairs.t() if interleaved else of_pairs).reshape(-1)


DPO = LossSpec()


@dataclass(frozen=True)
class Pairs:
    """The B pairs of 2B sequences: what a pair's loss takes besides its log-probabilities, and the pair's group."""

    group_ids: Tensor | None = None  # (B,), or (B, K) memberships; None where nobody asks for groups
    ref_logps: Tensor | None = None  # (2B,)
    margin: Tensor | None = None  # (B,)
    weights: Tensor | None = None  # (B,)
    token_counts: Tensor | None = None  # (2B,), where a loss uses them
    beta: float | Tensor = 0.1  # or (B,)
    label_smoothing: float | Tensor = 0.0  # or (B,)
    spec: LossSpec = DPO
    interleaved: bool = False  # pair i is sequences 2i and 2i + 1; else i and B + i

    @property
    def loss_type(self) -> str:
        """The one loss of pairs whose spec is fused."""
        return self.spec.loss_types[0]

    @property
    def is_fused(self) -> bool:
        """Whether kernels that fuse the whole loss know these."""
        one_group_each = self.group_ids is None or self.group_ids.dim() == 1
        plain = one_group_each and not isinstance(self.label_smoothing, Tensor) and not self.interleaved
        return self.spec.is_fused and plain

    def by_pair(self, of_sequences: Tensor) -> Tensor:
        """(2, B), the chosen and the rejected sequences' values, of (2B,)."""
        num_pairs = of_sequences.shape[0] // 2
        if self.interleaved:
            return of_sequences.reshape(num_pairs, 2).t()
        return of_sequences.reshape(2, num_pairs)

    def chosen_and_rejected(self, of_sequences: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each, of (2B,): slices, which torch.compile can make again of a batch without pairs."""
        num_pairs = of_sequences.shape[0] // 2
        if self.interleaved:
            return of_sequences[0::2], of_sequences[1::2]
        return of_sequences[:num_pairs], of_sequences[num_pairs:]

    def by_sequence(self, of_pairs: Tensor) -> Tensor:
        """(2B,) of (2, B)."""
        return by_sequence(of_pairs, self.interleaved)

    def check(self, num_pairs: int, device: torch.device) -> None:
        validation.check_ref_logps(self.ref_logps, 2 * num_pairs, device)
        if self.ref_logps is not None and not self.spec.uses_reference:
            raise ValueError(
                f"ref_logps must be None for loss_type={list(self.spec.loss_types)}, which has no reference policy"
            )
        validation.check_beta(self.beta, num_pairs, device)
        self.spec.check_label_smoothing(self.label_smoothing, num_pairs, device)
        for name, value in (("margin", self.margin), ("weights", self.weights)):
            if value is not None:
                validation.check_pair_vector(name, value, num_pairs, device)
        if self.margin is not None and not self.spec.of_margin:
            raise ValueError(
                f"margin has a meaning for losses of the margin only, got loss_type={list(self.spec.loss_types)}"
            )
        if self.spec.uses_counts or self.token_counts is not None:
            validation.check_token_counts(self.token_counts, 2 * num_pairs, device)

    def losses_and_slopes(self, logps: Tensor, some: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses (n,) and their slopes (2, n) in the log-probabilities of the chosen and the rejected sequence.

        Args:
            logps: (2B,), float32 or float64.
            some: (n,) numbers of the pairs asked for; None: all.
        """

        def of_sequences(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            values = self.by_pair(values)
            return values if some is None else values[:, some]

        def of_pairs(values: Any) -> Any:
            return values[some] if some is not None and isinstance(values, Tensor) else values

        counts = None if self.token_counts is None else self.token_counts.clamp(min=1).to(logps.dtype)
        policy = of_sequences(logps)
        assert policy is not None
        sequences = Sequences(policy, of_sequences(self.ref_logps), of_sequences(counts), of_pairs(self.margin))
        losses, slopes = value_and_slopes(self.spec, sequences, of_pairs(self.beta), of_pairs(self.label_smoothing))
        if self.weights is not None:
            weights = of_pairs(self.weights)
            losses, slopes = losses * weights, slopes * weights
        return losses, slopes
