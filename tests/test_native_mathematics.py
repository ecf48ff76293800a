"""csrc/common, the mathematics that host and device share, against float64: every branch, in float and in double."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import truth

import grpo_kernels as gk

_C = pytest.importorskip("grpo_kernels._C", reason="the extension is not built")

KINDS = [("float32", 3e-7), ("float64", 1e-15)]
FAR = [-1e4, -800.0, -90.0, -20.0, -3.0, -1e-3, -1e-8, 0.0, 1e-8, 1e-3, 0.7, 11.0, 25.0, 90.0, 900.0, 1e4]
LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.3)]


def function(name: str, kind: str):
    return getattr(_C.testing, f"{name}_{kind}")


@pytest.mark.parametrize(("kind", "eps"), KINDS)
def test_logistic_functions(kind: str, eps: float) -> None:
    for x in FAR:
        x = torch.tensor(x, dtype=getattr(torch, kind)).item()
        tiny = 1e-38 if kind == "float32" else 1e-300
        assert function("log_sigmoid", kind)(x) == pytest.approx(truth.log_sigmoid(x), rel=2 * eps, abs=tiny)
        assert function("softplus", kind)(x) == pytest.approx(-truth.log_sigmoid(-x), rel=2 * eps, abs=tiny)
        sigmoid = math.exp(truth.log_sigmoid(x)) if x > -700 else 0.0
        assert function("sigmoid", kind)(x) == pytest.approx(sigmoid, rel=3 * eps * max(1, -x / 10), abs=tiny)
    for name in ("log_sigmoid", "softplus", "sigmoid"):
        assert math.isnan(function(name, kind)(math.nan))
    assert function("log_sigmoid", kind)(-math.inf) == -math.inf
    assert function("softplus", kind)(math.inf) == math.inf
    assert (function("sigmoid", kind)(-math.inf), function("sigmoid", kind)(math.inf)) == (0, 1)


@pytest.mark.parametrize(("kind", "eps"), KINDS)
@pytest.mark.parametrize(("loss_type", "e"), LOSSES)
@pytest.mark.parametrize("beta", [0.125, 0.5, 2.0])
def test_pair_losses(kind: str, eps: float, loss_type: str, e: float, beta: float) -> None:
    e = torch.tensor(e, dtype=getattr(torch, kind)).item()
    for h in FAR:
        h = torch.tensor(h, dtype=getattr(torch, kind)).item()
        value, slope = truth.pair_loss(h, beta, loss_type, e) if abs(h) < 350 else far_pair_loss(h, beta, loss_type, e)
        got_value, got_slope = function("pair_loss", kind)(loss_type, h, beta, e)
        # Sums of terms of both signs: digits are counted from the largest term on.
        assert got_value == pytest.approx(value, rel=4 * eps, abs=eps * (1 + abs(beta * h)) / (1 - 2 * e) * 4)
        assert got_slope == pytest.approx(slope, rel=4 * eps, abs=eps * beta / (1 - 2 * e) * 4)


def far_pair_loss(h: float, beta: float, loss_type: str, e: float) -> tuple[float, float]:
    """truth.pair_loss where exp() of the margin itself would overflow: the logistic function is 0 or 1."""
    x = beta * h
    if loss_type in ("ipo", "hinge") or abs(x) < 350:
        return truth.pair_loss(h, beta, loss_type, e)
    up, down = max(-x, 0.0), max(x, 0.0)  # -log s(x), -log s(-x)
    sign = 1 if loss_type == "sigmoid" else -1
    scale = 1 if loss_type == "sigmoid" else 1 / (1 - 2 * e)
    slope = -beta * (1 - e) * (x < 0) + sign * beta * e * (x > 0)
    return ((1 - e) * up + sign * e * down) * scale, slope * scale


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_pair_losses_at_the_edges(kind: str) -> None:
    pair_loss = function("pair_loss", kind)
    for loss_type, e in LOSSES:
        assert all(map(math.isnan, pair_loss(loss_type, math.nan, 0.5, e))), loss_type
    assert pair_loss("hinge", 2.0, 0.5, 0.0) == (0.0, 0.0), "at the corner, as relu"
    assert pair_loss("hinge", math.inf, 0.5, 0.0) == (0.0, 0.0)
    assert pair_loss("hinge", -math.inf, 0.5, 0.0) == (math.inf, -0.5)
    assert pair_loss("sigmoid", math.inf, 0.5, 0.0)[1] == 0
    with pytest.raises(ValueError, match="loss_type must be sigmoid, ipo, hinge or robust, got 'dpo'"):
        pair_loss("dpo", 0.0, 0.5, 0.0)


@pytest.mark.parametrize(("kind", "eps"), KINDS)
def test_merging_parts(kind: str, eps: float) -> None:
    merged = function("log_sum_exp", kind)
    inf = math.inf
    values = [-1e4, -3.0, 0.5, 0.5, 88.0, 1e4]
    for order in itertools.permutations(values, 3):
        exact = torch.logsumexp(torch.tensor(order, dtype=torch.float64), 0).item()
        for parts in ([[*order]], [[x] for x in order], [[], [order[0]], [], [*order[1:]]]):
            assert merged(parts) == pytest.approx(exact, rel=2 * eps)
    for parts in ([[-inf], [2.0]], [[2.0], [-inf, -inf]], [[-inf, 2.0, -inf]], [[], [2.0]], [[2.0], []]):
        assert merged(parts) == 2.0
    assert merged([]) == merged([[], []]) == merged([[-inf]]) == merged([[-inf], [-inf]]) == -inf
    assert merged([[1.0], [inf]]) == merged([[inf, inf], [1.0]]) == inf
    for parts in ([[math.nan], [1.0]], [[1.0], [math.nan]], [[-inf], [math.nan]], [[math.nan], [-inf]]):
        assert math.isnan(merged(parts))


@pytest.mark.parametrize(("kind", "eps"), KINDS)
def test_log_add_exp(kind: str, eps: float) -> None:
    add, inf = function("log_add_exp", kind), math.inf
    for a, b in itertools.product([-1e4, -2.0, 0.0, 0.25, 700.0], repeat=2):
        exact = torch.logaddexp(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)).item()
        assert add(a, b) == pytest.approx(exact, rel=2 * eps, abs=eps)
    assert add(-inf, 3.0) == add(3.0, -inf) == 3.0
    assert add(-inf, -inf) == -inf
    assert math.isnan(add(math.nan, 0.0))


RULES = [
    {"estimator": estimator, "adjustment": adjustment, "floor": floor, "chi": chi}
    for estimator, adjustment, floor, chi in itertools.product(
        ("importance", "group_mean"), (0.0, 3.0), (0.0, 0.1), (1.0, 0.5)
    )
]


@pytest.mark.filterwarnings("ignore:a group's loss was not finite")
@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))
def test_alpha_moves_as_group_weights_says(kind: str, rule: dict) -> None:
    sizes = [700, 220, 80, 1000]
    weights = gk.GroupWeights(group_sizes=sizes, step_size=0.3, **rule)
    log_alpha = weights.log_alpha.tolist()
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if kind == "float64" else {"rtol": 2e-5, "atol": 2e-5}
    batches = [
        ([3.0, 2.0, 5.0, 1.0], [3, 1, 2, 4]),
        ([0.0, 2.0, 9.5, 0.0], [0, 2, 1, 0]),  # groups that the batch lacks
        ([0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]),  # an empty batch
        ([math.nan, 1.0, 1.0, 1.0], [1, 1, 1, 1]),
        ([1.0, math.inf, 1.0, 1.0], [1, 1, 1, 1]),
        ([900.0, 0.0, 0.0, 1.0], [1, 0, 0, 1]),
        ([0.0, 0.0, 4e3, 0.0], [1, 1, 1, 1]),  # one group takes all
        ([3.0, 2.0, 5.0, 1.0], [3, 1, 2, 4]),
    ]
    for sums, counts in batches:
        skipped = int(weights.skipped_updates)
        weights.update(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts))
        log_alpha, losses, factors, finite = function("move_alpha", kind)(
            log_alpha, sums, counts, sizes, rule["estimator"] == "importance", 0.3, rule["adjustment"], rule["floor"],
            rule["chi"],
        )  # fmt: skip
        got = torch.tensor(log_alpha, dtype=torch.float64)
        # Relative to alpha's own scale: log alpha of a group that has died out is large.
        torch.testing.assert_close(got.exp(), weights.alpha, **tolerance)
        torch.testing.assert_close(got, weights.log_alpha, **tolerance)
        assert finite == (int(weights.skipped_updates) == skipped)
        torch.testing.assert_close(torch.tensor(factors, dtype=torch.float64), weights.loss_weights(), **tolerance)
        if finite:
            expected = weights.group_losses(torch.tensor(sums), torch.tensor(counts))
            torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_alpha_against_the_paper(kind: str) -> None:
    """truth.group_robust, which knows nothing of log alpha; group_mean needs no sizes."""
    margins, group_ids, alpha = [0.5, -3.0, 2.0, 8.0, -1.0], [0, 2, 0, 0, 2], [0.5, 0.2, 0.3]
    sizes = [30, 10, 60]
    for estimator in ("importance", "group_mean"):
        exact = truth.group_robust(margins, group_ids, alpha, 0.7, sizes, estimator)
        sums = [sum(v for v, i in zip(exact["pair_losses"], group_ids, strict=True) if i == g) for g in range(3)]
        given = sizes if estimator == "importance" else []
        log_alpha, losses, factors, _ = function("move_alpha", kind)(
            [math.log(a) for a in alpha], sums, [3, 0, 2], given, estimator == "importance", 0.7, 0.0, 0.0, 1.0
        )
        assert [math.exp(a) for a in log_alpha] == pytest.approx(exact["alpha"], rel=1e-6)
        assert losses == pytest.approx(exact["group_losses"], rel=1e-6)
        assert factors == pytest.approx(exact["alpha"], rel=1e-6)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_group_without_weight_stays_without(kind: str) -> None:
    log_alpha, *_ = function("move_alpha", kind)(
        [0.0, -math.inf], [1.0, 50.0], [1, 1], [1, 1], True, 1.0, 0.0, 0.0, 1.0
    )
    assert log_alpha == [0.0, -math.inf]
    back, *_ = function("move_alpha", kind)(log_alpha, [1.0, 50.0], [1, 1], [1, 1], True, 1.0, 0.0, 0.5, 1.0)
    assert [math.exp(a) for a in back] == pytest.approx([0.75, 0.25])
    for floor, expected in ((0.0, [1.0, 0.0]), (0.5, [0.8, 0.2])):  # a batch of none but it
        alone, *_ = function("move_alpha", kind)(log_alpha, [0.0, 50.0], [0, 1], [], False, 1.0, 0.0, floor, 1.0)
        assert [math.exp(a) for a in alone] == pytest.approx(expected)
