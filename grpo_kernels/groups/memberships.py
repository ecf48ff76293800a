"""Which group a pair is of: one number a pair, or a weight for each group (unknown groups, mixtures)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.segments import segment_sum

ROUNDING = 1e-4  # of a row's sum: float32 memberships of some thousand groups are nearer to 1


@dataclass(frozen=True)
class Memberships:
    """Of B pairs in K groups. Sums over the pairs of a group are in float64 and come out the same from run to run."""

    ids: Tensor  # (B,) int64 in [0, K), or (B, K) float64
    num_groups: int

    @classmethod
    def of(cls, group_ids: Tensor, num_groups: int) -> tuple[Memberships, Tensor]:
        """And (B,) bool: which pairs have an id in [0, K), or weights >= 0 that add up to 1."""
        if group_ids.dim() == 1:
            known = (group_ids >= 0) & (group_ids < num_groups)
            return cls(torch.where(known, group_ids, 0), num_groups), known
        shares = group_ids.detach().double()
        known = (shares >= 0).all(1) & ((shares.sum(1) - 1).abs() <= ROUNDING)  # NaN is neither
        return cls(torch.where(known.unsqueeze(1), shares, 1 / num_groups), num_groups), known

    @property
    def is_soft(self) -> bool:
        return self.ids.dim() == 2

    def sums(self, values: Tensor) -> Tensor:
        """(K,): sum_i m_ig x_i, from (B,), or from (B, K) with numbers x_ig; differentiable."""
        if not self.is_soft:
            return segment_sum(values, self.ids, self.num_groups)
        values = values.double()
        return (self.ids * (values.unsqueeze(1) if values.dim() == 1 else values)).sum(0)

    def counts(self) -> Tensor:
        """(K,) int64, or float64 of weights: sum_i m_ig."""
        if self.is_soft:
            return self.ids.sum(0)
        ones = torch.ones(self.ids.shape, dtype=torch.float64, device=self.ids.device)
        return segment_sum(ones, self.ids, self.num_groups).long()

    def of_pairs(self, of_groups: Tensor) -> Tensor:
        """(K,) as (B,): the number of each pair's group; of weights (B, K)."""
        return of_groups.expand(self.ids.shape) if self.is_soft else of_groups[self.ids]

    def log_sum_exp(self, values: Tensor) -> Tensor:
        """(K,): log sum_i m_ig exp(x_i), -inf for a group without a pair."""
        if self.is_soft:
            return (values.double().unsqueeze(1) + self.ids.log()).logsumexp(0)
        values = values.double()
        largest = torch.full((self.num_groups,), -torch.inf, dtype=torch.float64, device=values.device)
        largest = largest.scatter_reduce(0, self.ids.long(), values, "amax")
        largest = torch.where(largest.isfinite(), largest, 0)
        return self.sums((values - largest[self.ids]).exp()).log() + largest
