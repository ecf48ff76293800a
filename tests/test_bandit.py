"""The paper's bandit: features by the formulas one number at a time, pairs by the scenarios, and the reward error."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_kernels.paper import bandit


def feature(kind: str, group: int, x: list[float], action: int, i: int) -> float:
    """The paper's appendix D, one number at a time."""
    scale, angle = action / 8 + 1, math.pi * x[i // 2]
    if kind == "flipped":
        return scale ** (1 if i % 2 == 0 else -1) * (math.cos if i % 2 == group else math.sin)(angle)
    if i % 2 == (group if kind == "swapped" else 0):
        return scale * math.cos(angle)
    return math.sin(angle) / scale


@pytest.mark.parametrize("kind", bandit.FEATURES)
@pytest.mark.parametrize("group", [0, 1])
def test_features(kind: str, group: int) -> None:
    states = torch.rand(3, 2, dtype=torch.float64)
    phi = bandit.group_features(states, group, kind)
    assert phi.shape == (3, 8, 4)
    for s, x in enumerate(states.tolist()):
        for action in range(8):
            expected = [feature(kind, group, x, action, i) for i in range(4)]
            assert phi[s, action].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scenario", bandit.SCENARIOS)
def test_sizes_labels_and_seeds(scenario: str) -> None:
    data = bandit.draw_bandit(scenario, "swapped", seed=3)
    sizes = torch.bincount(data.train.group_ids).tolist()
    assert sizes == ([150, 150] if scenario == "ii" else [60, 240])
    assert torch.bincount(data.validation.group_ids).tolist() == [500, 500]
    assert ((data.theta >= 0) & (data.theta <= 5)).all()
    for pairs in (data.train, data.validation):
        gain = (pairs.differences * bandit.REWARD_THETA[pairs.group_ids]).sum(1)
        assert (gain > 0).all(), "the chosen answer has the higher reward"
    again, other = (bandit.draw_bandit(scenario, "swapped", seed) for seed in (3, 4))
    assert torch.equal(again.train.differences, data.train.differences)
    assert not torch.equal(other.train.differences, data.train.differences)
    assert not torch.equal(data.train.differences[:60], data.validation.differences[:60])


def test_actions_of_the_schemes() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = bandit._draw_actions(4000, None, generator)
    assert (first != second).all()
    counts = torch.bincount(8 * first + second, minlength=64).view(8, 8)
    assert counts.diagonal().sum() == 0
    assert counts[~torch.eye(8, dtype=torch.bool)].min() > 40  # 71 expected of each of 56
    first, second = bandit._draw_actions(4000, 0, generator)
    assert ((first - second).abs() == 1).all()
    assert (second[first == 0] == 1).all()
    assert (second[first == 7] == 6).all()
    assert 0.4 < (second[first == 3] == 4).double().mean() < 0.6
    first, second = bandit._draw_actions(4000, 1, generator)
    assert ((first - second).abs() == 4).all()
    assert set(first.tolist()) == set(range(8))


def test_neighbours_are_harder() -> None:
    """Smaller margins of reward in group 0 of the uneven scenarios."""
    pairs = bandit.draw_bandit("iii", "swapped", 0).train
    gain = (pairs.differences * bandit.REWARD_THETA[pairs.group_ids]).sum(1)
    assert gain[pairs.group_ids == 0].mean() < 0.5 * gain[pairs.group_ids == 1].mean()


def test_reward_error() -> None:
    data = bandit.draw_bandit("i", "swapped", 0)
    own = bandit.reward_errors(data.test_features, bandit.REWARD_THETA)  # a policy for each group's own reward
    assert own.shape == (2, 2)
    assert own.diagonal().abs().max() < 1e-12
    assert (own + torch.eye(2) > 0).all()
    # By hand for one theta and one group.
    theta, got, best = data.theta, 0.0, 0.0
    for features in data.test_features[1]:
        rewards = features @ bandit.REWARD_THETA[1]
        got, best = got + rewards[(features @ theta).argmax()].item(), best + rewards.max().item()
    error = bandit.reward_errors(data.test_features[None], theta[None, None])[0, 0, 1].item()
    assert error == pytest.approx((best - got) / best, abs=1e-12)
