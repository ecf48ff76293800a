"""How fast the average iterate of algorithm 1 converges: duality gaps of saddle problems against the paper's bound.

A problem is a log-linear policy with margins h = differences @ theta, the DPO loss, and Theta a ball. Many seeds run at
once; each step is that of `grpo_kernels.paper.algorithm` with update="lagged" (both players move from the same point).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_kernels.groups.rules import moved_log_alpha
from grpo_kernels.pair_losses import PAIR_LOSSES, of_h
from grpo_kernels.paper.algorithm import l2_ball
from grpo_kernels.paper.bandit import NUM_GROUPS, draw_bandit
from grpo_kernels.paper.batched import PairBatch

LOSS = "sigmoid"
HORIZONS = tuple(2**k for k in range(8, 15))


@dataclass(frozen=True)
class SaddleProblem:
    """min over |theta| <= radius, max over alpha on the simplex, of sum_g alpha_g L_g(theta)."""

    name: str
    differences: Tensor
    """(N, F) float64."""
    group_ids: Tensor
    """(N,)."""
    radius: float
    theta: Tensor
    """(F,): where it starts."""
    beta: float = 1.0

    def batch(self, num_runs: int = 1) -> PairBatch:
        return PairBatch.of([self.differences] * num_runs, [self.group_ids] * num_runs, NUM_GROUPS)

    def sizes(self) -> Tensor:
        return torch.bincount(self.group_ids, minlength=NUM_GROUPS)


def one_dimensional() -> SaddleProblem:
    """Margins +2 theta and -theta, shares 0.2 and 0.8, Theta = [-2, 2].

    theta* = 0, value log 2, alpha* = (1/3, 2/3).
    """
    differences = torch.tensor([[2.0], [-1], [-1], [-1], [-1]], dtype=torch.float64)
    ids = torch.tensor([0, 1, 1, 1, 1])
    return SaddleProblem("one dimension", differences, ids, 2.0, torch.ones(1, dtype=torch.float64))


def bandit_in_a_ball(radius: float = 2.0, seed: int = 0) -> SaddleProblem:
    """Scenario (iii) of the bandit, swapped features."""
    train = draw_bandit("iii", "swapped", seed).train
    return SaddleProblem("bandit", train.differences, train.group_ids, radius, torch.zeros(4, dtype=torch.float64))


@dataclass(frozen=True)
class Theory:
    """Step sizes and bound of proposition 4.1 (eq. 55 and 56), after Nemirovski et al. 2009, section 3."""

    rate: float
    step_size: float
    bound: float


def theory(problem: SaddleProblem, horizon: int, scale: float = 1.0) -> Theory:
    """With B_grad = beta B_phi and B_l = log 2 + beta B_phi B_Theta:

    M_theta^2 = B_grad^2 N / min N_g, M_alpha^2 = K B_l^2 N / min N_g, M^2 = B_Theta^2 M_theta^2 + 2 ln K M_alpha^2,
    gamma = 2 / (M sqrt(5 T)), eta_theta = B_Theta^2 gamma, eta_alpha = 2 ln K gamma. Steps ``scale`` times as large
    multiply the bound by max(scale, 1 / scale) (Nemirovski et al., section 3.1).
    """
    sizes, log_k = problem.sizes().double(), math.log(NUM_GROUPS)
    scarcity = float(sizes.sum() / sizes.min())
    b_grad = problem.beta * float(problem.differences.norm(dim=1).max())
    b_loss = math.log(2) + b_grad * problem.radius
    both = problem.radius**2 * b_grad**2 + 2 * log_k * NUM_GROUPS * b_loss**2
    gamma = scale * 2 / math.sqrt(5 * horizon * scarcity * both)
    half = problem.radius**2 * b_grad**2 + NUM_GROUPS * b_loss**2 * log_k
    bound = max(scale, 1 / scale) * 2 * math.sqrt(10 * scarcity * half / horizon)
    return Theory(problem.radius**2 * gamma, 2 * log_k * gamma, bound)


@torch.no_grad()
def average_iterates(problem: SaddleProblem, horizon: int, draws: Tensor, steps: Theory) -> tuple[Tensor, Tensor]:
    """Means of theta (R, F) and alpha (R, K) over the T points at which R runs took their gradients.

    Args:
        draws: (T, R) the pair of each step and run. Uniform over all pairs is Categorical(N_g / N), then uniform in g.
    """
    entry, project, num_runs = PAIR_LOSSES[LOSS], l2_ball(problem.radius), draws.shape[1]
    factors = problem.sizes().sum() / problem.sizes().double()[problem.group_ids]  # N / N_g of each pair
    groups = torch.nn.functional.one_hot(problem.group_ids, NUM_GROUPS).double()
    theta = problem.theta.expand(num_runs, -1).clone()
    log_alpha = torch.full((num_runs, NUM_GROUPS), -math.log(NUM_GROUPS), dtype=torch.float64)
    present, log_prior = torch.ones_like(log_alpha, dtype=torch.bool), torch.zeros_like(log_alpha)
    theta_sum, alpha_sum = torch.zeros_like(theta), torch.zeros_like(log_alpha)
    for t in range(horizon):
        rows, group, factor = problem.differences[draws[t]], groups[draws[t]], factors[draws[t]].unsqueeze(1)
        alpha = log_alpha.exp()
        theta_sum += theta
        alpha_sum += alpha
        h = (rows * theta).sum(1, keepdim=True)
        losses = factor * entry.value(of_h(h), problem.beta, 0.0) * group
        slope = (alpha * group).sum(1, keepdim=True) * factor * entry.slopes(of_h(h), problem.beta, 0.0)[0]
        log_alpha = moved_log_alpha(
            log_alpha, losses, present, log_prior, rule="exponentiated_gradient", parameter=steps.step_size
        )
        theta = project(theta - steps.rate * slope * rows)
    return theta_sum / horizon, alpha_sum / horizon


@torch.no_grad()
def duality_gaps(problem: SaddleProblem, theta: Tensor, alpha: Tensor, iterations: int = 1000) -> Tensor:
    """(R,): max_g L_g(theta) - min over Theta of sum_g alpha_g L_g, from theta (R, F) and alpha (R, K).

    The minimum is found by accelerated projected gradient descent with restarts where the value rises.
    """
    batch, project, entry = problem.batch(), l2_ball(problem.radius), PAIR_LOSSES[LOSS]
    worst = batch.group_losses(theta.unsqueeze(0), LOSS, problem.beta)[0].amax(-1)
    pair_weights = alpha @ batch.membership[0]  # (R, N)
    rows = problem.differences
    rate = 4 / (problem.beta**2 * float(rows.norm(dim=1).max()) ** 2)  # 1 / the largest curvature

    def value_and_margins(point: Tensor) -> tuple[Tensor, Tensor]:
        margins = point @ rows.T
        return (pair_weights * entry.value(of_h(margins), problem.beta, 0.0)).sum(1, keepdim=True), margins

    point, ahead, speed = theta.clone(), theta.clone(), torch.ones(len(theta), 1, dtype=torch.float64)
    value, _ = value_and_margins(point)
    for _ in range(iterations):
        margins = ahead @ rows.T
        moved = project(ahead - rate * (pair_weights * entry.slopes(of_h(margins), problem.beta, 0.0)[0]) @ rows)
        new_value, _ = value_and_margins(moved)
        restart = new_value > value
        speed = torch.where(restart, 1.0, speed)
        new_speed = (1 + (1 + 4 * speed**2).sqrt()) / 2
        ahead = torch.where(restart, point, moved + (speed - 1) / new_speed * (moved - point))
        point, value, speed = torch.where(restart, point, moved), torch.minimum(value, new_value), new_speed
    return worst - value.squeeze(1)


@dataclass(frozen=True)
class GapCurve:
    problem: str
    scale: float
    """Step sizes in units of the theory's."""
    horizons: list[int]
    gaps: list[list[float]]
    """For each T the gap of each seed."""
    bounds: list[float]
    slope: float
    """Of log mean gap against log T, least squares."""


def gap_curve(
    problem: SaddleProblem,
    horizons: tuple[int, ...] = HORIZONS,
    *,
    scale: float = 1.0,
    num_runs: int = 64,
    seed: int = 0,
    on_horizon: Callable[[int, float], None] = lambda done, gap: None,
) -> GapCurve:
    """A run of its own for each T, for the step sizes depend on T."""
    gaps, bounds = [], []
    for horizon in horizons:
        generator = torch.Generator().manual_seed(1_000_003 * seed + horizon)
        draws = torch.randint(len(problem.group_ids), (horizon, num_runs), generator=generator)
        steps = theory(problem, horizon, scale)
        gaps.append(duality_gaps(problem, *average_iterates(problem, horizon, draws, steps)))
        bounds.append(steps.bound)
        on_horizon(sum(horizons[: len(gaps)]), float(gaps[-1].mean()))
    mean = torch.stack(gaps).mean(1)
    return GapCurve(
        problem.name, scale, list(horizons), [gap.tolist() for gap in gaps], bounds, log_log_slope(horizons, mean)
    )


def log_log_slope(horizons: tuple[int, ...], values: Tensor) -> float:
    x, y = torch.tensor(horizons, dtype=torch.float64).log(), values.log()
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())
