"""Batches: what each strategy draws, and that they depend on (seed, step) alone."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from grpo_kernels.groups.sampling import STRATEGIES, GroupBatchSampler

IDS = [0] * 70 + [1] * 25 + [2] * 5


def groups_drawn(strategy: str, batches: int, batch_size: int = 20) -> Counter:
    sampler = GroupBatchSampler(IDS, batch_size, strategy, seed=0)
    return Counter(IDS[i] for step in range(batches) for i in sampler.batch(step))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_depend_on_seed_and_step_alone(strategy: str) -> None:
    sampler = GroupBatchSampler(IDS, 8, strategy, seed=4)
    first = list(islice(sampler, 40))
    assert first == [GroupBatchSampler(IDS, 8, strategy, seed=4).batch(step) for step in range(40)]
    resumed = GroupBatchSampler(IDS, 8, strategy, seed=4, start_step=30)
    assert list(islice(resumed, 10)) == first[30:]
    assert first != list(islice(GroupBatchSampler(IDS, 8, strategy, seed=5), 40))
    assert all(len(batch) == 8 and all(0 <= i < 100 for i in batch) for batch in first)


def test_pooled_goes_through_every_pair_in_each_epoch() -> None:
    sampler = GroupBatchSampler(IDS, 30, "pooled", seed=0)
    stream = [i for step in range(10) for i in sampler.batch(step)]  # 300 draws are three epochs of 100
    for epoch in range(3):
        assert sorted(stream[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert stream[:100] != stream[100:200]
    assert len(GroupBatchSampler([0, 0, 0], 8, "pooled", seed=0).batch(1)) == 8


def test_group_draws_in_the_groups_shares() -> None:
    counts = groups_drawn("group", 500)
    for group, share in ((0, 0.70), (1, 0.25), (2, 0.05)):
        assert counts[group] / 10_000 == pytest.approx(share, abs=4 * (share * (1 - share) / 10_000) ** 0.5)


def test_uniform_draws_each_group_alike_in_the_mean() -> None:
    counts = groups_drawn("uniform", 500)
    for group in range(3):
        assert counts[group] / 10_000 == pytest.approx(1 / 3, abs=4 * (2 / 9 / 10_000) ** 0.5)


def test_balanced_draws_each_group_alike() -> None:
    counts = groups_drawn("balanced", 300)
    assert set(counts.values()) == {2000}
    per_batch = Counter(IDS[i] for i in GroupBatchSampler(IDS, 20, "balanced", seed=0).batch(7))
    assert sorted(per_batch.values()) == [6, 7, 7]


def test_members_of_a_group_are_drawn_uniformly() -> None:
    sampler = GroupBatchSampler(IDS, 100, "balanced", seed=0)
    drawn = Counter(i for step in range(300) for i in sampler.batch(step) if IDS[i] == 2)
    assert set(drawn) == set(range(95, 100))
    assert max(drawn.values()) / min(drawn.values()) < 1.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS, 8, "stratified"), "strategy must be one of 'pooled', 'group', 'uniform', 'balanced', got 'stratified'"),
        ((IDS, 0, "pooled"), "batch_size must be finite and in"),
        (([0, -1], 8, "group"), "group_ids must be at least 0, got -1"),
        (([], 8, "pooled"), r"group_ids must have shape \(N,\)"),
        (([0, 2], 8, "balanced"), r"a pair of each group for strategy='balanced', got none of \[1\]"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    ids = torch.tensor(arguments[0], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        GroupBatchSampler(ids, *arguments[1:], seed=0)
    with pytest.raises(TypeError, match=r"batch_size must be a whole number, got 2\.5"):
        GroupBatchSampler(IDS, 2.5, "pooled", seed=0)
