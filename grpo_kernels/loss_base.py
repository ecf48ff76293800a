"""What GroupRobustLoss and LinearGroupRobustLoss share: options, and everything after the log-probabilities."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, Unpack

import torch
from torch import Tensor, nn

from grpo_kernels import validation
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.distributed import dtensor
from grpo_kernels.groups.memberships import Memberships
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.logps import losses_of_pairs, token_counts_of
from grpo_kernels.loss_spec import LossSpec
from grpo_kernels.types import (
    ALPHA_FOLLOWS,
    IGNORE_INDEX,
    LAYOUTS,
    UPDATE_MODES,
    GroupRobustOutput,
    LogpsOptions,
    RowOptions,
    SpecOptions,
    VocabShard,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GroupRobustLossBase(nn.Module):
    """Options that both losses share, and everything after the sequence log-probabilities."""

    def __init__(
        self,
        group_weights: GroupWeights,
        *,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        reference_free: bool = False,
        average_log_prob: bool = False,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: bool = False,
        vocab_shard: VocabShard | None = None,
        context_group: ProcessGroup | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        layout: str = "chosen_first",
        alpha_follows: str = "loss",
        backend: str = "auto",
        **options: Unpack[SpecOptions],
    ) -> None:
        super().__init__()
        if not isinstance(group_weights, GroupWeights):
            raise TypeError(f"group_weights must be a GroupWeights, got {type(group_weights).__name__}")
        validation.check_number("beta", beta, 0.0, open_low=True)
        validation.check_choice("layout", layout, LAYOUTS)
        validation.check_logit_options(logit_scale, softcap)
        validation.check_option_names(options, SpecOptions)
        self.spec = LossSpec.of(loss_type, **options)
        validation.check_number("label_smoothing", label_smoothing, -math.inf)  # (B,) belongs to a call
        self.spec.check_label_smoothing(label_smoothing)
        if average_log_prob and self.spec.uses_counts:
            raise ValueError(
                f"average_log_prob must be False for loss_type={loss_type!r}, which takes its means itself"
            )
        validation.check_choice("alpha_follows", alpha_follows, ALPHA_FOLLOWS)
        self.spec_of_alpha = self.spec.preferences() if alpha_follows == "preference" else None
        if self.spec_of_alpha and group_weights.inner_tilt:
            raise ValueError(
                "alpha_follows must be 'loss' with inner_tilt, which weighs pairs by the loss that they have"
            )
        self.group_weights = group_weights
        self._said_eval = False
        self.beta = float(beta)
        self.loss_type = loss_type if isinstance(loss_type, str) else list(loss_type)
        self.label_smoothing = float(label_smoothing)
        self.reference_free = reference_free
        self.average_log_prob = average_log_prob
        self.ignore_index = ignore_index
        self.shift_labels = shift_labels
        self.vocab_shard = vocab_shard
        self.context_group = context_group
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.interleaved = layout == "interleaved"
        self.backend = backend

    def from_logps(
        self,
        policy_logps: Tensor,
        group_ids: Tensor,
        ref_logps: Tensor | None = None,
        *,
        token_counts: Tensor | None = None,
        total_pairs: int | Tensor | None = None,
        **options: Unpack[LogpsOptions],
    ) -> GroupRobustOutput:
        """The loss from log-probabilities (2B,) that were computed elsewhere, in the loss's ``layout``.

        In training mode with gradients on: pair losses -> group losses -> alpha update -> loss with the new alpha.
        ``token_counts`` (2B,) for losses of means; ``total_pairs`` and the options ``beta``, ``margin``, ``weights``
        and ``label_smoothing`` as in `GroupRobustLoss.forward`.
        """
        validation.check_option_names(options, LogpsOptions)
        policy_logps, ref_logps = dtensor.unwrapped(policy_logps=policy_logps, ref_logps=ref_logps)
        validation.check_logps(policy_logps, ref_logps)
        num_pairs = policy_logps.shape[0] // 2
        pairs = self._pairs(num_pairs, policy_logps.device, group_ids, ref_logps, token_counts, **options)
        self._check_total_pairs(total_pairs)
        self._watch_empty(pairs)
        return self._of_pairs(policy_logps, pairs, total_pairs)

    def from_pair_losses(
        self, pair_losses: Tensor, group_ids: Tensor, *, total_pairs: int | Tensor | None = None
    ) -> GroupRobustOutput:
        """The group-robust loss of losses (B,) that were computed elsewhere, of pairs or of anything that has a group.

        What is known of log-probabilities only is NaN in the output: logps, rewards, and their metrics.

        Args:
            pair_losses: (B,) float32 or float64, with their gradient.
            group_ids, total_pairs: as in `GroupRobustLoss.forward`.

        Example:
            >>> from grpo_kernels import GroupRobustLoss
            >>> loss_fn = GroupRobustLoss(GroupWeights(num_groups=2, estimator="group_mean", step_size=1.0))
            >>> out = loss_fn.from_pair_losses(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))
            >>> out.alpha  # the worse group gains: e^1 to e^0
            tensor([0.2689, 0.7311], dtype=torch.float64)
        """
        pair_losses, group_ids = dtensor.unwrapped(pair_losses=pair_losses, group_ids=group_ids)
        validation.check_pair_losses(pair_losses)
        self._check_total_pairs(total_pairs)
        num_pairs = pair_losses.shape[0]
        validation.check_weights_device(self.group_weights.log_alpha, pair_losses.device)
        validation.check_group_ids(group_ids, num_pairs, self.group_weights.num_groups, pair_losses.device)
        unknown = torch.full((2, num_pairs), torch.nan, dtype=pair_losses.dtype, device=pair_losses.device)
        output = self._of_losses(pair_losses, group_ids, pair_losses.detach().repeat(2), total_pairs)
        return self._with_logps(output, unknown, unknown)

    def _pairs(
        self,
        num_pairs: int,
        device: torch.device,
        group_ids: Tensor,
        ref_logps: Tensor | None,
        token_counts: Tensor | None,
        *,
        beta: float | Tensor | None = None,
        margin: Tensor | None = None,
        weights: Tensor | None = None,
        label_smoothing: float | Tensor | None = None,
    ) -> Pairs:
        """The batch's pairs, checked, with the loss's own beta and smoothing where the call names none."""
        group_ids, ref_logps, token_counts = dtensor.unwrapped(
            group_ids=group_ids, ref_logps=ref_logps, token_counts=token_counts
        )
        beta, margin, weights, label_smoothing = dtensor.unwrapped(
            beta=beta, margin=margin, weights=weights, label_smoothing=label_smoothing
        )
        validation.check_weights_device(self.group_weights.log_alpha, device)
        if self.spec.uses_reference:
            validation.check_reference(self.reference_free, ref_logps)
        validation.check_group_ids(group_ids, num_pairs, self.group_weights.num_groups, device)
        beta = self.beta if beta is None else beta
        label_smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        pairs = Pairs(
            group_ids, ref_logps, margin, weights, token_counts, beta, label_smoothing, self.spec, self.interleaved
        )
        pairs.check(num_pairs, device)
        return pairs

    def _pairs_of(self, rows: Rows, group_ids: Tensor, ref_logps: Tensor | None, options: dict[str, Any]) -> Pairs:
        counts = options.pop("token_counts", None)
        if counts is None and self.spec.uses_counts:
            counts = token_counts_of(rows)
        pairs = self._pairs(rows.num_sequences // 2, rows.labels.device, group_ids, ref_logps, counts, **options)
        self._watch_empty(pairs, rows)
        return pairs

    def _of_pairs(self, policy_logps: Tensor, pairs: Pairs, total_pairs: int | Tensor | None) -> GroupRobustOutput:
        assert pairs.group_ids is not None
        losses, logps = losses_of_pairs(policy_logps, pairs), policy_logps.detach()
        of_alpha = None
        if self.spec_of_alpha:
            of_alpha = losses_of_pairs(logps, replace(pairs, spec=self.spec_of_alpha))
        output = self._of_losses(losses, pairs.group_ids, logps, total_pairs, of_alpha)
        ratios = logps if pairs.ref_logps is None else logps - pairs.ref_logps
        rewards = [pairs.beta * x for x in pairs.chosen_and_rejected(ratios)]
        return self._with_logps(output, pairs.chosen_and_rejected(policy_logps), rewards)

    def _of_losses(
        self,
        losses: Tensor,
        group_ids: Tensor,
        of_batch: Tensor,
        total_pairs: int | Tensor | None,
        of_alpha: Tensor | None = None,
    ) -> GroupRobustOutput:
        """Group losses, alpha and the loss, without logps. ``of_batch``: (2B,) detached, that tell it from others.

        ``of_alpha``: (B,) detached, what moves alpha in place of the losses.
        """
        groups = self.group_weights
        # An id outside [0, K) indexes nothing: its pair's loss becomes NaN, and with it the batch's.
        members, known = Memberships.of(group_ids, groups.num_groups)
        losses = losses.masked_fill(~known, torch.nan)
        own_counts = members.counts()
        sums, counts = groups.take_in(
            groups.loss_sums(losses, members, self.training),
            own_counts,
            of_batch,
            training=self.training,
            context_size=self._context_size(),
            total_pairs=total_pairs,
            sums_of_alpha=None if of_alpha is None else members.sums(of_alpha.masked_fill(~known, torch.nan)),
        )
        group_losses = groups.group_losses(sums, counts, total_pairs)
        loss = (groups.loss_weights() * group_losses).sum().to(losses.dtype)
        self._watch_eval(loss)
        means = members.sums(losses.detach()) / own_counts if groups.inner_tilt else sums.detach() / counts
        nothing = losses.new_empty(0)
        return GroupRobustOutput(
            loss=loss,
            pair_losses=losses,
            group_losses=group_losses,
            group_counts=counts,
            alpha=groups.alpha,
            chosen_logps=nothing,
            rejected_logps=nothing,
            chosen_rewards=nothing,
            rejected_rewards=nothing,
            group_means=means,
        )

    @staticmethod
    def _with_logps(
        output: GroupRobustOutput, logps: Tensor | Sequence[Tensor], rewards: Tensor | Sequence[Tensor]
    ) -> GroupRobustOutput:
        """``logps`` and ``rewards``: of the chosen and of the rejected, (B,) each."""
        return output._replace(
            chosen_logps=logps[0], rejected_logps=logps[1], chosen_rewards=rewards[0], rejected_rewards=rewards[1]
        )

    def _row_options(self, cu_seqlens: Tensor | None, token_weights: Tensor | None) -> RowOptions:
        return {
            "cu_seqlens": cu_seqlens,
            "shift_labels": self.shift_labels,
            "ignore_index": self.ignore_index,
            "average": self.average_log_prob,
            "token_weights": token_weights,
            "vocab_shard": self.vocab_shard,
            "context_group": self.context_group,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
        }

    def train(self, mode: bool = True) -> Self:
        """The mode of this loss alone: the weights, which other losses may share, stay in theirs."""
        if not isinstance(mode, bool):
            raise ValueError(f"mode must be a bool, got {type(mode).__name__}")
        self.training = mode
        for child in self.children():
            if child is not self.group_weights:
                child.train(mode)
        return self

    def _watch_empty(self, pairs: Pairs, rows: Rows | None = None) -> None:
        """Sequences that train nothing, where that can be told: a rank with a part of the positions cannot."""
        if torch.compiler.is_compiling() or self.group_weights.update_of_forward(self.training) not in UPDATE_MODES:
            return
        if pairs.token_counts is not None:
            is_empty = pairs.by_pair(pairs.token_counts) == 0
        elif rows is not None and rows.context_group is None:
            is_empty = pairs.by_pair(rows.are_empty())
        else:
            return
        self.group_weights.saw_empty(is_empty if pairs.weights is None else is_empty & (pairs.weights != 0))

    def _watch_eval(self, loss: Tensor) -> None:
        """Who trains with a loss in eval mode has most likely forgotten ``train()`` after an evaluation."""
        if not (self.training or self._said_eval or torch.compiler.is_compiling()) and loss.requires_grad:
            loss.register_hook(self._warn_of_eval)

    def _warn_of_eval(self, _: Tensor) -> None:
        if not self._said_eval:
            self._said_eval = True
            warnings.warn(
                "the backward of a loss in eval mode: its forwards do not move alpha, nor sum over ranks. Call "
                "loss_fn.train() after an evaluation; to train with a fixed alpha on purpose, keep the loss in "
                "training mode and put its group_weights into eval mode. This warns once",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_total_pairs(self, total_pairs: Any, sharing: Sequence[ProcessGroup] = ()) -> None:
        """``sharing``: groups of ranks with the same pairs, besides those of this loss's options."""
        of_shard = None if self.vocab_shard is None else self.vocab_shard.process_group
        groups = [group for group in (of_shard, self.context_group, *sharing) if group is not None]
        self.group_weights.check_total_pairs(total_pairs, groups)

    def _context_size(self) -> int:
        return 1 if self.context_group is None else torch.distributed.get_world_size(self.context_group)

    def extra_repr(self) -> str:
        return (
            f"beta={self.beta}, loss_type={self.loss_type!r}, label_smoothing={self.label_smoothing}, "
            f"reference_free={self.reference_free}, average_log_prob={self.average_log_prob}, "
            f"interleaved={self.interleaved}, logit_scale={self.logit_scale}, softcap={self.softcap}, "
            f"backend={self.backend!r}"
        )
