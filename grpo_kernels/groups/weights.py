"""GroupWeights: alpha, the weights of the groups, and the only state of the method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_kernels import validation
from grpo_kernels.distributed import group_sync, reduction
from grpo_kernels.groups import tilt
from grpo_kernels.groups.memberships import Memberships
from grpo_kernels.groups.rules import ALPHA_RULES
from grpo_kernels.groups.updates import AlphaUpdates, as_the_forward_finds_it
from grpo_kernels.kernels.group_robust import GroupState
from grpo_kernels.types import ESTIMATORS, PRIORS, UPDATE_MODES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GroupWeights(AlphaUpdates):
    """Weights alpha of K groups on the simplex, moved towards the groups that do worst.

    One update is a step of exponentiated gradient ascent on the group losses L_g of a batch:
    ``alpha_g <- alpha_g exp(step_size * L_g) / sum_k alpha_k exp(step_size * L_k)`` (Ramesh et al. 2024,
    algorithm 1). It is kept and computed as log alpha in float64, whatever dtype the module is cast to.

    Args:
        num_groups: K; may be left out when ``group_sizes`` is given.
        group_sizes: (K,) whole numbers N_g >= 1, the pairs of each group in the training set. The importance
            estimator and the adjustment need them.
        step_size: eta >= 0; 0 keeps alpha uniform. For the default rule. "auto": chosen anew after each batch, log K
            over the sum of what finite steps have cost so far (AdaHedge, `grpo_kernels.groups.hedge`): no scale, no
            horizon. It begins boldly: after the first batch whose losses differ the worst group has K times the weight
            of one with the mean loss. With it ``floor`` is mixed in after each update, and not fed back.
        estimator: "importance": L_g = (N / N_g) / B * sum of the group's pair losses, for pairs drawn from the pooled
            data. "group_mean": the mean over the batch's pairs of the group, for batches balanced over groups; a
            group that the batch lacks keeps its alpha.
        adjustment: C >= 0; adds C / sqrt(N_g) to the losses that move alpha (group DRO, Sagawa et al. 2020).
        update: "inline": each training forward moves alpha before it weighs the loss, as in the paper. "lagged":
            forwards weigh with the current alpha and add up statistics; call `step` beside ``optimizer.step()``.
            Right under gradient accumulation.
        floor: in [0, 1): alpha becomes ``(1 - floor) * alpha + floor / K`` after each update, so no group falls below
            floor / K and any can come back.
        chi: in [0, 1]: the loss is weighed by ``(1 - chi) / K + chi * alpha`` and the step is eta * chi. 1 is the
            method, 0 plain importance sampling (paper, appendix B.4).
        rule: how the losses L_g move alpha; each rule takes one of the numbers below and refuses the others. mu is
            the prior. Only the first goes on from the last alpha, and so averages over batches; give the others
            large batches or ``loss_ema``.
            "exponentiated_gradient" (step_size): as above.
            "soft_maximum" (temperature): ``alpha = softmax(log mu + L / temperature)``.
            "cvar" (level): ``max <alpha, L>`` over alpha_g <= mu_g / level; the worst ``level`` of the groups' mass.
            "chi_squared" (radius): ``max <alpha, L>`` over sum_g (alpha_g - mu_g)^2 / mu_g <= radius.
            "power" (exponent): alpha_g in proportion to ``mu_g max(0, L_g)^exponent``; the prior where no L_g is
            positive.
        of_rule: the number of another rule than the default. ``temperature`` > 0: a small one is the maximum, a large
            one the prior. ``level`` in (0, 1]: 1 is the prior, 1 / K or less with a uniform prior the worst group
            alone, k / K the k worst. ``radius`` >= 0: 0 is the prior. ``exponent`` >= 0: 0 is the prior.
        prior: mu, "uniform" or "sizes" (N_g / N).
        process_group: the data-parallel ranks whose pairs make one batch; None: all ranks, where torch.distributed is
            initialised. A training forward sums group statistics over them, so that alpha and the loss are those of
            the whole batch on every rank; all must call it together. Forwards in eval mode or under no_grad are the
            rank's own and communicate nothing.
        gradient_reduction: "mean" where the engine averages gradients over those ranks (DDP, FSDP, ZeRO), "sum" where
            it adds them up, or the loop multiplies the loss by the number of ranks; "auto" where
            `find_gradient_reduction` is to tell. "mean" is refused by the first forward of modules whose gradients
            FSDP2 adds up; anything else that is wrong is believed unless `find_gradient_reduction` is called.
        loss_ema: d in [0, 1): alpha is moved by a running mean of L_g, ``(1 - d) sum_j d^j L_g(t - j)``, its weights
            normalised to 1. With "group_mean" a group's mean goes on when a batch has it, and it takes part in the
            rule from the first time on.
        baseline: what a group's mean pair loss is measured against: alpha is moved by ``max(0, L_g - baseline_g)``, so
            that a group that is merely hard does not take all the weight (excess risk; DoReMi, Xie et al. 2023). (K,)
            numbers, such as the losses of a policy trained for the group alone; or "running": the lowest that a running
            mean over some ten batches of the group has been, against groups that lose what they had. The loss itself
            is not changed. A batch's excess is cut off at 0 after ``loss_ema``, which small batches need.
        inner_tilt: tau, not 0: L_g is the tilted mean of the group's pair losses, ``tau log mean exp(l / tau)``.
            Positive: its worst pairs count more. Negative: they count less, as outliers. See
            `grpo_kernels.groups.tilt`.

    Attributes:
        skipped_updates: 0-d int64, updates left out because a group's loss was not finite.
        shared_updates: 0-d int64, updates made over several ranks; ranks whose numbers differ get an error.
        settings: the options above as numbers, so that loading a checkpoint can say which ones differ.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.

    Example:
        >>> groups = GroupWeights(group_sizes=[30, 10], step_size=1.0)
        >>> groups.update(torch.tensor([3.0, 3.0]), torch.tensor([3, 1]))  # the rare group did worse
        >>> groups.alpha
        tensor([0.1192, 0.8808], dtype=torch.float64)
    """

    def __init__(
        self,
        num_groups: int | None = None,
        *,
        group_sizes: Any = None,
        step_size: float | str | None = None,
        estimator: str = "importance",
        adjustment: float = 0.0,
        update: str = "inline",
        floor: float = 0.0,
        chi: float = 1.0,
        rule: str = "exponentiated_gradient",
        prior: str = "uniform",
        loss_ema: float = 0.0,
        baseline: Any = None,
        inner_tilt: float | None = None,
        process_group: ProcessGroup | None = None,
        gradient_reduction: str = "mean",
        **of_rule: Any,
    ) -> None:
        super().__init__()
        validation.check_choice("gradient_reduction", gradient_reduction, ("mean", "sum", "auto"))
        self.rule_parameter = validation.rule_parameter(rule, {"step_size": step_size, **of_rule}, ALPHA_RULES)
        self.is_hedged = step_size == "auto"
        validation.check_choice("prior", prior, PRIORS)
        validation.check_number("loss_ema", loss_ema, 0.0, 1.0, open_high=True)
        validation.check_number("adjustment", adjustment, 0.0)
        validation.check_number("floor", floor, 0.0, 1.0, open_high=True)
        validation.check_number("chi", chi, 0.0, 1.0)
        validation.check_choice("estimator", estimator, ESTIMATORS)
        validation.check_choice("update", update, UPDATE_MODES)
        needs = {"estimator='importance'": estimator == "importance", "prior='sizes'": prior == "sizes"}
        needs[f"adjustment={adjustment}"] = adjustment > 0
        self.num_groups, self.given_sizes = validation.groups(
            num_groups, group_sizes, [name for name, is_true in needs.items() if is_true]
        )
        self.rule = rule
        self.step_size = self.rule_parameter if rule == "exponentiated_gradient" and not self.is_hedged else 0.0
        self.prior = prior
        self.loss_ema = float(loss_ema)
        self.estimator = estimator
        self.adjustment = float(adjustment)
        self.update_mode = update
        self.floor = float(floor)
        self.chi = float(chi)
        self.gradient_reduction = gradient_reduction
        self.has_running_baseline = isinstance(baseline, str)
        self.given_baseline = validation.baseline(baseline, self.num_groups)
        self.inner_tilt = validation.inner_tilt(inner_tilt)
        self._make_state(process_group)

    def find_gradient_reduction(self, model: nn.Module) -> str:
        """Ask the engine around ``model`` whether it averages or adds up the gradients of ranks, or measure it.

        DistributedDataParallel without a hook, FSDP2 and DeepSpeed say so: "auto" takes their answer, "mean" and "sum"
        are compared with it. Gradients that something else reduces before ``optimizer.step()`` are compared with the
        ranks' own at its first call, which raises, before anything moves, where they are not what was taken for granted
        ("mean" by "auto"). Neither clip nor scale them at that step: it could not be told apart.

        Returns:
            What holds from now on, "mean" or "sum".

        Raises:
            ValueError: the engine does not do what ``gradient_reduction`` says, or neither.
        """
        if self.num_ranks == 1:
            return "mean" if self.gradient_reduction == "auto" else self.gradient_reduction
        found = reduction.of_engine(model, self.num_ranks)
        if self.gradient_reduction == "auto":
            self.gradient_reduction = "mean" if found == reduction.UNKNOWN else found
        if found == reduction.UNKNOWN:
            reduction.Probe(model, self.gradient_reduction, self.process_group)
        reduction.check_answer(found, self.gradient_reduction)
        return self.gradient_reduction

    def loss_sums(self, losses: Tensor, members: Memberships, training: bool) -> Tensor:
        """(K,): what a forward's pair losses (B,), the rank's own, add up to by group.

        With ``inner_tilt`` they are tilted; over several ranks that is a collective where the forward moves alpha.
        """
        if not self.inner_tilt:
            return members.sums(losses)
        update = self.update_of_forward(training)
        if self.update_mode == "lagged" and update != "none":
            if update == "lagged":
                self.accumulate_tilts(members.log_sum_exp(losses.detach().double() / self.inner_tilt))
            return tilt.sums_of_forward(losses, members, self.inner_tilt, as_the_forward_finds_it(self.tilted_means))
        several_ranks = update == "inline" and self.num_ranks > 1
        ranks = self._process_group_or_world() if several_ranks else None
        return tilt.sums_of_batch(losses, members, self.inner_tilt, ranks)

    def take_in(
        self,
        group_loss_sums: Tensor,
        group_counts: Tensor,
        logps: Tensor,
        *,
        training: bool = True,
        context_size: int = 1,
        total_pairs: Any = None,
        sums_of_alpha: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What a forward of the loss does with the statistics of the rank's batch (K,): sum them over the ranks and
        move alpha, or keep them for `step`, or nothing.

        Returns:
            sums (differentiable) and counts that the loss is made of. Their value is the whole batch's, the same on
            every rank; with ``total_pairs`` it is the rank's own. The gradient goes to the rank's own pairs, scaled for
            the engine's reduction over ``context_size`` times as many ranks. ``logps`` (2B,) tell one batch from
            another; ``training`` is the loss's own mode; ``sums_of_alpha`` (K,) move alpha in place of the losses'.
        """
        update = self.update_of_forward(training)
        self.check_ranks(update, group_loss_sums)
        own_sums, several_ranks = group_loss_sums.detach(), update != "none" and self.num_ranks > 1
        if update != "none":
            own_sums = as_the_forward_finds_it(own_sums)  # in lagged mode, too, it must not be run again
        scale = 1.0 if update == "none" else self.gradient_scale
        if context_size > 1 and update != "none" and self._averages():
            scale *= context_size
        batch_sums, batch_counts, moving_sums = own_sums, group_counts, own_sums
        if sums_of_alpha is not None:  # a loss that is not finite skips the step, whatever moves alpha
            moving_sums = as_the_forward_finds_it(torch.where(own_sums.isfinite(), sums_of_alpha, torch.nan))
        if several_ranks and total_pairs is None:
            of_rank = moving_sums
            batch_sums, batch_counts = self._sum_over_ranks(own_sums, group_counts)
            moving_sums = batch_sums if sums_of_alpha is None else self._sum_over_ranks(of_rank, group_counts)[0]
            self.count_shared(update)
        if update == "lagged":
            self.accumulate(moving_sums, batch_counts, sum_over_ranks=total_pairs is not None)
        elif update == "inline":
            self._update(moving_sums, batch_counts)
        self.after_forward(update, logps, total_pairs)
        if several_ranks or scale != 1:
            group_loss_sums = batch_sums + scale * (group_loss_sums - own_sums)
        return group_loss_sums, batch_counts

    def fused_state(self, update: str) -> GroupState:
        """What a kernel that fuses the whole loss reads and moves in a forward that has ``update`` to do."""
        several_ranks = update != "none" and self.num_ranks > 1
        return GroupState(
            self.log_alpha,
            self.group_sizes,
            self.pending_sums,
            self.pending_counts,
            self.skipped_updates,
            self.estimator,
            self.step_size,
            self.adjustment,
            self.floor,
            self.chi,
            "none" if update == "recomputed" else update,
            group_sync.name_of(self.process_group) if several_ranks else "",
            self.gradient_scale if several_ranks else 1.0,
            self.clock() if several_ranks else None,
        )

    def check_total_pairs(self, total_pairs: Any, sharing: Sequence[ProcessGroup] = ()) -> None:
        """``sharing``: groups of ranks that have the same pairs (their vocabulary or positions are sharded)."""
        if total_pairs is None:
            return
        if self.update_mode != "lagged" or self.estimator != "importance":
            raise ValueError(
                "total_pairs belongs to update='lagged' and estimator='importance', got "
                f"update={self.update_mode!r} and estimator={self.estimator!r}"
            )
        if not isinstance(total_pairs, Tensor):
            validation.check_number("total_pairs", total_pairs, 1)
        elif total_pairs.numel() != 1:
            raise ValueError(f"total_pairs must be one number, got shape {tuple(total_pairs.shape)}")
        for group in sharing:
            if group_sync.shares_ranks(self.process_group, group):
                raise ValueError(
                    "process_group must be given, GroupWeights(process_group=<the data-parallel ranks>), where "
                    "total_pairs is, for ranks that share pairs (vocab_shard, context_group or DTensors): the group of "
                    f"{self.num_ranks} ranks would count each pair more than once and multiply gradients"
                )

    def check_ranks(self, update: str, of_model: Tensor) -> None:
        """Refuse what several ranks cannot do exactly; ``of_model`` has the autograd graph of the model's forward."""
        if update == "none" or self.num_ranks == 1:
            return
        if update == "recomputed":
            raise RuntimeError(
                "a GroupRobustLoss over several ranks cannot be run again by activation checkpointing: keep the loss "
                "outside the checkpointed region"
            )
        if self._watch.has_checked_graph or torch.compiler.is_compiling():
            return
        if self.gradient_reduction == "mean":
            reduction.check_not_summed(of_model)
        self._watch.has_checked_graph = True

    def update_of_forward(self, training: bool = True) -> str:
        """What a forward of the loss has to do now: "inline", "lagged", "recomputed" or "none".

        Nothing in eval mode (the loss's, ``training=False``, or these weights' own), under no_grad, and when activation
        checkpointing runs the forward again inside a backward.
        """
        if not (training and self.training) or not torch.is_grad_enabled():
            return "none"
        if torch.compiler.is_compiling():
            return self.update_mode
        if torch._C._current_graph_task_id() != -1:
            return "recomputed"
        return "none" if group_sync.is_pipeline_inference() else self.update_mode

    def saw_fused(self, update: str, alpha: Tensor, counts: Tensor) -> None:
        """After a kernel has done the update of a forward: (K,) alpha and counts of the whole batch."""
        if update == "inline":
            self.trail.saw(alpha, counts)

    def saw_empty(self, is_empty: Tensor) -> None:
        """Of a training forward: True where a sequence has no counted token."""
        self._watch.saw_empty(is_empty)

    def after_forward(self, update: str, logps: Tensor, total_pairs: Any = None) -> None:
        """Remember the batch (its log-probabilities) by the alpha that weighs it, so that a forward that is run again
        inside a backward can be told from a new one.

        Raises:
            RuntimeError: a forward run again whose batch the present alpha has not weighed.
        """
        if update == "none" or torch.compiler.is_compiling():
            return
        if update == "recomputed":
            self._weighed.check_holds(logps)
            return
        if self.update_mode == "inline":
            self._weighed.clear()
        else:
            self._watch.saw_forward(logps.shape[0] // 2, total_pairs)
        self._weighed.append(logps)
        self._watch.if_skipped(self.skipped_updates)

    def count_shared(self, update: str) -> None:
        """After a forward whose statistics were summed over several ranks."""
        (self.shared_updates if update == "inline" else self._own_statistics().forwards).add_(1)

    def extra_repr(self) -> str:
        return (
            f"num_groups={self.num_groups}, rule={self.rule!r}, "
            f"{ALPHA_RULES[self.rule].parameter}={'auto' if self.is_hedged else self.rule_parameter}, "
            f"estimator={self.estimator!r}, "
            f"adjustment={self.adjustment}, update={self.update_mode!r}, floor={self.floor}, chi={self.chi}, "
            f"prior={self.prior!r}, loss_ema={self.loss_ema}{self._said_options()}"
        )

    def _said_options(self) -> str:
        baseline = "running" if self.has_running_baseline else "given" if self.has_baseline else ""
        options = {"baseline": baseline, "inner_tilt": self.inner_tilt}
        return "".join(f", {name}={value}" for name, value in options.items() if value)
