"""The convergence of the average iterates: the batched loop is algorithm 1, the gap is the gap, its slope is -1/2."""

from __future__ import annotations

import math

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.groups.sampling import GroupBatchSampler
from grpo_kernels.paper import algorithm, convergence
from grpo_kernels.paper.batched import one_thread


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


@pytest.mark.parametrize(
    "problem", [convergence.one_dimensional(), convergence.bandit_in_a_ball(0.3)], ids=["1d", "4d"]
)
def test_the_batched_loop_is_run_algorithm(problem: convergence.SaddleProblem) -> None:
    steps, horizon = convergence.Theory(rate=0.3, step_size=0.1, bound=0.0), 60
    samplers = [GroupBatchSampler(problem.group_ids, 1, "group", seed=seed) for seed in range(3)]
    draws = torch.tensor([[sampler.batch(t)[0] for sampler in samplers] for t in range(horizon)])
    theta, alpha = convergence.average_iterates(problem, horizon, draws, steps)
    for seed in range(3):
        own = problem.theta.clone().requires_grad_()
        weights = gk.GroupWeights(group_sizes=problem.sizes(), step_size=steps.step_size, update="lagged")
        average = algorithm.run_algorithm(
            lambda indices, own=own: problem.differences[indices] @ own,
            problem.group_ids,
            gk.GroupRobustLoss(weights, beta=problem.beta),
            torch.optim.SGD([own], lr=steps.rate),
            steps=horizon,
            projection=algorithm.l2_ball(problem.radius),
            seed=seed,
        )
        torch.testing.assert_close(theta[seed], average.theta, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(alpha[seed], average.alpha, rtol=1e-10, atol=1e-12)


def test_gap_of_the_known_saddle() -> None:
    """theta* = 0, alpha* = (1/3, 2/3), value log 2: gap 0 there; elsewhere as on a fine grid."""
    problem = convergence.one_dimensional()
    third = torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64)
    assert convergence.duality_gaps(problem, torch.zeros(1, 1).double(), third).item() == pytest.approx(0, abs=1e-9)
    theta = torch.tensor([[0.0], [1.5], [-2.0], [0.3]], dtype=torch.float64)
    alpha = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.0, 1.0], [0.3, 0.7]], dtype=torch.float64)
    grid = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
    losses = torch.stack([torch.log1p((-2 * grid).exp()), torch.log1p(grid.exp())])
    for x, a, gap in zip(theta, alpha, convergence.duality_gaps(problem, theta, alpha), strict=True):
        worst = max(math.log1p(math.exp(-2 * x.item())), math.log1p(math.exp(x.item())))
        assert gap.item() == pytest.approx(worst - (a @ losses).min().item(), abs=1e-8)


def test_gap_finds_the_minimum_in_the_ball() -> None:
    problem = convergence.bandit_in_a_ball(2.0)
    alpha = torch.rand(5, 1, dtype=torch.float64)
    alpha = torch.cat([alpha, 1 - alpha], 1)
    theta = torch.zeros(5, 4, dtype=torch.float64)
    coarse, fine = (convergence.duality_gaps(problem, theta, alpha, iterations=n) for n in (1000, 6000))
    torch.testing.assert_close(coarse, fine, rtol=0, atol=1e-7)
    # No point of a random cloud in the ball is lower.
    cloud = algorithm.l2_ball(2.0)(2 * torch.randn(1, 5000, 4, dtype=torch.float64))
    losses = problem.batch().group_losses(cloud, convergence.LOSS, problem.beta)[0]
    assert ((losses @ alpha.T).amin(0) >= math.log(2) - fine).all()


def test_theory_of_the_one_dimensional_problem() -> None:
    """By hand: N / min N_g = 5, B_grad = 2, B_Theta = 2, B_l = log 2 + 4, K = 2."""
    theory = convergence.theory(convergence.one_dimensional(), 100)
    b_loss = math.log(2) + 4
    assert theory.bound == pytest.approx(2 * math.sqrt(10 * 5 * (16 + 2 * b_loss**2 * math.log(2)) / 100))
    m = math.sqrt(4 * 4 * 5 + 2 * math.log(2) * 2 * b_loss**2 * 5)
    gamma = 2 / (m * math.sqrt(500))
    assert theory.rate == pytest.approx(4 * gamma)
    assert theory.step_size == pytest.approx(2 * math.log(2) * gamma)
    larger = convergence.theory(convergence.one_dimensional(), 100, scale=8.0)
    assert (larger.rate, larger.bound) == pytest.approx((8 * theory.rate, 8 * theory.bound))


@pytest.mark.parametrize(
    ("problem", "scale"),
    [(convergence.one_dimensional(), 1.0), (convergence.bandit_in_a_ball(), 8.0)],
    ids=["one dimension", "bandit"],
)
def test_the_gap_falls_as_one_over_the_root_of_t(problem: convergence.SaddleProblem, scale: float) -> None:
    curve = convergence.gap_curve(problem, tuple(2**k for k in range(8, 12)), scale=scale, num_runs=64)
    assert -0.7 <= curve.slope <= -0.4
    for gaps, bound in zip(curve.gaps, curve.bounds, strict=True):
        assert min(gaps) >= 0
        assert max(gaps) <= bound


def test_log_log_slope() -> None:
    horizons = (10, 100, 1000)
    values = 7 * torch.tensor(horizons, dtype=torch.float64) ** -0.5
    assert convergence.log_log_slope(horizons, values) == pytest.approx(-0.5)
