"""What GroupWeights keeps between forwards besides alpha: a rank's own sums, and the batches that alpha weighed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels import validation


class OwnStatistics(NamedTuple):
    """Of a rank's forwards since the last `GroupWeights.step`, with ``total_pairs``."""

    sums: Tensor  # (K,) float64
    counts: Tensor  # (K,) int64
    shares: Tensor  # (K,) float64: counts of pairs that have shares in groups
    forwards: Tensor  # () int64: those without total_pairs, whose sums all ranks have already

    @classmethod
    def zeros(cls, num_groups: int, device: torch.device) -> OwnStatistics:
        counts = torch.zeros(num_groups, dtype=torch.int64, device=device)
        return cls(counts.double(), counts, counts.double(), counts.new_zeros(()))

    def to(self, device: torch.device) -> OwnStatistics:
        if self.sums.device == device:
            return self
        if self.sums.is_meta:
            return OwnStatistics.zeros(self.sums.shape[0], device)
        return OwnStatistics(*(x.to(device) for x in self))


class WeighedBatches(list[Tensor]):
    """Log-probabilities of the batches that the present alpha weighs."""

    def check_holds(self, logps: Tensor) -> None:
        """A forward run again must be of a batch that the present alpha weighed: else the gradient would be wrong."""
        for seen in self:
            if seen.shape == logps.shape and torch.allclose(seen, logps, rtol=1e-4, equal_nan=True):
                return
        raise RuntimeError(
            "a checkpointed GroupRobustLoss is run again for a batch that is not the last one that moved alpha (or, "
            "with update='lagged', that none of the forwards since the last step() had). Call backward before alpha "
            "moves again, use torch.utils.checkpoint with use_reentrant=False, or keep the loss outside the "
            "checkpointed region"
        )


def check(group_loss_sums: Tensor, group_counts: Tensor, num_groups: int) -> None:
    validation.check_float_tensor("group_loss_sums", group_loss_sums)
    validation.check_tensor("group_counts", group_counts)
    for name, value in (("group_loss_sums", group_loss_sums), ("group_counts", group_counts)):
        if value.shape != (num_groups,):
            raise ValueError(f"{name} must have shape ({num_groups},), got {tuple(value.shape)}")
