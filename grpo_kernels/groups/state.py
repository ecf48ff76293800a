"""Alpha and what is kept beside it, as a module's state: made, begun anew, moved between devices, saved, loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo_kernels.distributed import group_sync
from grpo_kernels.groups import checkpoints, hedge, statistics
from grpo_kernels.groups.diagnosis import Trail
from grpo_kernels.groups.watch import Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class AlphaState(nn.Module):
    """The options of `GroupWeights`, set by its constructor, and its buffers."""

    num_groups: int
    rule: str
    rule_parameter: float
    step_size: float
    estimator: str
    prior: str
    update_mode: str
    adjustment: float
    floor: float
    chi: float
    loss_ema: float
    is_hedged: bool  # step_size="auto"
    given_sizes: Tensor | None  # (K,) int64; as given_baseline on the CPU: `to_empty` forgets what buffers hold
    given_baseline: Tensor | None  # (K,) float64
    has_running_baseline: bool
    inner_tilt: float  # tau; 0: none
    gradient_reduction: str

    log_alpha: Tensor
    group_sizes: Tensor | None
    pending_sums: Tensor
    pending_counts: Tensor
    pending_shares: Tensor  # of pairs that have shares in groups
    skipped_updates: Tensor
    shared_updates: Tensor
    settings: Tensor
    ema_losses: Tensor
    ema_weights: Tensor
    hedge_gains: Tensor
    hedge_gap_sum: Tensor  # (1,): of shape () AOTAutograd (torch 2.13) loses what a compiled forward writes to it
    baseline: Tensor  # (K,): given, or the lowest running mean so far, infinite before the first
    baseline_sums: Tensor
    baseline_weights: Tensor
    tilted_means: Tensor  # (K,): of the last step that had the group; NaN before the first
    pending_log_tilts: Tensor
    trail: Trail

    def _make_state(self, process_group: ProcessGroup | None) -> None:
        """After the options are set."""
        self._ranks = group_sync.SharedGroup(process_group)
        self._own: statistics.OwnStatistics | None = None
        self._own_log_tilts: Tensor | None = None  # (K,) of this rank alone since the last step, beside _own
        self._watch = Watch()
        self._has_compared_ranks = False
        self._weighed = statistics.WeighedBatches()
        self.register_buffer("group_sizes", None)
        for name, value in self._initial_values().items():
            self.register_buffer(name, torch.empty_like(value))
        self.reset_parameters()
        self.register_state_dict_pre_hook(AlphaState._warn_before_saving)

    def _initial_values(self) -> dict[str, Tensor]:
        """Of every buffer, on the device of the moment; those of an option are there with the option only."""
        zeros = torch.zeros(self.num_groups, dtype=torch.float64)
        count = torch.zeros((), dtype=torch.int64)
        values = {
            "log_alpha": zeros - math.log(self.num_groups),
            "pending_sums": zeros,
            "pending_counts": zeros.long(),
            "skipped_updates": count,
            "shared_updates": count,
            "settings": checkpoints.settings_of(self),
        }
        if self.given_sizes is not None:
            values |= {"group_sizes": self.given_sizes.to(zeros.device)}
        if self.update_mode == "lagged":
            values |= {"pending_shares": zeros}
        if self.loss_ema:
            values |= {"ema_losses": zeros, "ema_weights": zeros}
        if self.is_hedged:
            values |= {"hedge_gains": zeros, "hedge_gap_sum": zeros[:1]}
        if self.given_baseline is not None:
            values |= {"baseline": self.given_baseline.to(zeros.device)}
        if self.has_running_baseline:
            values |= {"baseline": zeros + math.inf, "baseline_sums": zeros, "baseline_weights": zeros}
        if self.inner_tilt and self.update_mode == "lagged":
            values |= {"tilted_means": zeros + math.nan, "pending_log_tilts": zeros - math.inf}
        return values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform alpha, no pending statistics. (Also what fills the buffers after ``to_empty``.)"""
        self.trail = Trail()
        self._forget_batches()
        for name, value in self._initial_values().items():
            self._buffers[name].copy_(value)  # type: ignore[union-attr]

    def _forget_batches(self) -> None:
        """Those of forwards whose alpha is no longer here."""
        self._own = self._own_log_tilts = None
        self._weighed.clear()

    @property
    def alpha(self) -> Tensor:
        """(K,) float64, on the simplex: a copy."""
        return self.log_alpha.exp()

    @property
    def has_baseline(self) -> bool:
        return self.given_baseline is not None or self.has_running_baseline

    @property
    def is_plain_ascent(self) -> bool:
        """True where log alpha moves by step_size times the group losses, and nothing else."""
        ascends = self.rule == "exponentiated_gradient" and not self.is_hedged
        return ascends and not self.loss_ema and not self.has_baseline

    @property
    def is_default_rule(self) -> bool:
        """True where the update is the plain exponentiated gradient, the one that the fused kernels have."""
        return self.is_plain_ascent and not self.inner_tilt

    def current_step_size(self) -> Tensor:
        """0-d float64: eta; with ``step_size="auto"`` that of the next batch, infinite before losses differed."""
        if self.is_hedged:
            return hedge.step_size(self.hedge_gap_sum.squeeze(0), self.num_groups)
        return self.log_alpha.new_tensor(self.step_size)

    def loss_weights(self) -> Tensor:
        """(K,) float64: what weighs L_g in the loss; alpha, mixed with the uniform weights if chi < 1."""
        return self.alpha if self.chi == 1 else (1 - self.chi) / self.num_groups + self.chi * self.alpha

    @property
    def process_group(self) -> ProcessGroup | None:
        return self._ranks.value

    def _process_group_or_world(self) -> ProcessGroup:
        group = self.process_group or torch.distributed.group.WORLD
        assert group is not None  # only asked for where torch.distributed is initialised
        return group

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

    @staticmethod
    def _warn_before_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
        # On a GPU the counter is not read back at each update; a checkpoint reads it anyway.
        assert isinstance(module, AlphaState)
        module._watch.if_skipped(module.skipped_updates, read_device=True)
        module._watch.num_empty()
        own = module._own
        unsaved = 0 if own is None or own.counts.is_meta else round(float((own.counts + own.shares).sum()))
        if unsaved:
            module._watch.once(
                "unsaved",
                f"a checkpoint between a forward and step(): the {unsaved} pairs that only this rank has "
                "seen since the last step() are not in it. Save it after step()",
            )

    def _replicate_for_data_parallel(self) -> AlphaState:
        raise RuntimeError(
            "torch.nn.DataParallel must not hold GroupWeights: it copies modules for each forward and drops the "
            "copies, so alpha would never move. Use DistributedDataParallel, or keep the loss outside"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AlphaState:
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
        checkpoints.before_loading(self, state_dict, prefix, error_msgs)
        if error_msgs:
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not error_msgs and f"{prefix}log_alpha" in state_dict:
            self._forget_batches()
            if not self.log_alpha.is_meta:
                checkpoints.mend_log_alpha(self, error_msgs)
