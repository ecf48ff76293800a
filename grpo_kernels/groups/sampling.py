"""Which pairs make up batch number t. Batches depend on (seed, t) alone, so a resumed run draws the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo_kernels import validation

STRATEGIES = ("pooled", "group", "uniform", "balanced")


class GroupBatchSampler:
    """An endless sampler of batches of pair indices, usable as a DataLoader's ``batch_sampler``.

    Args:
        group_ids: (N,) the group of each pair, in [0, K).
        batch_size: pairs a batch.
        strategy: "pooled": shuffled epochs over all pairs. "group": for each slot g ~ Categorical(N_g / N), then a
            pair of g uniformly (paper, algorithm 1). "uniform": the same with g uniform over the groups (algorithm 3);
            use ``estimator="group_mean"`` with it. "balanced": the slots go round the groups, a uniform pair of
            each; use ``estimator="group_mean"`` with it.
        seed: batches are a function of (seed, step).
        start_step: the first batch that iteration yields.

    Example:
        >>> GroupBatchSampler([0, 0, 0, 1], 4, "balanced", seed=0).batch(0).count(3)
        2
    """

    def __init__(
        self, group_ids: Sequence[int] | Tensor, batch_size: int, strategy: str, *, seed: int, start_step: int = 0
    ) -> None:
        validation.check_choice("strategy", strategy, STRATEGIES)
        for name, value, least in (("batch_size", batch_size, 1), ("start_step", start_step, 0)):
            validation.check_whole_number(name, value, least)
        ids = torch.as_tensor(group_ids)
        validation.check_index_tensor("group_ids", ids)
        if ids.dim() != 1 or ids.numel() == 0:
            raise ValueError(f"group_ids must have shape (N,) with N >= 1, got {tuple(ids.shape)}")
        if int(ids.min()) < 0:
            raise ValueError(f"group_ids must be at least 0, got {int(ids.min())}")
        num_groups = int(ids.max()) + 1
        self._members = [(ids == group).nonzero().squeeze(1) for group in range(num_groups)]
        empty = [group for group, members in enumerate(self._members) if members.numel() == 0]
        if empty and strategy in ("uniform", "balanced"):
            raise ValueError(f"group_ids must have a pair of each group for strategy={strategy!r}, got none of {empty}")
        self._num_pairs = ids.numel()
        self.batch_size = batch_size
        self.strategy = strategy
        self.seed = seed
        self.start_step = start_step

    def batch(self, step: int) -> list[int]:
        """The indices of batch number ``step`` (from 0)."""
        if self.strategy == "pooled":
            return self._pooled(step)
        generator = self._generator(step)
        if self.strategy in ("group", "uniform"):
            sizes = [members.numel() if self.strategy == "group" else 1 for members in self._members]
            shares = torch.tensor(sizes, dtype=torch.float32)
            groups = torch.multinomial(shares, self.batch_size, replacement=True, generator=generator).tolist()
        else:
            first = step * self.batch_size
            groups = [(first + slot) % len(self._members) for slot in range(self.batch_size)]
        return [self._uniform_member(group, generator) for group in groups]

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1

    def _pooled(self, step: int) -> list[int]:
        first = step * self.batch_size
        indices: list[int] = []
        while len(indices) < self.batch_size:
            epoch, offset = divmod(first + len(indices), self._num_pairs)
            order = torch.randperm(self._num_pairs, generator=self._generator(epoch))
            indices += order[offset : offset + self.batch_size - len(indices)].tolist()
        return indices

    def _uniform_member(self, group: int, generator: torch.Generator) -> int:
        members = self._members[group]
        return int(members[torch.randint(members.numel(), (), generator=generator)])

    def _generator(self, number: int) -> torch.Generator:
        # Two multipliers keep (seed, number) pairs apart; the generator mixes the bits.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number * 7_919 + 1) % 2**63)
