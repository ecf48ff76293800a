"""The losses as modules: GroupRobustLoss on logits, LinearGroupRobustLoss on hidden states and the head's weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_kernels import validation
from grpo_kernels.distributed import dtensor, group_sync
from grpo_kernels.functional import (
    MAX_EXTRA_BYTES,
    aligned_labels_and_backend,
    at_least_float32,
    linear_logps,
    linear_sequence_logps,
    preference_losses,
    sequence_logps,
)
from grpo_kernels.groups.forecast import forecast_of
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.kernels import group_robust as tables
from grpo_kernels.kernels.autograd import FusedGroupRobustLoss
from grpo_kernels.kernels.linear_pairs import PairTerms
from grpo_kernels.pair_losses import PAIR_LOSSES
from grpo_kernels.segments import segment_sum
from grpo_kernels.types import IGNORE_INDEX, GroupRobustOutput, VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class _GroupRobustLossBase(nn.Module):
    """Options that both losses share, and everything after the sequence log-probabilities."""

    def __init__(
        self,
        group_weights: GroupWeights,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        average_log_prob: bool = False,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: bool = False,
        vocab_shard: VocabShard | None = None,
        context_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(group_weights, GroupWeights):
            raise TypeError(f"group_weights must be a GroupWeights, got {type(group_weights).__name__}")
        validation.check_beta(beta)
        validation.check_loss_options(loss_type, label_smoothing, PAIR_LOSSES)
        self.group_weights = group_weights
        self.beta = float(beta)
        self.loss_type = loss_type
        self.label_smoothing = float(label_smoothing)
        self.reference_free = reference_free
        self.average_log_prob = average_log_prob
        self.ignore_index = ignore_index
        self.shift_labels = shift_labels
        self.vocab_shard = vocab_shard
        self.context_group = context_group
        self.backend = backend

    def from_logps(
        self,
        policy_logps: Tensor,
        group_ids: Tensor,
        ref_logps: Tensor | None = None,
        *,
        beta: float | Tensor | None = None,
        margin: Tensor | None = None,
        weights: Tensor | None = None,
        total_pairs: int | Tensor | None = None,
    ) -> GroupRobustOutput:
        """The loss from log-probabilities (2B,) that were computed elsewhere, chosen first.

        In training mode with gradients on: pair losses -> group losses -> alpha update -> loss with the new alpha.
        ``total_pairs`` as in `GroupRobustLoss.forward`.
        """
        validation.check_logps(policy_logps, ref_logps)
        policy_logps = at_least_float32(policy_logps)
        num_pairs, num_groups = policy_logps.shape[0] // 2, self.group_weights.num_groups
        beta = self.beta if beta is None else beta
        self._check_pairs(num_pairs, policy_logps.device, group_ids, ref_logps, beta, margin, weights)
        self.group_weights.check_total_pairs(total_pairs)
        losses = preference_losses(
            policy_logps,
            ref_logps,
            beta=beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            margin=margin,
            weights=weights,
        )
        # An id outside [0, K) indexes nothing: its pair's loss becomes NaN, and with it the batch's.
        known = (group_ids >= 0) & (group_ids < num_groups)
        ids = torch.where(known, group_ids, 0)
        losses = losses.masked_fill(~known, torch.nan)
        sums = segment_sum(losses, ids, num_groups)
        counts = segment_sum(torch.ones_like(losses, requires_grad=False), ids, num_groups).long()
        sums, counts = self.group_weights.take_in(
            sums, counts, policy_logps.detach(), self._context_size(), total_pairs
        )
        group_losses = self.group_weights.group_losses(sums, counts, total_pairs)
        loss = (self.group_weights.loss_weights() * group_losses).sum().to(losses.dtype)
        ratios = policy_logps.detach() if ref_logps is None else policy_logps.detach() - ref_logps
        return GroupRobustOutput(
            loss=loss,
            pair_losses=losses,
            group_losses=group_losses,
            group_counts=counts,
            alpha=self.group_weights.alpha,
            chosen_logps=policy_logps[:num_pairs],
            rejected_logps=policy_logps[num_pairs:],
            chosen_rewards=beta * ratios[:num_pairs],
            rejected_rewards=beta * ratios[num_pairs:],
        )

    def _context_size(self) -> int:
        return 1 if self.context_group is None else torch.distributed.get_world_size(self.context_group)

    def _check_pairs(
        self,
        num_pairs: int,
        device: torch.device,
        group_ids: Tensor,
        ref_logps: Tensor | None,
        beta: float | Tensor,
        margin: Tensor | None,
        weights: Tensor | None,
    ) -> None:
        validation.check_weights_device(self.group_weights.log_alpha, device)
        validation.check_reference(self.reference_free, ref_logps)
        validation.check_ref_logps(ref_logps, 2 * num_pairs, device)
        validation.check_group_ids(group_ids, num_pairs, self.group_weights.num_groups, device)
        validation.check_beta(beta, num_pairs, device)
        for name, value in (("margin", margin), ("weights", weights)):
            if value is not None:
                validation.check_pair_vector(name, value, num_pairs, device)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, loss_type={self.loss_type!r}, label_smoothing={self.label_smoothing}, "
            f"reference_free={self.reference_free}, average_log_prob={self.average_log_prob}, backend={self.backend!r}"
        )


class GroupRobustLoss(_GroupRobustLossBase):
    """Group-robust DPO (or IPO, hinge, rDPO) on logits.

    ``loss = sum_g alpha_g L_g`` with alpha moved towards the groups that do worst (Ramesh et al. 2024, algorithm 1).

    Args:
        group_weights: the `GroupWeights` that hold alpha. They may be shared by several losses.
        beta: positive number; the strength of the pull towards the reference policy.
        loss_type: "sigmoid" (GR-DPO), "ipo" (GR-IPO), "hinge" or "robust".
        label_smoothing: in [0, 1/2), for "sigmoid" and "robust".
        reference_free: leave the reference policy out; ``ref_logps`` must then be None.
        average_log_prob: divide log-probabilities by the number of counted tokens (TRL does so for IPO).
        ignore_index: label of positions that do not count.
        shift_labels: True where ``logits[:, t]`` predicts ``labels[:, t + 1]`` (Hugging Face).
        inplace_backward: write the gradient over the logits; see `sequence_logps`.
        vocab_shard, context_group: where the vocabulary or the positions are sharded over ranks; see `sequence_logps`.
        backend: "auto" or a name from `grpo_kernels.backends`.

    Example:
        >>> weights = GroupWeights(group_sizes=[30, 10], step_size=0.01)
        >>> loss_fn = GroupRobustLoss(weights, beta=0.1, reference_free=True)
        >>> out = loss_fn(torch.zeros(4, 3, 5), torch.ones(4, 3, dtype=torch.long), torch.tensor([0, 1]))
        >>> out.pair_losses  # chosen and rejected are as likely: log 2
        tensor([0.6931, 0.6931])
    """

    def __init__(
        self,
        group_weights: GroupWeights,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        average_log_prob: bool = False,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: bool = False,
        inplace_backward: bool = False,
        vocab_shard: VocabShard | None = None,
        context_group: ProcessGroup | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            group_weights,
            beta=beta,
            loss_type=loss_type,
            label_smoothing=label_smoothing,
            reference_free=reference_free,
            average_log_prob=average_log_prob,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            vocab_shard=vocab_shard,
            context_group=context_group,
            backend=backend,
        )
        self.inplace_backward = inplace_backward

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        group_ids: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        beta: float | Tensor | None = None,
        margin: Tensor | None = None,
        weights: Tensor | None = None,
        total_pairs: int | Tensor | None = None,
    ) -> GroupRobustOutput:
        """Loss of a batch of B pairs as 2B sequences, the chosen first.

        Args:
            logits: (2B, T, V), or packed (N, V) with cu_seqlens (2B + 1,).
            labels: (2B, T) or (N,).
            group_ids: (B,) int64 or int32 in [0, K). Another value makes the loss NaN and leaves alpha
                (``GRPO_KERNELS_DEBUG=1`` raises instead).
            ref_logps: (2B,) log-probabilities under the reference policy, without gradient.
            beta, margin, weights: per-pair overrides as in `preference_losses`.
            total_pairs: pairs of the whole optimiser step, over all its forwards and ranks, for ``update="lagged"``.
                The loss is then this batch's share of the step, to be added up over forwards (the engine must not
                divide by their number), and statistics of other ranks arrive while the backward runs.
        """
        num_sequences = _num_sequences(logits, cu_seqlens)
        validation.check_pair_batch(num_sequences)
        logits, vocab_shard = dtensor.local_logits(logits, self.vocab_shard)
        labels, entry = aligned_labels_and_backend(
            logits,
            labels,
            cu_seqlens,
            self.shift_labels,
            self.ignore_index,
            self.backend,
            vocab_shard,
            self.context_group,
        )
        whole_rows = vocab_shard is None and self.context_group is None and total_pairs is None
        known = self.group_weights.is_default_rule and PAIR_LOSSES[self.loss_type].fused
        if entry.fuses_loss and known and whole_rows:
            beta = self.beta if beta is None else beta
            self._check_pairs(num_sequences // 2, logits.device, group_ids, ref_logps, beta, margin, weights)
            arguments = (logits, labels, group_ids, ref_logps, cu_seqlens, beta, margin, weights)
            return self._fused(entry.name, *arguments)
        logps = sequence_logps(
            logits,
            labels,
            cu_seqlens=cu_seqlens,
            ignore_index=self.ignore_index,
            average=self.average_log_prob,
            inplace_backward=self.inplace_backward,
            vocab_shard=vocab_shard,
            context_group=self.context_group,
            backend=entry.name,
        )
        return self.from_logps(
            logps, group_ids, ref_logps, beta=beta, margin=margin, weights=weights, total_pairs=total_pairs
        )

    def _fused(
        self,
        backend: str,
        logits: Tensor,
        labels: Tensor,
        group_ids: Tensor,
        ref_logps: Tensor | None,
        cu_seqlens: Tensor | None,
        beta: float | Tensor,
        margin: Tensor | None,
        weights: Tensor | None,
    ) -> GroupRobustOutput:
        """`from_logps` of `sequence_logps` in one operator; arguments are checked and labels aligned already."""
        if self.inplace_backward:
            validation.check_no_overlap("logits", logits)
        of_groups = self.group_weights
        update = of_groups.update_of_forward()
        of_groups.check_ranks(update)
        several_ranks = update != "none" and of_groups.num_ranks > 1
        loss, sequences, pairs, groups, counts = FusedGroupRobustLoss.apply(
            self.inplace_backward,
            backend,
            self.ignore_index,
            logits,
            labels,
            cu_seqlens,
            ref_logps,
            group_ids,
            beta if isinstance(beta, Tensor) else None,
            margin,
            weights,
            of_groups.log_alpha,
            of_groups.group_sizes,
            of_groups.pending_sums,
            of_groups.pending_counts,
            of_groups.skipped_updates,
            0.0 if isinstance(beta, Tensor) else float(beta),
            self.loss_type,
            self.label_smoothing,
            self.average_log_prob,
            self.ignore_index,
            of_groups.estimator,
            of_groups.step_size,
            of_groups.adjustment,
            of_groups.floor,
            of_groups.chi,
            "none" if update == "recomputed" else update,
            group_sync.name_of(of_groups.process_group) if several_ranks else "",
            of_groups.gradient_scale if several_ranks else 1.0,
            backend,
        )
        of_groups.after_forward(update, sequences[tables.LOGPS].detach())
        num_pairs = pairs.shape[1]
        rewards = sequences[tables.REWARDS].detach()
        return GroupRobustOutput(
            loss=loss,
            pair_losses=pairs[tables.PAIR_LOSSES],
            group_losses=groups[tables.GROUP_LOSSES],
            group_counts=counts,
            alpha=groups[tables.ALPHA].detach(),
            chosen_logps=sequences[tables.LOGPS, :num_pairs],
            rejected_logps=sequences[tables.LOGPS, num_pairs:],
            chosen_rewards=rewards[:num_pairs],
            rejected_rewards=rewards[num_pairs:],
        )


class LinearGroupRobustLoss(_GroupRobustLossBase):
    """`GroupRobustLoss` on hidden states and the head's weight; the (2B, T, V) logits are never held.

    Arguments and defaults are those of `GroupRobustLoss`, without ``inplace_backward``, and

    Args:
        logit_scale, softcap, max_extra_bytes, accumulate_dtype: see `linear_sequence_logps`.
        plan: "auto", or "sweep", "keep" or "recompute" to force what is kept for the backward; see
            `grpo_kernels.kernels.linear_plan`. Where other losses use the output's log-probabilities, too, "sweep"
            computes logits twice: prefer "keep" or "recompute".
    """

    def __init__(
        self,
        group_weights: GroupWeights,
        *,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        max_extra_bytes: int = MAX_EXTRA_BYTES,
        plan: str = "auto",
        accumulate_dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__(group_weights, **options)
        validation.check_linear_options(logit_scale, softcap, max_extra_bytes, plan, accumulate_dtype)
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.max_extra_bytes = max_extra_bytes
        self.plan = plan
        self.accumulate_dtype = accumulate_dtype

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, logit_scale={self.logit_scale}, softcap={self.softcap}, plan={self.plan!r}, "
            f"max_extra_bytes={self.max_extra_bytes}, accumulate_dtype={self.accumulate_dtype}"
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        group_ids: Tensor,
        ref_logps: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        beta: float | Tensor | None = None,
        margin: Tensor | None = None,
        weights: Tensor | None = None,
        total_pairs: int | Tensor | None = None,
    ) -> GroupRobustOutput:
        """As `GroupRobustLoss.forward`, with hidden (2B, T, D) or packed (N, D), weight (V, D) and bias (V,).

        ``ref_hidden`` (2B, T, D') or (N, D') with ``ref_weight`` (V, D') in place of ``ref_logps``: the reference
        policy's log-probabilities are computed here, without gradients: one more product.
        """
        num_sequences = _num_sequences(hidden, cu_seqlens)
        validation.check_pair_batch(num_sequences)
        options: dict[str, Any] = {
            "cu_seqlens": cu_seqlens,
            "shift_labels": self.shift_labels,
            "ignore_index": self.ignore_index,
            "average": self.average_log_prob,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "max_extra_bytes": self.max_extra_bytes,
            "vocab_shard": self.vocab_shard,
            "context_group": self.context_group,
            "backend": self.backend,
        }
        if ref_hidden is not None or ref_weight is not None or ref_bias is not None:
            validation.check_online_reference(ref_hidden, ref_weight, ref_logps, self.reference_free)
            assert ref_hidden is not None
            assert ref_weight is not None
            with torch.no_grad():
                ref_logps = linear_sequence_logps(ref_hidden, ref_weight, labels, bias=ref_bias, **options)
        beta = self.beta if beta is None else beta
        self._check_pairs(num_sequences // 2, hidden.device, group_ids, ref_logps, beta, margin, weights)
        terms, accumulators = None, 0
        forecast = forecast_of(self.group_weights, group_ids)
        if forecast is not None:
            of_loss = (group_ids, ref_logps, margin, weights, beta, self.loss_type, self.label_smoothing)
            terms, accumulators = PairTerms(*of_loss, forecast.offsets, forecast.rates), forecast.accumulators
        logps = linear_logps(
            hidden,
            weight,
            labels,
            bias=bias,
            plan=self.plan,
            accumulate_dtype=self.accumulate_dtype,
            pair_terms=terms,
            accumulators=accumulators,
            **options,
        )
        return self.from_logps(
            logps, group_ids, ref_logps, beta=beta, margin=margin, weights=weights, total_pairs=total_pairs
        )


def _num_sequences(rows: Tensor, cu_seqlens: Tensor | None) -> int:
    validation.check_tensor("logits or hidden", rows)
    return rows.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
