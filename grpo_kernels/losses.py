"""The losses as modules: GroupRobustLoss on logits, LinearGroupRobustLoss on hidden states and the head's weight."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.arguments import backend_of, checked_head, rows_of_hidden, rows_of_logits
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.distributed import dtensor
from grpo_kernels.functional import linear_sequence_logps
from grpo_kernels.groups.forecast import forecast_of
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.kernels import group_robust as tables
from grpo_kernels.kernels import ops
from grpo_kernels.kernels.autograd import FusedGroupRobustLoss
from grpo_kernels.kernels.linear_plan import Budget
from grpo_kernels.logps import linear_logps_of_rows, logps_of_rows
from grpo_kernels.loss_base import GroupRobustLossBase
from grpo_kernels.types import GroupRobustOutput, LossOptions, PairOptions, RowOptions


class GroupRobustLoss(GroupRobustLossBase):
    """Group-robust DPO (or IPO, hinge, rDPO) on logits.

    ``loss = sum_g alpha_g L_g`` with alpha moved towards the groups that do worst (Ramesh et al. 2024, algorithm 1).

    Args:
        group_weights: the `GroupWeights` that hold alpha. They may be shared by several losses.
        inplace_backward: write the gradient over the logits; see `sequence_logps`.
        beta: positive number; the strength of the pull towards the reference policy. 0.1.
        loss_type: "sigmoid" (GR-DPO, the default), "ipo" (GR-IPO), another name of `grpo_kernels.pair_losses`, or a
            list of names with ``loss_weights``: their weighted sum is what groups, alpha and the gradient see.
        label_smoothing: in [0, 1/2), for losses that have it. 0.
        loss_weights, f_divergence_type, f_alpha_divergence_coef, use_weighting, discopop_tau: see `preference_losses`.
        reference_free: leave the reference policy out; ``ref_logps`` must then be None. False.
        average_log_prob: divide log-probabilities by the number of counted tokens (TRL does so for IPO). False.
        ignore_index: label of positions that do not count. -100.
        shift_labels: True where ``logits[:, t]`` predicts ``labels[:, t + 1]`` (Hugging Face). False.
        vocab_shard, context_group: where the vocabulary or the positions are sharded over ranks; see `sequence_logps`.
        logit_scale, softcap: of a head whose output is given in place of the model's logits; see `sequence_logps`.
        layout: of the 2B sequences: "chosen_first" (the default), pair i is sequences i and B + i, or "interleaved",
            pair i is sequences 2i and 2i + 1 (NeMo-RL). The kernels that fuse the whole loss know the first only.
        alpha_follows: what moves alpha where ``loss_type`` lists "sft" beside other losses: "loss", the whole weighted
            sum (the default), or "preference", the sum without it. The gradient is that of the whole either way.
        backend: "auto" or a name from `grpo_kernels.backends`.

    Example:
        >>> groups = GroupWeights(group_sizes=[30, 10], step_size=0.01)
        >>> loss_fn = GroupRobustLoss(groups, beta=0.1, reference_free=True)
        >>> out = loss_fn(torch.zeros(4, 3, 5), torch.ones(4, 3, dtype=torch.long), torch.tensor([0, 1]))
        >>> out.pair_losses  # chosen and rejected are as likely: log 2
        tensor([0.6931, 0.6931])
    """

    def __init__(
        self, group_weights: GroupWeights, *, inplace_backward: bool = False, **options: Unpack[LossOptions]
    ) -> None:
        super().__init__(group_weights, **options)
        self.inplace_backward = inplace_backward

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        group_ids: Tensor,
        ref_logps: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Unpack[PairOptions],
    ) -> GroupRobustOutput:
        """Loss of a batch of B pairs as 2B sequences, the chosen first or as ``layout`` says.

        Args:
            logits: (2B, T, V), or packed (N, V) with cu_seqlens (2B + 1,).
            labels: (2B, T) or (N,).
            group_ids: (B,) int64 or int32 in [0, K); or (B, K) float32 or float64, each pair's share in each group, at
                least 0 and adding up to 1: it then counts in group g with that weight. Another value makes the loss NaN
                and leaves alpha (``GRPO_KERNELS_DEBUG=1`` raises instead).
            ref_logps: (2B,) log-probabilities under the reference policy, without gradient.
            beta, margin, weights, label_smoothing: per-pair overrides as in `preference_losses`.
            token_weights: labels' shape, as in `sequence_logps`.
            token_counts: (2B,) for losses of means; by default the tokens that count.
            total_pairs: pairs of the whole optimiser step, over all its forwards and ranks, for ``update="lagged"``.
                The loss is then this batch's share of the step, to be added up over forwards (the engine must not
                divide by their number) and ranks, and nothing is communicated before `GroupWeights.step`.
        """
        validation.check_option_names(options, PairOptions)
        given: dict[str, Any] = {**options}
        total_pairs, token_weights = given.pop("total_pairs", None), given.pop("token_weights", None)
        sharing = dtensor.sharing_groups(logits)
        validation.check_pair_batch("logits", dtensor.own_rows(logits), cu_seqlens)
        logits, rows = rows_of_logits(logits, labels, self._row_options(cu_seqlens, token_weights))
        self._check_total_pairs(total_pairs, sharing)
        entry = backend_of("logits", logits, self.backend)
        pairs = self._pairs_of(rows, group_ids, ref_logps, given)
        whole_rows = rows.vocab_shard is None and rows.context_group is None and total_pairs is None
        known = self.group_weights.is_default_rule and pairs.is_fused and token_weights is None
        if entry.fuses_loss and known and whole_rows:
            return self._fused(entry.name, logits, rows, pairs)
        return self._of_pairs(logps_of_rows(logits, rows, self.inplace_backward, entry), pairs, total_pairs)

    def _fused(self, backend: str, logits: Tensor, rows: Rows, pairs: Pairs) -> GroupRobustOutput:
        """`_of_pairs` of `logps_of_rows` in one operator."""
        if self.inplace_backward:
            validation.check_no_overlap("logits", logits)
        groups = self.group_weights
        update = groups.update_of_forward(self.training)
        groups.check_ranks(update, logits)
        of_operator = (*ops.ROWS.pack(rows), *ops.PAIRS.pack(pairs), *ops.GROUPS.pack(groups.fused_state(update)))
        found = FusedGroupRobustLoss.apply(self.inplace_backward, backend, logits, *of_operator)
        loss, of_sequences, of_pairs, of_groups, counts = found
        logps = of_sequences[tables.LOGPS]
        if groups.num_ranks > 1:
            groups.count_shared(update)
        groups.after_forward(update, logps.detach())
        groups.saw_fused(update, of_groups[tables.ALPHA], counts)
        self._watch_eval(loss)
        output = GroupRobustOutput(
            loss=loss,
            pair_losses=of_pairs[tables.PAIR_LOSSES],
            group_losses=of_groups[tables.GROUP_LOSSES],
            group_counts=counts,
            alpha=of_groups[tables.ALPHA].detach(),
            chosen_logps=logps,
            rejected_logps=logps,
            chosen_rewards=logps,
            rejected_rewards=logps,
            group_means=of_groups[tables.SUMS].detach() / counts,
        )
        rewards = pairs.chosen_and_rejected(of_sequences[tables.REWARDS].detach())
        return self._with_logps(output, pairs.chosen_and_rejected(logps), rewards)


class LinearGroupRobustLoss(GroupRobustLossBase):
    """`GroupRobustLoss` on hidden states and the head's weight; the (2B, T, V) logits are never held.

    Arguments and defaults are those of `GroupRobustLoss`, without ``inplace_backward``, and

    Args:
        max_extra_bytes, accumulate_dtype: see `linear_sequence_logps`.
        plan: "auto", or "sweep", "keep" or "recompute" to force what is kept for the backward; see
            `grpo_kernels.kernels.linear_plan`. Where other losses use the output's log-probabilities, too, "sweep"
            computes logits twice: prefer "keep" or "recompute".
    """

    def __init__(
        self,
        group_weights: GroupWeights,
        *,
        max_extra_bytes: int | str = "auto",
        plan: str = "auto",
        accumulate_dtype: torch.dtype = torch.float32,
        **options: Unpack[LossOptions],
    ) -> None:
        super().__init__(group_weights, **options)
        self.budget = Budget(max_extra_bytes, plan, accumulate_dtype)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, plan={self.budget.plan!r}, max_extra_bytes={self.budget.max_extra_bytes!r}, "
            f"accumulate_dtype={self.budget.accumulate_dtype}"
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
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        **options: Unpack[PairOptions],
    ) -> GroupRobustOutput:
        """As `GroupRobustLoss.forward`, with hidden (2B, T, D) or packed (N, D), weight (V, D) and bias (V,).

        ``ref_hidden`` (2B, T, D') or (N, D') with ``ref_weight`` (V, D') in place of ``ref_logps``: the reference
        policy's log-probabilities are computed here, without gradients: one more product.
        """
        validation.check_option_names(options, PairOptions)
        given: dict[str, Any] = {**options}
        total_pairs, token_weights = given.pop("total_pairs", None), given.pop("token_weights", None)
        sharing = dtensor.sharing_groups(hidden, weight)
        validation.check_pair_batch("hidden", dtensor.own_rows(hidden), cu_seqlens)
        row_options = self._row_options(cu_seqlens, token_weights)
        if ref_hidden is not None or ref_weight is not None or ref_bias is not None:
            validation.check_online_reference(ref_hidden, ref_weight, ref_logps, self.reference_free)
            assert ref_hidden is not None
            assert ref_weight is not None
            ref_logps = self._ref_logps(ref_hidden, ref_weight, ref_bias, labels, row_options)
        self._check_total_pairs(total_pairs, sharing)
        of_rows: dict[str, Any] = {**row_options}
        head = checked_head(weight, bias, of_rows)
        hidden, head, rows = rows_of_hidden(hidden, head, labels, of_rows)
        pairs = self._pairs_of(rows, group_ids, ref_logps, given)
        assert pairs.group_ids is not None
        # A sweep knows the losses that pairs have, and with "preference" alpha is moved by others.
        is_known = not self.spec_of_alpha or self.group_weights.update_mode == "lagged"
        forecast = forecast_of(self.group_weights, pairs.group_ids, self.training) if is_known else None
        entry = backend_of("hidden", hidden, self.backend)
        logps = linear_logps_of_rows(hidden, head, rows, self.budget, entry, pairs, forecast)
        return self._of_pairs(logps, pairs, total_pairs)

    @torch.no_grad()
    def _ref_logps(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, row_options: RowOptions
    ) -> Tensor:
        return linear_sequence_logps(
            hidden,
            weight,
            labels,
            bias=bias,
            max_extra_bytes=self.budget.max_extra_bytes,
            backend=self.backend,
            **row_options,
        )
