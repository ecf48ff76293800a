"""The synthetic bandit of Ramesh et al. 2024 (section 5.1, appendix D): states, features, rewards, preference pairs.

A state is x ~ U[0,1]^2, an action y in {0..7}, a group g in {0, 1}. The policy is log-linear with one theta in R^4 for
both groups and a uniform reference, so that the margin of a pair is h = <phi_g(x, y_w) - phi_g(x, y_l), theta>.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_ACTIONS, NUM_GROUPS, NUM_FEATURES = 8, 2, 4
REWARD_THETA = torch.tensor([[1.0, 3, 1, 3], [3, 1, 3, 1]], dtype=torch.float64)  # (K, 4)
TRAIN_PAIRS, VALIDATION_PAIRS, TEST_STATES = 300, 1000, 1000
FEATURES = ("swapped", "same", "flipped")


@dataclass(frozen=True)
class Scenario:
    title: str
    shares: tuple[float, float]
    uneven: bool
    """True: group 0 compares neighbouring actions (hard), group 1 actions that are 4 apart (easy)."""


SCENARIOS = {
    "i": Scenario("imbalanced, even", (0.2, 0.8), uneven=False),
    "ii": Scenario("balanced, uneven", (0.5, 0.5), uneven=True),
    "iii": Scenario("imbalanced, uneven", (0.2, 0.8), uneven=True),
}


@dataclass(frozen=True)
class PairData:
    """Preference pairs of one draw, sorted by group."""

    differences: Tensor
    """(N, 4) float64: phi(x, y_w) - phi(x, y_l)."""
    group_ids: Tensor
    """(N,) int64."""


def group_features(states: Tensor, group: int, kind: str) -> Tensor:
    """phi_g(x, y) for all actions: (n, 8, 4) from states (n, 2).

    With A = y/8 + 1 each of the four is A^(+-1) times cos or sin of pi x_{i//2}. "swapped": A cos where i % 2 == g,
    else sin / A. "same": that of group 0 for both. "flipped": the group swaps cos and sin only, the power stays with i.
    """
    scale = torch.arange(NUM_ACTIONS, dtype=torch.float64).unsqueeze(1) / NUM_ACTIONS + 1  # (8, 1)
    index = torch.arange(NUM_FEATURES)
    angles = torch.pi * states[:, index // 2].unsqueeze(1)  # (n, 1, 4)
    takes_cos = index % 2 == (0 if kind == "same" else group)
    grows = index % 2 == 0 if kind == "flipped" else takes_cos
    return torch.where(grows, scale, 1 / scale) * torch.where(takes_cos, angles.cos(), angles.sin())


def draw_pairs(scenario: Scenario, kind: str, sizes: tuple[int, int], generator: torch.Generator) -> PairData:
    """``sizes[g]`` pairs of each group; the answer of higher reward is the chosen one, without noise."""
    differences = []
    for group, size in enumerate(sizes):
        phi = group_features(torch.rand(size, 2, dtype=torch.float64, generator=generator), group, kind)
        rows = torch.arange(size)
        first, second = _draw_actions(size, group if scenario.uneven else None, generator)
        difference = phi[rows, first] - phi[rows, second]
        differences.append(difference * torch.sign(difference @ REWARD_THETA[group]).unsqueeze(1))
    return PairData(torch.cat(differences), torch.repeat_interleave(torch.tensor(sizes)))


def _draw_actions(size: int, uneven_group: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first = torch.randint(NUM_ACTIONS, (size,), generator=generator)
    if uneven_group is None:  # two distinct actions
        return first, (first + torch.randint(1, NUM_ACTIONS, (size,), generator=generator)) % NUM_ACTIONS
    if uneven_group == 1:
        return first, (first + NUM_ACTIONS // 2) % NUM_ACTIONS
    second = first + 2 * torch.randint(2, (size,), generator=generator) - 1
    return first, torch.where(second < 0, 1, torch.where(second == NUM_ACTIONS, NUM_ACTIONS - 2, second))


@dataclass(frozen=True)
class Bandit:
    """One draw of everything that a run of the experiment needs."""

    train: PairData
    validation: PairData
    """Half from each group, answers drawn as in training."""
    test_features: Tensor
    """(K, n, 8, 4)."""
    theta: Tensor
    """(4,): where training starts, U(0, 5)^4."""


def draw_bandit(scenario: str, kind: str, seed: int) -> Bandit:
    """A function of its arguments. A seed's states and actions are the same for all kinds of features."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + list(SCENARIOS).index(scenario))
    return draw_of(SCENARIOS[scenario], kind, generator)


def draw_of(entry: Scenario, kind: str, generator: torch.Generator) -> Bandit:
    minority = round(TRAIN_PAIRS * entry.shares[0])
    half = VALIDATION_PAIRS // 2
    theta = 5 * torch.rand(NUM_FEATURES, dtype=torch.float64, generator=generator)
    train = draw_pairs(entry, kind, (minority, TRAIN_PAIRS - minority), generator)
    validation = draw_pairs(entry, kind, (half, half), generator)
    states = torch.rand(TEST_STATES, 2, dtype=torch.float64, generator=generator)
    phi = torch.stack([group_features(states, group, kind) for group in range(NUM_GROUPS)])
    return Bandit(train, validation, phi, theta)


def reward_errors(test_features: Tensor, theta: Tensor) -> Tensor:
    """(..., M, K): (best - got) / best mean reward of each group, for policies that take their most likely action.

    Args:
        test_features: (..., K, n, 8, 4). theta: (..., M, 4).
    """
    rewards = torch.einsum("...knaf,kf->...kna", test_features, REWARD_THETA)
    actions = torch.einsum("...knaf,...mf->...mkna", test_features, theta).argmax(-1)
    got = torch.take_along_dim(rewards.unsqueeze(-4), actions.unsqueeze(-1), -1).squeeze(-1).mean(-1)
    best = rewards.amax(-1).mean(-1).unsqueeze(-2)
    return (best - got) / best
