"""The batched runs are the package's losses and GroupWeights, step by step, for each data set and method."""

from __future__ import annotations

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.paper.bandit import draw_bandit
from grpo_kernels.paper.batched import (
    METHODS,
    Method,
    PairBatch,
    Setting,
    closed_form_step,
    gradient_step,
    run_full_batch,
)

MIXED = Method("chi=0.4", 0.4)
ALL = (*METHODS, MIXED)
STEPS = 40


@pytest.fixture(scope="module")
def bandits():
    return [draw_bandit("iii", "swapped", 0), draw_bandit("ii", "flipped", 1)]


def batches(bandits) -> tuple[PairBatch, PairBatch, torch.Tensor]:
    parts = [[b.train for b in bandits], [b.validation for b in bandits]]
    train, validation = (PairBatch.of([p.differences for p in ps], [p.group_ids for p in ps], 2) for ps in parts)
    return train, validation, torch.stack([b.theta for b in bandits])


def group_weights(pairs, method: Method, step_size: float) -> gk.GroupWeights:
    return gk.GroupWeights(group_sizes=torch.bincount(pairs.group_ids), step_size=step_size, chi=method.chi)


def output(pairs, theta, weights, loss_type: str, beta: float) -> gk.GroupRobustOutput:
    margins = pairs.differences @ theta
    loss_fn = gk.GroupRobustLoss(weights, beta=beta, loss_type=loss_type, reference_free=True)
    return loss_fn.from_logps(torch.cat([margins, torch.zeros_like(margins)]), pairs.group_ids)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_gradient_runs_are_group_robust_loss_step_by_step(bandits, loss_type: str) -> None:
    train, validation, start = batches(bandits)
    beta, rate, step_size = (1.0, 0.9, 0.5) if loss_type == "sigmoid" else (0.1, 0.01, 0.01)
    step, setting = gradient_step(train, loss_type, beta, rate), Setting(loss_type, beta, step_size)
    runs = run_full_batch(train, validation, start, ALL, step, setting, iterations=STEPS, record_every=1)
    assert runs.iterations == list(range(STEPS + 1))
    for d, data in enumerate(bandits):
        for m, method in enumerate(ALL):
            weights = group_weights(data.train, method, step_size)
            theta = data.theta.clone().requires_grad_()
            optimizer = torch.optim.SGD([theta], lr=rate)
            for step in range(STEPS):
                out = output(data.train, theta, weights, loss_type, beta)
                plain = out.pair_losses.mean()  # DPO and IPO: all pairs alike
                optimizer.zero_grad()
                (plain if method.base_is_sizes else out.loss).backward()
                optimizer.step()
                torch.testing.assert_close(runs.alphas[step + 1][d, m], weights.alpha, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(runs.theta[d, m], theta.detach(), rtol=1e-9, atol=1e-12)
            losses = output(data.validation, theta.detach(), weights.eval(), loss_type, beta).pair_losses
            halves = torch.stack([losses[:500].mean(), losses[500:].mean()])
            torch.testing.assert_close(runs.losses[-1][d, m], halves, rtol=1e-9, atol=1e-12)


def test_closed_form_runs_are_the_formula_step_by_step(bandits) -> None:
    train, validation, start = batches(bandits)
    beta, step_size = 0.1, 0.01
    step, setting = closed_form_step(train, beta), Setting("ipo", beta, step_size)
    runs = run_full_batch(train, validation, start, ALL, step, setting, iterations=STEPS, record_every=1)
    for d, data in enumerate(bandits):
        rows, ids = data.train.differences, data.train.group_ids
        for m, method in enumerate(ALL):
            weights, theta = group_weights(data.train, method, step_size), data.theta
            for step in range(STEPS):
                output(data.train, theta.clone().requires_grad_(), weights, "ipo", beta)  # moves alpha
                q = weights.loss_weights()
                per_pair = torch.ones(300).double() if method.base_is_sizes else (q / weights.group_sizes)[ids]
                # Least squares on rows scaled by sqrt(W): S theta = 1 / (2 beta).
                root = per_pair.sqrt().unsqueeze(1)
                target = root / (2 * beta)
                theta = torch.linalg.lstsq(root * rows, target).solution.squeeze(1)
                torch.testing.assert_close(runs.alphas[step + 1][d, m], weights.alpha, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(runs.theta[d, m], theta, rtol=1e-8, atol=1e-10)


def test_closed_form_robust_ipo_stays_at_the_minimax_point(bandits) -> None:
    """Dividing by the counts twice would drift away; here the group losses become equal and alpha rests."""
    train, validation, start = batches(bandits[:1])
    step, setting = closed_form_step(train, 0.1), Setting("ipo", 0.1, 0.01)
    runs = run_full_batch(train, validation, start, METHODS[2:], step, setting, iterations=3000, record_every=1000)
    losses = train.group_losses(runs.theta, "ipo", 0.1)[0, 0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(runs.alphas[-1], runs.alphas[-2], rtol=1e-6, atol=0)
    nearby = runs.theta + 0.05 * torch.randn(1, 500, 4, dtype=torch.float64)
    assert train.group_losses(nearby, "ipo", 0.1).amax(-1).min() >= losses.max() * (1 - 1e-6)


def test_chi_zero_is_importance_sampling(bandits) -> None:
    train, validation, start = batches(bandits)
    step, setting = gradient_step(train, "sigmoid", 1.0, 0.9), Setting("sigmoid", 1.0, 0.5)
    methods = (METHODS[1], Method("chi=0", 0.0))
    runs = run_full_batch(train, validation, start, methods, step, setting, iterations=50, record_every=50)
    assert torch.equal(runs.theta[:, 0], runs.theta[:, 1])
    assert torch.equal(runs.alphas[-1], torch.full((2, 2, 2), 0.5, dtype=torch.float64))
