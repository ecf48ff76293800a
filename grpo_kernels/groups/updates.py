"""How statistics of batches move alpha: group losses, one step of the rule, at once or gathered until `step`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.distributed import group_sync
from grpo_kernels.groups import checkpoints, diagnosis, hedge, statistics, tilt
from grpo_kernels.groups.diagnosis import Diagnosis
from grpo_kernels.groups.rules import moved_log_alpha
from grpo_kernels.groups.state import AlphaState
from grpo_kernels.groups.watch import is_capturing
from grpo_kernels.kernels import ops  # noqa: F401  (defines torch.ops.grpo_kernels)

RUNNING_BASELINE = 0.9  # decay of the running mean whose lowest value is baseline="running": some ten batches


class AlphaUpdates(AlphaState):
    """`GroupWeights` without the forwards of a loss."""

    def group_losses(self, group_loss_sums: Tensor, group_counts: Tensor, total_pairs: Any = None) -> Tensor:
        """(K,) float64: L_g by the estimator, from the batch's sums of pair losses and counts of pairs.

        ``total_pairs`` stands for B where the batch is a part of a larger one.
        """
        sums = group_loss_sums.double()
        if self.estimator == "group_mean":
            return sums / _or_one(group_counts)
        assert self.group_sizes is not None  # __init__ asked for them
        sizes = self.group_sizes.double()  # whole numbers divide to float32
        return sizes.sum() / sizes * sums / (_or_one(group_counts.sum()) if total_pairs is None else total_pairs)

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
        self._update(group_loss_sums, group_counts.clone())  # the trail keeps them, and the caller may use them again

    @torch.no_grad()
    def _update(self, group_loss_sums: Tensor, group_counts: Tensor) -> None:
        seen_now = present = group_counts > 0
        losses = self.group_losses(group_loss_sums, group_counts)
        if self.estimator == "importance":  # an absent group's loss of 0 is unbiased as it stands
            present = torch.ones_like(present)
        finite = torch.isfinite(losses).all()  # where a sum is not, its loss is not either
        usable = finite & (group_counts.sum() > 0)
        if self.has_baseline:
            of_baseline = self._baseline(group_loss_sums.double() / _or_one(group_counts), seen_now & usable)
            losses = self.group_losses(group_loss_sums - of_baseline * group_counts, group_counts)
        if self.loss_ema:
            losses, present = self._averaged(losses, present & usable)
        if self.has_baseline:
            losses = losses.clamp(min=0)
        if self.adjustment:
            assert self.group_sizes is not None  # __init__ asked for them
            losses = losses + self.adjustment / self.group_sizes.double().sqrt()
        log_alpha = as_the_forward_finds_it(self.log_alpha)
        moved = self._hedged(losses, present, usable) if self.is_hedged else self._moved(log_alpha, losses, present)
        # An empty batch, or one without finite losses, moves nothing.
        self.log_alpha.copy_(torch.where(usable, moved, log_alpha))
        self._weighed.clear()
        self.skipped_updates.add_((~finite).long())
        self._watch.if_skipped(self.skipped_updates)
        self.trail.saw(self.alpha, group_counts)

    def accumulate(self, group_loss_sums: Tensor, group_counts: Tensor, *, sum_over_ranks: bool = True) -> None:
        """Add a batch's statistics to those that the next `step` will use, as forwards do in lagged mode.

        ``sum_over_ranks``: True: they are the rank's own pairs, which `step` will add up over the ranks. False: they
        are all ranks' already, the same on each.

        Raises:
            RuntimeError: with update="inline".
        """
        if self.update_mode != "lagged":
            raise RuntimeError("accumulate() belongs to update='lagged', whose step() uses what it adds up")
        statistics.check(group_loss_sums, group_counts, self.num_groups)
        with torch.no_grad():
            sums, counts, shares = self.pending_sums, self.pending_counts, self.pending_shares
            if sum_over_ranks and self.num_ranks > 1:
                sums, counts, shares, _ = self._own_statistics()
            sums.add_(group_loss_sums)
            (shares if group_counts.is_floating_point() else counts).add_(group_counts)

    @torch.no_grad()
    def accumulate_tilts(self, log_tilts: Tensor) -> None:
        """With ``inner_tilt``, beside `accumulate`: (K,) log sum exp(l / tau) of the rank's own pairs."""
        pending = self.pending_log_tilts
        if self.num_ranks > 1:  # no buffer, as with _own_statistics
            if self._own_log_tilts is None:
                self._own_log_tilts = torch.full_like(pending, -math.inf)
            pending = self._own_log_tilts
        pending.copy_(torch.logaddexp(as_the_forward_finds_it(pending), log_tilts))

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
            everyones = self._sum_over_ranks(own.sums, own.counts + own.shares, in_step=True)
            self.accumulate(*everyones, sum_over_ranks=False)
            for tensor in own:
                tensor.zero_()
            self.shared_updates.add_(1)
        counts = self.pending_counts + self.pending_shares
        self._watch.at_step(counts, self.estimator, self.num_ranks)
        self._update(self._whole_sums(counts), counts)
        self.pending_sums.zero_()
        self.pending_counts.zero_()
        self.pending_shares.zero_()

    def _whole_sums(self, counts: Tensor) -> Tensor:
        """(K,) of the step: the sums of pair losses, or n_g times the tilted means, which the next step starts from."""
        if not self.inner_tilt:
            return self.pending_sums
        log_tilts = self.pending_log_tilts
        if self.num_ranks > 1:
            own = torch.full_like(log_tilts, -math.inf) if self._own_log_tilts is None else self._own_log_tilts
            everyones, _ = tilt.over_ranks(own, counts, self._process_group_or_world())
            log_tilts = torch.logaddexp(log_tilts, everyones)
            self._own_log_tilts = None
        means = tilt.tilted_means(log_tilts, counts, self.inner_tilt)
        means = means + 0 * self.pending_sums  # NaN where a loss was not finite, whatever its weight
        usable = (counts > 0) & means.isfinite().all()
        self.tilted_means.copy_(torch.where(usable, means, self.tilted_means))
        self.pending_log_tilts.fill_(-math.inf)
        return means * counts

    @torch.no_grad()
    def diagnose(self, step: int | None = None, total_steps: int | None = None) -> Diagnosis:
        """How alpha is doing, and in plain words when it moves too much or too little. Waits for the device.

        Args:
            step: optimizer steps so far; None: the updates that this process has seen.
            total_steps: of the whole run, to tell whether alpha has left uniform by half of them; None: not told.

        Example:
            >>> from grpo_kernels import GroupWeights
            >>> groups = GroupWeights(group_sizes=[30, 10], step_size=0.01)
            >>> for _ in range(10):
            ...     groups.update(torch.tensor([2.1, 0.8]), torch.tensor([3, 1]))
            >>> found = groups.diagnose(total_steps=20)
            >>> found.rarest_group, round(found.rarest_alpha, 3), found.unseen
            (1, 0.502, (0, 0))
            >>> found.warnings[0][:63]
            'alpha has not left uniform: after 10 of 20 steps each weight is'
        """
        return diagnosis.diagnose(self, self.trail, step, total_steps)

    def clock(self, in_step: bool = False) -> Tensor:
        """(3,) int64, alike on ranks that are at the same step; see `group_sync.sum_over_ranks`."""
        self._compare_ranks()
        forwards = self._own_statistics().forwards
        return torch.stack([self.shared_updates, forwards, torch.full_like(forwards, in_step)])

    def _compare_ranks(self) -> None:
        """Before the first collective: ranks of other options would each move an alpha of their own, and such with
        another number of groups wait for each other. Not compiled, nor in a graph: telling waits for the device."""
        if torch.compiler.is_compiling() or self._has_compared_ranks or is_capturing(self.log_alpha):
            return
        self._has_compared_ranks = True
        if not self.log_alpha.is_meta:
            group_sync.check_made_alike(checkpoints.made_with(self), self.process_group, self.log_alpha.device)

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

    def _baseline(self, means: Tensor, seen_now: Tensor) -> Tensor:
        """(K,), after a running one has taken in the mean losses of the groups seen now; 0 for a group not yet seen."""
        if not self.has_running_baseline:
            return self.baseline
        lowest = as_the_forward_finds_it(self.baseline)
        mean, seen = self._running_mean(RUNNING_BASELINE, means, seen_now, self.baseline_sums, self.baseline_weights)
        self.baseline.copy_(torch.where(seen_now, torch.minimum(lowest, mean), lowest))
        return torch.where(seen, self.baseline, 0)

    def _hedged(self, losses: Tensor, present: Tensor, usable: Tensor) -> Tensor:
        """log alpha after a batch with ``step_size="auto"``, which takes the batch in if it is usable."""
        gains, gap_sum = (as_the_forward_finds_it(buffer) for buffer in (self.hedge_gains, self.hedge_gap_sum))
        new_gains, new_gap_sum = hedge.after_batch(gains, gap_sum.squeeze(0), self.chi * losses, present)
        self.hedge_gains.copy_(torch.where(usable, new_gains, gains))
        self.hedge_gap_sum.copy_(torch.where(usable, new_gap_sum.unsqueeze(0), gap_sum))
        log_alpha = hedge.log_weights(new_gains, new_gap_sum)
        if not self.floor:
            return log_alpha
        least = torch.full_like(log_alpha, self.floor / self.num_groups)
        return torch.logaddexp(least.log(), log_alpha + math.log1p(-self.floor))

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
        return self._running_mean(self.loss_ema, losses, seen_now, self.ema_losses, self.ema_weights)

    @staticmethod
    def _running_mean(
        decay: float, losses: Tensor, seen_now: Tensor, of_losses: Tensor, of_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(running mean of each group's loss, groups seen so far), after the groups seen now have been taken into the
        buffers."""
        sums, weights = (as_the_forward_finds_it(buffer) for buffer in (of_losses, of_weights))
        of_losses.copy_(torch.where(seen_now, decay * sums + (1 - decay) * losses, sums))
        of_weights.copy_(torch.where(seen_now, decay * weights + (1 - decay), weights))
        seen = of_weights > 0
        return torch.where(seen, of_losses / of_weights, 0), seen


def _or_one(counts: Tensor) -> Tensor:
    """Counts, 1 in place of 0. Those of memberships may be less than 1."""
    return torch.where(counts > 0, counts, 1)


def as_the_forward_finds_it(x: Tensor) -> Tensor:
    """x; under torch.compile a copy, by an operator that a backward does not run again (or raises when it does).

    Else a compiled backward might compute something anew from a buffer that the forward has overwritten since, and the
    gradient would silently be that of an alpha moved twice.
    """
    return torch.ops.grpo_kernels.copy_in_forward(x) if torch.compiler.is_compiling() else x
