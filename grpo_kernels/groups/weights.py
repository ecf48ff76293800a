"""GroupWeights: alpha, the weights of the groups, and the only state of the method."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_kernels import validation
from grpo_kernels.distributed import group_sync, reduction
from grpo_kernels.groups import state, statistics
from grpo_kernels.groups.rules import ALPHA_RULES, moved_log_alpha
from grpo_kernels.groups.watch import Watch
from grpo_kernels.kernels import ops  # noqa: F401  (defines torch.ops.grpo_kernels)
from grpo_kernels.kernels.group_robust import GroupState
from grpo_kernels.types import ESTIMATORS, PRIORS, UPDATE_MODES

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GroupWeights(nn.Module):
    """Weights alpha of K groups on the simplex, moved towards the groups that do worst.

    One update is a step of exponentiated gradient ascent on the group losses L_g of a batch:
    ``alpha_g <- alpha_g exp(step_size * L_g) / sum_k alpha_k exp(step_size * L_k)`` (Ramesh et al. 2024,
    algorithm 1). It is kept and computed as log alpha in float64, whatever dtype the module is cast to.

    Args:
        num_groups: K; may be left out when ``group_sizes`` is given.
        group_sizes: (K,) whole numbers N_g >= 1, the pairs of each group in the training set. The importance
            estimator and the adjustment need them.
        step_size: eta >= 0; 0 keeps alpha uniform. For the default rule.
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
        temperature: tau > 0; a small one is the maximum, a large one the prior.
        level: in (0, 1]; 1 is the prior, 1 / K or less with a uniform prior the worst group alone.
        radius: at least 0; 0 is the prior.
        prior: mu, "uniform" or "sizes" (N_g / N).
        process_group: the data-parallel ranks whose pairs make one batch; None: all ranks, where torch.distributed is
            initialised. A training forward sums group statistics over them, so that alpha and the loss are those of
            the whole batch on every rank; all must call it together. Forwards in eval mode or under no_grad are the
            rank's own and communicate nothing.
        gradient_reduction: "mean" where the engine averages gradients over those ranks (DDP, FSDP, ZeRO), "sum" where
            it adds them up, "auto" where `find_gradient_reduction` is to tell.
        loss_ema: d in [0, 1): alpha is moved by a running mean of L_g, ``(1 - d) sum_j d^j L_g(t - j)``, its weights
            normalised to 1. With "group_mean" a group's mean goes on when a batch has it, and it takes part in the
            rule from the first time on.

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

    log_alpha: Tensor
    group_sizes: Tensor | None
    pending_sums: Tensor
    pending_counts: Tensor
    skipped_updates: Tensor
    shared_updates: Tensor
    settings: Tensor
    ema_losses: Tensor
    ema_weights: Tensor

    def __init__(
        self,
        num_groups: int | None = None,
        *,
        group_sizes: Any = None,
        step_size: float | None = None,
        estimator: str = "importance",
        adjustment: float = 0.0,
        update: str = "inline",
        floor: float = 0.0,
        chi: float = 1.0,
        rule: str = "exponentiated_gradient",
        temperature: float | None = None,
        level: float | None = None,
        radius: float | None = None,
        prior: str = "uniform",
        loss_ema: float = 0.0,
        process_group: ProcessGroup | None = None,
        gradient_reduction: str = "mean",
    ) -> None:
        super().__init__()
        validation.check_choice("gradient_reduction", gradient_reduction, ("mean", "sum", "auto"))
        numbers = {"step_size": step_size, "temperature": temperature, "level": level, "radius": radius}
        self.rule_parameter = validation.rule_parameter(rule, numbers, ALPHA_RULES)
        validation.check_choice("prior", prior, PRIORS)
        validation.check_number("loss_ema", loss_ema, 0.0, 1.0, open_high=True)
        validation.check_number("adjustment", adjustment, 0.0)
        validation.check_number("floor", floor, 0.0, 1.0, open_high=True)
        validation.check_number("chi", chi, 0.0, 1.0)
        validation.check_choice("estimator", estimator, ESTIMATORS)
        validation.check_choice("update", update, UPDATE_MODES)
        needs = {"estimator='importance'": estimator == "importance", "prior='sizes'": prior == "sizes"}
        needs[f"adjustment={adjustment}"] = adjustment > 0
        self.num_groups, sizes = validation.groups(
            num_groups, group_sizes, [name for name, is_true in needs.items() if is_true]
        )
        self.rule = rule
        self.step_size = self.rule_parameter if rule == "exponentiated_gradient" else 0.0
        self.prior = prior
        self.loss_ema = float(loss_ema)
        self.estimator = estimator
        self.adjustment = float(adjustment)
        self.update_mode = update
        self.floor = float(floor)
        self.chi = float(chi)
        self.gradient_reduction = gradient_reduction
        self._ranks = group_sync.SharedGroup(process_group)
        self._own: statistics.OwnStatistics | None = None
        self._watch = Watch()
        self._weighed = statistics.WeighedBatches()
        self.register_buffer("log_alpha", torch.empty(self.num_groups, dtype=torch.float64))
        self.register_buffer("group_sizes", sizes)
        self.register_buffer("pending_sums", torch.empty(self.num_groups, dtype=torch.float64))
        self.register_buffer("pending_counts", torch.empty(self.num_groups, dtype=torch.int64))
        self.register_buffer("skipped_updates", torch.empty((), dtype=torch.int64))
        self.register_buffer("shared_updates", torch.empty((), dtype=torch.int64))
        self.register_buffer("settings", torch.empty_like(state.settings_of(self)))
        for name in ("ema_losses", "ema_weights"):
            buffer = torch.empty(self.num_groups, dtype=torch.float64) if loss_ema else None
            self.register_buffer(name, buffer)
        self.reset_parameters()
        self.register_state_dict_pre_hook(GroupWeights._warn_before_saving)

    def reset_parameters(self) -> None:
        """Uniform alpha, no pending statistics. (Also what fills the buffers after ``to_empty``.)"""
        with torch.no_grad():
            self.log_alpha.fill_(-math.log(self.num_groups))
            self.pending_sums.zero_()
            self.pending_counts.zero_()
            self.skipped_updates.zero_()
            self.shared_updates.zero_()
            self.settings.copy_(state.settings_of(self))
            if self.loss_ema:
                self.ema_losses.zero_()
                self.ema_weights.zero_()

    @property
    def alpha(self) -> Tensor:
        """(K,) float64, on the simplex: a copy."""
        return self.log_alpha.exp()

    @property
    def is_default_rule(self) -> bool:
        """True where the update is the plain exponentiated gradient, the one that the fused kernels have."""
        return self.rule == "exponentiated_gradient" and not self.loss_ema

    def loss_weights(self) -> Tensor:
        """(K,) float64: what weighs L_g in the loss; alpha, mixed with the uniform weights if chi < 1."""
        return (1 - self.chi) / self.num_groups + self.chi * self.alpha

    def group_losses(self, group_loss_sums: Tensor, group_counts: Tensor, total_pairs: Any = None) -> Tensor:
        """(K,) float64: L_g by the estimator, from the batch's sums of pair losses and counts of pairs.

        ``total_pairs`` stands for B where the batch is a part of a larger one.
        """
        sums = group_loss_sums.double()
        if self.estimator == "group_mean":
            return sums / group_counts.clamp(min=1)
        assert self.group_sizes is not None  # __init__ asked for them
        sizes = self.group_sizes.double()  # whole numbers divide to float32
        return sizes.sum() / sizes * sums / (group_counts.sum().clamp(min=1) if total_pairs is None else total_pairs)

    def update(self, group_loss_sums: Tensor, group_counts: Tensor, *, sum_over_ranks: bool | None = None) -> None:
        """Move alpha once by the pair-loss sums (K,) and pair counts (K,) of a batch.

        If any sum is not finite, alpha stays, ``skipped_updates`` grows by one and the first time warns.

        Args:
            sum_over_ranks: over several ranks, True: these are the rank's own pairs, and all ranks call this together;
                False: they are all ranks' already, the same on each. None means False, and warns once.
        """
        statistics.check(group_loss_sums, group_counts, self.num_groups)
        if self.num_ranks > 1:
            if sum_over_ranks is None:
                self._watch.once(
                    "local",
                    f"update() moves the alpha of this rank alone, by what it was given: over {self.num_ranks} ranks "
                    "pass sum_over_ranks=True for the rank's own pairs, or False for sums over all ranks",
                )
            elif sum_over_ranks:
                group_loss_sums, group_counts = self._sum_over_ranks(group_loss_sums, group_counts)
            self.shared_updates.add_(1)
        self._update(group_loss_sums, group_counts)

    @torch.no_grad()
    def _update(self, group_loss_sums: Tensor, group_counts: Tensor) -> None:
        present = group_counts > 0
        losses = self.group_losses(group_loss_sums, group_counts)
        if self.estimator == "importance":  # an absent group's loss of 0 is unbiased as it stands
            present = torch.ones_like(present)
        finite = torch.isfinite(group_loss_sums).all() & torch.isfinite(losses).all()
        usable = finite & (group_counts.sum() > 0)
        if self.loss_ema:
            losses, present = self._averaged(losses, present & usable)
        if self.adjustment:
            assert self.group_sizes is not None  # __init__ asked for them
            losses = losses + self.adjustment / self.group_sizes.double().sqrt()
        log_alpha = _as_the_forward_finds_it(self.log_alpha)
        moved = self._moved(log_alpha, losses, present)
        # An empty batch, or one without finite losses, moves nothing.
        self.log_alpha.copy_(torch.where(usable, moved, log_alpha))
        self._weighed.clear()
        self.skipped_updates.add_((~finite).long())
        self._watch.if_skipped(self.skipped_updates)

    def accumulate(self, group_loss_sums: Tensor, group_counts: Tensor, *, sum_over_ranks: bool = True) -> None:
        """Add a batch's statistics to those that the next `step` will use, as forwards do in lagged mode.

        ``sum_over_ranks``: True: they are the rank's own pairs, which `step` will add up over the ranks. False: they
        are all ranks' already, the same on each.
        """
        statistics.check(group_loss_sums, group_counts, self.num_groups)
        with torch.no_grad():
            sums, counts = self.pending_sums, self.pending_counts
            if sum_over_ranks and self.num_ranks > 1:
                sums, counts, _ = self._own_statistics()
            sums.add_(group_loss_sums)
            counts.add_(group_counts)

    @torch.no_grad()
    def step(self) -> None:
        """In lagged mode: one update from all forwards since the last step. Call it beside ``optimizer.step()``.

        Over several ranks it is a collective, the only one of forwards with ``total_pairs``: all ranks must call it,
        those without a pair, too.

        Warns once if forwards gave a ``total_pairs`` other than the pairs that came, if several gave none, or if no
        pair was ever counted.

        Raises:
            RuntimeError: with update="inline"; or ranks that are not at the same step.
        """
        if self.update_mode != "lagged":
            raise RuntimeError("step() belongs to update='lagged'; with update='inline' each forward moves alpha")
        if self.num_ranks > 1:
            own = self._own_statistics()
            self.accumulate(*self._sum_over_ranks(own.sums, own.counts, in_step=True), sum_over_ranks=False)
            for tensor in own:
                tensor.zero_()
            self.shared_updates.add_(1)
        self._watch.at_step(self.pending_counts, self.estimator, self.num_ranks)
        self._update(self.pending_sums, self.pending_counts)
        self.pending_sums.zero_()
        self.pending_counts.zero_()

    @property
    def process_group(self) -> ProcessGroup | None:
        return self._ranks.value

    @property
    def num_ranks(self) -> int:
        """Data-parallel ranks whose pairs make one batch."""
        return group_sync.data_parallel_size(self.process_group)

    @property
    def gradient_scale(self) -> float:
        """What a rank's own loss is multiplied by, so that the engine's reduction gives the whole batch's gradient."""
        return float(self.num_ranks) if self.num_ranks > 1 and self._averages() else 1.0

    def _averages(self) -> bool:
        if self.gradient_reduction == "auto":
            raise RuntimeError(
                "gradient_reduction='auto' over several ranks needs find_gradient_reduction(model), before training "
                "and with the model in its engine"
            )
        return self.gradient_reduction == "mean"

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
        elif found != self.gradient_reduction:
            raise ValueError(
                f"gradient_reduction must be {found!r}, for so the model's engine reduces, got "
                f"{self.gradient_reduction!r}"
            )
        return self.gradient_reduction

    def take_in(
        self,
        group_loss_sums: Tensor,
        group_counts: Tensor,
        logps: Tensor,
        *,
        training: bool = True,
        context_size: int = 1,
        total_pairs: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """What a forward of the loss does with the statistics of the rank's batch (K,): sum them over the ranks and
        move alpha, or keep them for `step`, or nothing.

        Returns:
            sums (differentiable) and counts that the loss is made of. Their value is the whole batch's, the same on
            every rank; with ``total_pairs`` it is the rank's own. The gradient goes to the rank's own pairs, scaled for
            the engine's reduction over ``context_size`` times as many ranks. ``logps`` (2B,) tell one batch from
            another; ``training`` is the loss's own mode.
        """
        update = self.update_of_forward(training)
        self.check_ranks(update)
        own_sums, several_ranks = group_loss_sums.detach(), update != "none" and self.num_ranks > 1
        if update != "none":
            own_sums = _as_the_forward_finds_it(own_sums)  # in lagged mode, too, it must not be run again
        scale = 1.0 if update == "none" else self.gradient_scale
        if context_size > 1 and update != "none" and self._averages():
            scale *= context_size
        batch_sums, batch_counts = own_sums, group_counts
        if several_ranks and total_pairs is None:
            batch_sums, batch_counts = self._sum_over_ranks(own_sums, group_counts)
            self.count_shared(update)
        if update == "lagged":
            self.accumulate(batch_sums, batch_counts, sum_over_ranks=total_pairs is not None)
        elif update == "inline":
            self._update(batch_sums, batch_counts)
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
        for group in sharing:
            if group_sync.shares_ranks(self.process_group, group):
                raise ValueError(
                    "process_group must be given, GroupWeights(process_group=<the data-parallel ranks>), where "
                    "total_pairs is, for ranks that share pairs (vocab_shard, context_group or DTensors): the group of "
                    f"{self.num_ranks} ranks would count each pair more than once and multiply gradients"
                )

    def check_ranks(self, update: str) -> None:
        """Refuse what several ranks cannot do exactly."""
        if update == "recomputed" and self.num_ranks > 1:
            raise RuntimeError(
                "a GroupRobustLoss over several ranks cannot be run again by activation checkpointing: keep the loss "
                "outside the checkpointed region"
            )

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

    def clock(self, in_step: bool = False) -> Tensor:
        """(3,) int64, alike on ranks that are at the same step; see `group_sync.sum_over_ranks`."""
        forwards = self._own_statistics().forwards
        return torch.stack([self.shared_updates, forwards, torch.full_like(forwards, in_step)])

    def count_shared(self, update: str) -> None:
        """After a forward whose statistics were summed over several ranks."""
        (self.shared_updates if update == "inline" else self._own_statistics().forwards).add_(1)

    def extra_repr(self) -> str:
        return (
            f"num_groups={self.num_groups}, rule={self.rule!r}, "
            f"{ALPHA_RULES[self.rule].parameter}={self.rule_parameter}, estimator={self.estimator!r}, "
            f"adjustment={self.adjustment}, update={self.update_mode!r}, floor={self.floor}, chi={self.chi}, "
            f"prior={self.prior!r}, loss_ema={self.loss_ema}"
        )

    def _moved(self, log_alpha: Tensor, losses: Tensor, present: Tensor) -> Tensor:
        """log alpha after one step of the rule on ``chi * losses``."""
        log_prior = torch.zeros_like(losses)
        if self.prior == "sizes":
            assert self.group_sizes is not None  # __init__ asked for them
            log_prior = self.group_sizes.double().log()
        return moved_log_alpha(
            log_alpha,
            self.chi * losses,
            present,
            log_prior,
            rule=self.rule,
            parameter=self.rule_parameter,
            floor=self.floor,
        )

    def _sum_over_ranks(self, sums: Tensor, counts: Tensor, in_step: bool = False) -> tuple[Tensor, Tensor]:
        return group_sync.sum_over_ranks(sums, counts, self.process_group, self.clock(in_step))

    def _own_statistics(self) -> statistics.OwnStatistics:
        """Those that this rank alone has until `step`. No buffers: DDP would give all ranks those of rank 0."""
        device = self.log_alpha.device
        if self._own is None:
            self._own = statistics.OwnStatistics.zeros(self.num_groups, device)
        self._own = self._own.to(device)
        return self._own

    def _averaged(self, losses: Tensor, seen_now: Tensor) -> tuple[Tensor, Tensor]:
        """(running mean of each group's loss, groups seen so far), after the groups seen now have been taken in."""
        decay = self.loss_ema
        sums, weights = (_as_the_forward_finds_it(buffer) for buffer in (self.ema_losses, self.ema_weights))
        self.ema_losses.copy_(torch.where(seen_now, decay * sums + (1 - decay) * losses, sums))
        self.ema_weights.copy_(torch.where(seen_now, decay * weights + (1 - decay), weights))
        seen = self.ema_weights > 0
        return torch.where(seen, self.ema_losses / self.ema_weights, 0), seen

    @staticmethod
    def _warn_before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        # On a GPU the counter is not read back at each update; a checkpoint reads it anyway.
        assert isinstance(module, GroupWeights)
        module._watch.if_skipped(module.skipped_updates, read_device=True)
        own = module._own
        if own is not None and not own.counts.is_meta and int(own.counts.sum()):
            module._watch.once(
                "unsaved",
                f"a checkpoint between a forward and step(): the {int(own.counts.sum())} pairs that only this rank has "
                "seen since the last step() are not in it. Save it after step()",
            )

    def _replicate_for_data_parallel(self) -> GroupWeights:
        raise RuntimeError(
            "torch.nn.DataParallel must not hold GroupWeights: it copies modules for each forward and drops the "
            "copies, so alpha would never move. Use DistributedDataParallel, or keep the loss outside"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupWeights:
        """Follow moves between devices, but no dtype casts: ``model.bfloat16()`` must not round log alpha."""
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            changed = self._buffers[name]
            assert changed is not None
            if changed.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(changed.device)
        self._weighed.clear()
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state.before_loading(self, state_dict, prefix, error_msgs)
        if error_msgs:
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not error_msgs and f"{prefix}log_alpha" in state_dict and not self.log_alpha.is_meta:
            state.mend_log_alpha(self, error_msgs)


def _as_the_forward_finds_it(x: Tensor) -> Tensor:
    """x; under torch.compile a copy, by an operator that a backward does not run again (or raises when it does).

    Else a compiled backward might compute something anew from a buffer that the forward has overwritten since, and the
    gradient would silently be that of an alpha moved twice.
    """
    return torch.ops.grpo_kernels.copy_in_forward(x) if torch.compiler.is_compiling() else x
