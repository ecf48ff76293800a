"""The rules that turn group losses into alpha: against the optimisation problems that define them, and their
properties; and GroupWeights(rule=..., loss_ema=...)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import truth
from conftest import batch
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels as gk
from grpo_kernels.groups.rules import ALPHA_RULES, moved_log_alpha

CASES = [(rule, parameter) for rule, (_, values) in truth.ALPHA_RULES.items() for parameter in values]
THREE = torch.ones(3, dtype=torch.int64)


def moved(rule, parameter, losses, prior=None, alpha=None, present=None, floor=0.0) -> torch.Tensor:
    losses = torch.as_tensor(losses, dtype=torch.float64)
    uniform = torch.full_like(losses, 1 / losses.shape[-1])
    alpha = uniform if alpha is None else torch.as_tensor(alpha, dtype=torch.float64)
    prior = uniform if prior is None else torch.as_tensor(prior, dtype=torch.float64)
    present = torch.ones_like(losses, dtype=torch.bool) if present is None else torch.tensor(present)
    return moved_log_alpha(alpha.log(), losses, present, prior.log(), rule=rule, parameter=parameter, floor=floor).exp()


def test_every_rule_is_tested() -> None:
    """A new rule brings, in truth.py, its formula in plain numbers and parameters to try."""
    assert set(truth.ALPHA_RULES) == set(ALPHA_RULES)


@pytest.mark.parametrize("case", CASES)
def test_every_rule_is_its_formula(case: tuple[str, float]) -> None:
    rule, parameter = case
    generator = torch.Generator().manual_seed(1)
    for num_groups in (1, 2, 5):
        for _ in range(10):
            losses, prior, alpha = torch.rand(3, num_groups, generator=generator, dtype=torch.float64) + 0.05
            losses[-1] = losses[0]  # equal ones
            prior, alpha = prior / prior.sum(), alpha / alpha.sum()
            expected = truth.ALPHA_RULES[rule][0](alpha.tolist(), prior.tolist(), losses.tolist(), parameter)
            got = moved(rule, parameter, losses, prior, alpha)
            torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def positive(n: int) -> st.SearchStrategy:
    return st.lists(st.floats(0.05, 1.0), min_size=n, max_size=n)


@given(data=st.data(), case=st.sampled_from(CASES), num_groups=st.integers(1, 6), floor=st.sampled_from([0.0, 0.3]))
@settings(max_examples=300, deadline=None)
def test_on_the_simplex_monotone_and_equivariant(data, case, num_groups, floor) -> None:
    losses = torch.tensor(data.draw(st.lists(st.floats(0, 20), min_size=num_groups, max_size=num_groups)))
    prior, alpha = (torch.tensor(data.draw(positive(num_groups)), dtype=torch.float64) for _ in range(2))
    prior, alpha = prior / prior.sum(), (1 - floor) * alpha / alpha.sum() + floor / num_groups
    after = moved(*case, losses, prior, alpha, floor=floor)
    assert after.sum().item() == pytest.approx(1, abs=1e-12)
    assert (after >= floor / num_groups * (1 - 1e-9)).all()
    order = torch.tensor(data.draw(st.permutations(range(num_groups))))
    permuted = moved(*case, losses[order], prior[order], alpha[order], floor=floor)
    torch.testing.assert_close(permuted, after[order], rtol=1e-6, atol=1e-9)
    group, rise = data.draw(st.integers(0, num_groups - 1)), data.draw(st.floats(0.01, 10))
    worse = losses.clone()
    worse[group] += rise
    assert moved(*case, worse, prior, alpha, floor=floor)[group] >= after[group] - 1e-9


@pytest.mark.parametrize("case", CASES)
def test_the_larger_loss_gets_the_larger_weight(case: tuple[str, float]) -> None:
    after = moved(*case, [0.1, 2.0, 0.7, 0.7])
    assert after[1] >= after[2] >= after[0]
    assert after[2].item() == pytest.approx(after[3].item(), rel=1e-9)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in ("cvar", "chi_squared")])
def test_maximises_over_its_ball(case: tuple[str, float]) -> None:
    """No feasible alpha of a fine random cloud does better, and the rule's own is feasible."""
    rule, parameter = case
    losses = torch.tensor([1.0, 0.2, 0.9, 0.5], dtype=torch.float64)
    prior = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    cloud = torch.distributions.Dirichlet(torch.full((4,), 0.7, dtype=torch.float64)).sample((200_000,))
    towards = torch.rand(200_000, 1, dtype=torch.float64)
    cloud = towards * cloud + (1 - towards) * prior  # a part of the cloud in small balls

    def feasible(alpha: torch.Tensor, slack: float) -> torch.Tensor:
        if rule == "cvar":
            return (alpha <= prior / parameter + slack).all(-1)
        return ((alpha - prior) ** 2 / prior).sum(-1) <= parameter + slack

    mine = moved(rule, parameter, losses, prior)
    assert feasible(mine, 1e-12)
    inside = cloud[feasible(cloud, 0.0)]
    assert len(inside) > 1000 or parameter in (0.0, 1.0), "where the ball is one point nothing is to be compared"
    if len(inside):
        assert (mine * losses).sum() >= (inside @ losses).max() - 1e-12


def test_known_answers() -> None:
    losses = [3.0, 1.0, 2.0, 0.0]
    equal = torch.full((4,), 0.25, dtype=torch.float64)

    def assert_is(alpha: torch.Tensor, expected: list[float] | torch.Tensor) -> None:
        torch.testing.assert_close(alpha, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)

    assert_is(moved("soft_maximum", 2.0, losses), torch.tensor(losses).double().div(2).softmax(0))
    assert_is(moved("cvar", 0.25, losses), [1.0, 0, 0, 0])
    assert_is(moved("cvar", 0.5, losses), [0.5, 0, 0.5, 0])
    assert_is(moved("cvar", 0.6, losses), [1 / 2.4, 0.4 / 2.4, 1 / 2.4, 0])
    assert_is(moved("cvar", 0.3, [2.0, 2.0, 2.0, 0.0]), [1 / 3, 1 / 3, 1 / 3, 0])
    assert_is(moved("cvar", 0.5, losses, prior=[0.1, 0.2, 0.3, 0.4]), [0.2, 0.2, 0.6, 0])
    # Inside the simplex alpha = mu (1 + sqrt(radius / variance) (L - mean)); here mean 1.5, variance 1.25.
    inside = equal * (1 + math.sqrt(0.2 / 1.25) * (torch.tensor(losses).double() - 1.5))
    assert_is(moved("chi_squared", 0.2, losses), inside)
    assert_is(moved("chi_squared", 3.0, losses), [1.0, 0, 0, 0])  # the whole simplex
    assert_is(moved("chi_squared", 1.0, [0.0, 5.0, 5.0, 0.0]), [0, 0.5, 0.5, 0])
    assert_is(moved("power", 2.0, losses), [9 / 14, 1 / 14, 4 / 14, 0])
    assert_is(moved("power", 1.0, [-1.0, 0.0], prior=[0.3, 0.7]), [0.3, 0.7])  # nothing to go by
    assert_is(moved("power", 1.0, [-1.0, 2.0], prior=[0.3, 0.7]), [0, 1.0])
    for rule, neutral in (("cvar", 1.0), ("chi_squared", 0.0), ("exponentiated_gradient", 0.0), ("power", 0.0)):
        assert_is(moved(rule, neutral, losses), equal)
    for rule, parameter in CASES:
        assert_is(moved(rule, parameter, [0.7] * 4), equal)


@pytest.mark.parametrize("case", CASES)
def test_absent_groups_keep_their_weight_and_the_batch_dimension_is_many_runs(case: tuple[str, float]) -> None:
    losses = torch.rand(5, 7, 4, dtype=torch.float64)
    alpha = torch.rand(5, 7, 4, dtype=torch.float64) + 0.1
    alpha = alpha / alpha.sum(-1, keepdim=True)
    present = [True, False, True, True]
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    together = moved(*case, losses, prior, alpha, present)
    torch.testing.assert_close(together[..., 1], alpha[..., 1])
    one = moved(*case, losses[2, 3], prior, alpha[2, 3], present)
    torch.testing.assert_close(together[2, 3], one)
    wild = losses.clone()
    wild[..., 1] = 1e6
    torch.testing.assert_close(moved(*case, wild, prior, alpha, present), together)


# -- GroupWeights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_group_weights_follow_the_rule(case: tuple[str, float]) -> None:
    rule, parameter = case
    option = {ALPHA_RULES[rule].parameter: parameter}
    for prior, mu in (("uniform", [1 / 3] * 3), ("sizes", [0.6, 0.35, 0.05])):
        weights = gk.GroupWeights(group_sizes=[60, 35, 5], rule=rule, prior=prior, **option)
        sums = torch.tensor([0.6, 0.35, 0.1], dtype=torch.float64)  # L = (1, 1, 2) / 3
        weights.update(sums, THREE)
        torch.testing.assert_close(weights.alpha, moved(rule, parameter, [1 / 3, 1 / 3, 2 / 3], mu))
    loss = gk.GroupRobustLoss(weights, reference_free=True)
    out = loss.from_logps(torch.randn(8, requires_grad=True), torch.tensor([0, 1, 2, 0]))
    assert torch.isfinite(out.loss)


@pytest.mark.interpreted(case=[CASES[6], "loss_ema"])
@pytest.mark.parametrize("case", [*CASES[::3], "loss_ema"])
def test_all_backends_move_alpha_by_the_rule(case, backend: str) -> None:
    """Backends that fuse the update have the default rule only; the others must not be taken for it."""
    if case == "loss_ema":
        options = {"step_size": 0.5, "loss_ema": 0.5}
    else:
        options = {"rule": case[0], ALPHA_RULES[case[0]].parameter: case[1]}
    logits, labels = batch(num_pairs=4, dtype=torch.float32)
    alphas = []
    for name in ("reference", backend):
        weights = gk.GroupWeights(group_sizes=[60, 35, 5], **options)
        loss_fn = gk.GroupRobustLoss(weights, reference_free=True, backend=name)
        for _ in range(2):
            out = loss_fn(logits, labels, torch.tensor([0, 1, 2, 0]))
        out.loss.backward()
        alphas.append(out.alpha)
    torch.testing.assert_close(alphas[0], alphas[1], rtol=1e-4, atol=1e-6)


def test_rules_without_memory_forget() -> None:
    weights = gk.GroupWeights(group_sizes=[1, 1, 1], rule="cvar", level=1 / 3)
    weights.update(torch.tensor([0.0, 5.0, 1.0]), THREE)
    assert weights.alpha.tolist() == [0, 1, 0]
    weights.update(torch.tensor([2.0, 1.0, 0.0]), THREE)
    assert weights.alpha.tolist() == [1, 0, 0]


def test_loss_ema_is_the_weighted_mean_of_the_past() -> None:
    weights = gk.GroupWeights(3, estimator="group_mean", rule="soft_maximum", temperature=1.0, loss_ema=0.8)
    batches = torch.rand(6, 3, dtype=torch.float64)
    for losses in batches:
        weights.update(losses, THREE)
    decay = 0.8 ** torch.arange(5, -1, -1, dtype=torch.float64)
    mean = (decay[:, None] * batches).sum(0) / decay.sum()
    torch.testing.assert_close(weights.alpha, mean.softmax(0))
    state = copy.deepcopy(weights.state_dict())
    with pytest.warns(RuntimeWarning, match="not finite"):
        weights.update(torch.tensor([math.nan, 1.0, 1.0]), THREE)
    weights.update(torch.zeros(3), 0 * THREE)  # an empty batch
    for name in ("log_alpha", "ema_losses", "ema_weights"):
        assert torch.equal(weights.state_dict()[name], state[name])


def test_loss_ema_remembers_groups_that_a_batch_lacks() -> None:
    weights = gk.GroupWeights(3, estimator="group_mean", rule="cvar", level=1 / 3, loss_ema=0.5)
    weights.update(torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1, 1, 0]))
    torch.testing.assert_close(weights.alpha, torch.tensor([0, 2 / 3, 1 / 3]).double())  # the third not seen yet
    weights.update(torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(weights.alpha, torch.tensor([0.0, 1, 0]).double())


def test_state_with_loss_ema() -> None:
    def new(**options) -> gk.GroupWeights:
        return gk.GroupWeights(group_sizes=[5, 3, 2], step_size=0.1, **options)

    averaged, other = new(loss_ema=0.9), new(loss_ema=0.9)
    for _ in range(3):
        averaged.update(torch.rand(3), THREE)
    other.load_state_dict(averaged.state_dict())
    for weights in (averaged, other):
        weights.update(torch.tensor([0.1, 0.2, 0.3]), THREE)
    for name, value in averaged.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert "ema_losses" not in new().state_dict(), "the default's checkpoints stay as they were"
    old = new().state_dict()
    with pytest.warns(RuntimeWarning, match="loss_ema=0, here 0.9"):
        other.load_state_dict(old)
    assert torch.equal(other.ema_weights, torch.zeros(3, dtype=torch.float64))
    assert set(old) == set(new().state_dict())
    without = new()
    with pytest.warns(RuntimeWarning, match="loss_ema=0.9.*left out .*: ema_losses, ema_weights"):
        without.load_state_dict(averaged.state_dict())
    assert torch.equal(without.log_alpha, averaged.log_alpha)
    assert averaged.bfloat16().ema_losses.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "step_size must be given for rule='exponentiated_gradient', got None"),
        ({"rule": "cvar", "step_size": 0.1}, "step_size has no meaning for rule='cvar', which takes level; got 0.1"),
        ({"rule": "cvar", "level": 0.0}, r"level must be finite and in \(0"),
        ({"rule": "cvar", "level": 1.5}, "level must be finite and in"),
        ({"rule": "soft_maximum", "temperature": 0.0}, r"temperature must be finite and in \(0"),
        ({"rule": "chi_squared", "radius": -1.0}, "radius must be finite and in"),
        ({"rule": "power", "exponent": -1.0}, "exponent must be finite and in"),
        ({"rule": "maximum"}, "rule must be one of 'exponentiated_gradient'"),
        ({"step_size": 0.1, "prior": "shares"}, "prior must be one of 'uniform', 'sizes', got 'shares'"),
        ({"step_size": 0.1, "loss_ema": 1.0}, "loss_ema must be finite and in"),
        (
            {"step_size": 0.1, "prior": "sizes", "group_sizes": None, "num_groups": 2, "estimator": "group_mean"},
            "group_sizes must be given for prior='sizes'",
        ),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gk.GroupWeights(**{"group_sizes": [1, 2], **options})


def test_an_option_of_no_rule() -> None:
    with pytest.raises(TypeError, match="GroupWeights has no option 'stepsize'; the rules' are step_size, temperature"):
        gk.GroupWeights(2, estimator="group_mean", stepsize=0.1)
