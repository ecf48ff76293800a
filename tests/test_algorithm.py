"""Algorithm 1: each step against the formulas worked out by hand, projections, and a saddle that is known."""

from __future__ import annotations

import math

import pytest
import torch

import grpo_kernels as gk
from grpo_kernels.groups.sampling import GroupBatchSampler
from grpo_kernels.paper import algorithm

IDS = torch.tensor([0, 1, 1, 1, 0, 1, 1, 2, 1, 1])
SIZES = [2, 7, 1]
CENTRE = torch.tensor([1.0, 0, 0, -1])
BETA, ETA, RATE = 0.5, 0.2, 0.3


def features() -> torch.Tensor:
    return torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(**options):
    update = options.pop("update", "inline")
    theta = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=ETA, update=update)
    loss_fn = gk.GroupRobustLoss(weights, beta=BETA)
    optimizer = torch.optim.SGD([theta], lr=RATE)
    rows = features()
    options = {"steps": 30, "seed": 3, **options}
    average = algorithm.run_algorithm(lambda indices: rows[indices] @ theta, IDS, loss_fn, optimizer, **options)
    return theta.detach(), weights.alpha, average


def by_hand(steps: int, update: str, sampling: str, batch_size: int):
    """Algorithm 1 of docs/method.md, in Python floats and plain tensors."""
    rows, theta = features(), torch.full((4,), 0.3, dtype=torch.float64)
    alpha, sampler = [1 / 3] * 3, GroupBatchSampler(IDS, batch_size, sampling, seed=3)
    theta_sum, alpha_sum = torch.zeros(4, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for step in range(steps):
        theta_sum += theta
        pairs = sampler.batch(step)
        factor = [10 / n if sampling == "group" else 1.0 for n in SIZES]
        group_losses, slopes = [0.0] * 3, []
        for i in pairs:
            h = (rows[i] @ theta).item()
            group_losses[IDS[i]] += factor[IDS[i]] / batch_size * math.log1p(math.exp(-BETA * h))
            slopes.append(-BETA / (1 + math.exp(BETA * h)))
        raised = [a * math.exp(ETA * loss) for a, loss in zip(alpha, group_losses, strict=True)]
        moved = [a / sum(raised) for a in raised]
        used = moved if update == "inline" else alpha
        for i, slope in zip(pairs, slopes, strict=True):
            theta = theta - RATE * used[IDS[i]] * factor[IDS[i]] / batch_size * slope * rows[i]
        alpha_sum += torch.tensor(used, dtype=torch.float64)
        alpha = moved
    return theta, torch.tensor(alpha, dtype=torch.float64), theta_sum / steps, alpha_sum / steps


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("sampling", ["group", "uniform"])
@pytest.mark.parametrize("update", ["inline", "lagged"])
def test_every_step_is_the_formula(update: str, sampling: str, batch_size: int) -> None:
    theta, alpha, average = run(update=update, sampling=sampling, batch_size=batch_size)
    expected = by_hand(30, update, sampling, batch_size)
    for mine, other in zip((theta, alpha, average.theta, average.alpha), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_projection_holds_after_each_step() -> None:
    norms = []
    theta = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    rows = features()
    loss_fn = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=SIZES, step_size=ETA), beta=BETA)
    algorithm.run_algorithm(
        lambda indices: rows[indices] @ theta,
        IDS,
        loss_fn,
        torch.optim.SGD([theta], lr=3.0),
        steps=40,
        projection=algorithm.l2_ball(0.7),
        on_step=lambda step, out: norms.append((step, theta.detach().norm().item())),
    )
    assert [step for step, _ in norms] == list(range(1, 41))
    assert max(norm for _, norm in norms) <= 0.7 * (1 + 1e-12)
    assert sum(norm > 0.6999 for _, norm in norms) > 5, "the ball is never touched: the test shows nothing"


def test_log_probabilities_of_a_network_and_any_optimizer() -> None:
    """A policy of two layers that returns (2B,) log-ratios against a reference, and Adam; the loss falls."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
    rows, chosen = torch.randn(10, 4), torch.randint(0, 5, (10,))

    def logps(indices: torch.Tensor) -> torch.Tensor:
        scores = network(rows[indices]).log_softmax(-1)
        answers = torch.stack([chosen[indices], (chosen[indices] + 1) % 5])
        return torch.cat([scores.gather(1, answers[row].unsqueeze(1)).squeeze(1) for row in (0, 1)])

    reference = logps(torch.arange(10)).detach().view(2, 10)
    losses = []
    loss_fn = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=SIZES, step_size=0.05), beta=1.0)
    algorithm.run_algorithm(
        lambda indices: logps(indices) - reference[:, indices].flatten(),
        IDS,
        loss_fn,
        torch.optim.Adam(network.parameters(), lr=0.01),
        steps=150,
        batch_size=5,
        on_step=lambda step, out: losses.append(out.pair_losses.detach().mean().item()),
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-10:]) / 10 < 0.3


def test_known_saddle() -> None:
    """Margins (+2 theta, -theta), shares (0.2, 0.8): theta* = 0, alpha* = (1/3, 2/3), value log 2."""
    ids = torch.tensor([0, 1, 1, 1, 1])
    margins = torch.tensor([2.0, -1, -1, -1, -1], dtype=torch.float64)
    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    weights = gk.GroupWeights(group_sizes=[1, 4], step_size=0.02, update="lagged")
    average = algorithm.run_algorithm(
        lambda indices: margins[indices] * theta,
        ids,
        gk.GroupRobustLoss(weights, beta=1.0),
        torch.optim.SGD([theta], lr=0.02),
        steps=2000,
        projection=algorithm.box(-2.0, 2.0),
    )
    assert average.theta.item() == pytest.approx(0, abs=0.12)
    assert average.alpha[0].item() == pytest.approx(1 / 3, abs=0.05)


@pytest.mark.parametrize(
    ("projection", "inside"),
    [
        (algorithm.identity, lambda x: True),
        (algorithm.l2_ball(1.5, CENTRE), lambda x: (x - CENTRE).norm() <= 1.5001),
        (algorithm.box(-0.5, 1.0), lambda x: x.min() >= -0.5 and x.max() <= 1),
        (algorithm.simplex(2.0), lambda x: x.min() >= 0 and abs(x.sum() - 2) < 1e-5),
    ],
    ids=["identity", "l2_ball", "box", "simplex"],
)
def test_projections_are_the_nearest_points(projection, inside) -> None:
    points = 3 * torch.randn(50, 4)
    projected = projection(points)
    for point, nearest in zip(points, projected, strict=True):
        assert inside(nearest)
        torch.testing.assert_close(projection(nearest), nearest)
        torch.testing.assert_close(projection(point), nearest)
    # Nearest: the angle to every other point of the set is obtuse.
    others = projection(3 * torch.randn(200, 4))
    angles = ((points - projected).unsqueeze(1) * (others - projected.unsqueeze(1))).sum(-1)
    assert angles.max() <= 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be finite and in"),
        ({"sampling": "pooled"}, "sampling must be one of 'group', 'uniform', got 'pooled'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_weights_of_other_groups_and_scores_of_a_wrong_shape() -> None:
    theta = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    loss_fn = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=[2, 6, 2], step_size=0.1))
    with pytest.raises(ValueError, match=r"must have estimator='importance' and group_sizes=\[2, 7, 1\]"):
        algorithm.run_algorithm(lambda i: theta.expand(len(i)), IDS, loss_fn, optimizer, steps=1)
    loss_fn = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=SIZES, step_size=0.1))
    with pytest.raises(ValueError, match=r"policy must return \(1,\) margins or \(2,\) log-ratios"):
        algorithm.run_algorithm(lambda i: theta.expand(3), IDS, loss_fn, optimizer, steps=1)
