"""baseline, inner_tilt and memberships: each against its formula in float64, by hand, on both paths."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import truth
from conftest import EMPTY_BY_DESIGN, batch

import grpo_kernels as gk
from grpo_kernels.batch import Rows
from grpo_kernels.groups.forecast import forecast_of
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_plan import Budget, plan_for

SIZES = [60, 35, 5]
IDS = [0, 1, 2, 0, 1, 0, 1, 0]
SHARES = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
SHARES = SHARES / SHARES.sum(1, keepdim=True)
ONE_GROUP_EACH = torch.nn.functional.one_hot(torch.tensor(IDS), 3).double()


def weights_of(**options) -> gk.GroupWeights:
    return gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.3, **options})


def as_ids(members: torch.Tensor) -> torch.Tensor:
    """Numbers where each pair has one group: the same memberships."""
    return members.argmax(1) if torch.equal(members, ONE_GROUP_EACH) else members


class Model:
    """Group losses, alpha and the loss's slopes in float64, in plain loops. State: alpha, nu, as of GroupWeights."""

    def __init__(self, estimator="importance", tau=None, baseline=None, lagged=False, step_size=0.3) -> None:
        self.estimator, self.tau, self.baseline, self.lagged = estimator, tau, baseline, lagged
        self.step_size, self.alpha, self.nu = step_size, [1 / 3] * 3, [None] * 3

    def step(self, losses: list[float], members: list[list[float]]) -> tuple[float, list[float], list[float]]:
        """(loss, its slopes in the pair losses, L_g) of one batch, which moves alpha."""
        groups, pairs = range(3), range(len(losses))
        n = [sum(members[i][g] for i in pairs) for g in groups]
        plain = [sum(members[i][g] * losses[i] for i in pairs) / n[g] if n[g] else 0.0 for g in groups]
        tilted, factors = plain, [[1.0] * 3 for _ in pairs]
        of_loss = plain
        if self.tau is not None:
            e = [math.exp(x / self.tau) for x in losses]
            mean = [sum(members[i][g] * e[i] for i in pairs) / n[g] if n[g] else 1.0 for g in groups]
            tilted = [self.tau * math.log(m) if n[g] else 0.0 for g, m in zip(groups, mean, strict=True)]
            of_loss, factors = tilted, [[e[i] / m for m in mean] for i in pairs]
            if self.lagged:
                factors = [
                    [1.0 if nu is None else math.exp((losses[i] - nu) / self.tau) for nu in self.nu] for i in pairs
                ]
                values = [
                    [
                        losses[i] if nu is None else nu + self.tau * (f - 1)
                        for nu, f in zip(self.nu, factors[i], strict=True)
                    ]
                    for i in pairs
                ]
                of_loss = [sum(members[i][g] * values[i][g] for i in pairs) / n[g] if n[g] else 0.0 for g in groups]
        total = len(losses)
        scale = [100 / SIZES[g] * n[g] / total if self.estimator == "importance" else 1.0 for g in groups]
        moved_by = [s * x for s, x in zip(scale, tilted, strict=True)]
        if self.baseline is not None:
            moved_by = [max(0.0, s * (x - b)) for s, x, b in zip(scale, tilted, self.baseline, strict=True)]
        taking_part = [g for g in groups if self.estimator == "importance" or n[g]]
        mass = sum(self.alpha[g] for g in taking_part)
        raw = {g: self.alpha[g] * math.exp(self.step_size * moved_by[g]) for g in taking_part}
        new = [mass * raw[g] / sum(raw.values()) if g in raw else self.alpha[g] for g in groups]
        used = self.alpha if self.lagged else new
        loss = sum(used[g] * scale[g] * of_loss[g] for g in groups)
        slopes = [sum(used[g] * scale[g] * members[i][g] * factors[i][g] / n[g] for g in groups if n[g]) for i in pairs]
        self.alpha, self.nu = new, [t if n[g] else old for g, (t, old) in enumerate(zip(tilted, self.nu, strict=True))]
        return loss, slopes, [s * x for s, x in zip(scale, of_loss, strict=True)]


OPTIONS = {
    "baseline": {"baseline": [0.4, 0.9, 0.1]},
    "worst up": {"tau": 0.3},
    "outliers down": {"tau": -0.5},
    "shares": {},
    "all": {"tau": 0.3, "baseline": [0.4, 0.9, 0.1]},
}
MEMBERS = {"baseline": ONE_GROUP_EACH, "worst up": ONE_GROUP_EACH, "outliers down": ONE_GROUP_EACH}


@EMPTY_BY_DESIGN
@pytest.mark.parametrize("path", ["logps", "logits", "linear"])
@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_formula(name: str, estimator: str, lagged: bool, path: str) -> None:
    """Three steps: loss, group losses, gradient, alpha. The second batch lacks the rare group."""
    options = OPTIONS[name]
    model = Model(estimator, lagged=lagged, **options)
    weights = weights_of(
        estimator=estimator,
        update="lagged" if lagged else "inline",
        inner_tilt=options.get("tau"),
        baseline=options.get("baseline"),
    )
    kind = gk.LinearGroupRobustLoss if path == "linear" else gk.GroupRobustLoss
    swept = path == "linear" and forecast_of(weights, as_ids(MEMBERS.get(name, SHARES))) is not None
    loss_fn = kind(weights, beta=0.5, reference_free=True, **({"plan": "sweep"} if swept else {}))
    for step in range(3):
        members = MEMBERS.get(name, SHARES)
        if step == 1:
            members = members.clone()
            members[:, 0] += members[:, 2]
            members[:, 2] = 0
        ids = members.argmax(1) if name in MEMBERS else members
        logits, labels = batch(num_pairs=8, length=3, vocab=7, seed=step)
        head = torch.eye(7, dtype=torch.float64).requires_grad_()  # hidden states that are the logits
        logps, slopes = truth.sequence_terms(logits, labels)
        terms = [truth.pair_loss(float(h), 0.5, "sigmoid") for h in logps[:8] - logps[8:]]
        wanted_loss, per_loss, group_losses = model.step([value for value, _ in terms], members.tolist())
        if path == "logps":
            leaf = logps.clone().requires_grad_()
            out = loss_fn.from_logps(leaf, ids)
        else:
            leaf = logits
            out = loss_fn(logits, head, labels, ids) if path == "linear" else loss_fn(logits, labels, ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a sweep that has to compute something again
            grad, *more = torch.autograd.grad(out.loss, [leaf, *([head] if path == "linear" else [])])
        if lagged:
            weights.step()
        assert out.loss.item() == pytest.approx(wanted_loss, rel=1e-9)
        assert out.group_losses.tolist() == pytest.approx(group_losses, rel=1e-9)
        assert weights.alpha.tolist() == pytest.approx(model.alpha, rel=1e-9)
        dh = torch.tensor([c * slope for c, (_, slope) in zip(per_loss, terms, strict=True)], dtype=torch.float64)
        dlogps = torch.cat([dh, -dh])
        wanted = dlogps if path == "logps" else dlogps[:, None, None] * slopes
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-10)
        if more:
            dlogits = (dlogps[:, None, None] * slopes).flatten(0, 1)
            torch.testing.assert_close(more[0], dlogits.T @ logits.detach().flatten(0, 1), rtol=1e-8, atol=1e-9)


def test_which_way_tau_goes() -> None:
    """Positive: the worst pair of a group weighs most, and L_g is above the mean; negative: least, and below."""
    losses = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    for tau, order in ((1.0, 1), (-1.0, -1), (1e6, 0)):
        weights = gk.GroupWeights(1, estimator="group_mean", step_size=0.0, inner_tilt=tau)
        out = gk.GroupRobustLoss(weights).from_pair_losses(losses, torch.zeros(3, dtype=torch.int64))
        (slopes,) = torch.autograd.grad(out.loss, losses)
        torch.testing.assert_close(slopes, (losses.detach() / tau).softmax(0))
        above = (out.group_losses[0] - losses.mean()).item()
        assert math.copysign(1, above) == order if order else abs(above) < 1e-5
        assert out.group_means.item() == pytest.approx(losses.mean().item())


def test_dr_dpo_and_its_value() -> None:
    """tau = -beta' is Dr. DPO: -beta' log mean exp(-l / beta')."""
    losses = torch.rand(6, dtype=torch.float64)
    weights = gk.GroupWeights(1, estimator="group_mean", step_size=0.0, inner_tilt=-0.7)
    out = gk.GroupRobustLoss(weights).from_pair_losses(losses, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(out.loss, -0.7 * (-losses / 0.7).exp().mean().log())


@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_tilts_of_large_losses_do_not_overflow(scale: float) -> None:
    losses = (scale * torch.rand(8, dtype=torch.float64)).requires_grad_()
    ids = torch.tensor(IDS)
    for tau in (1.0, -1.0):
        out = gk.GroupRobustLoss(weights_of(inner_tilt=tau, step_size=0.0)).from_pair_losses(losses, ids)
        (slopes,) = torch.autograd.grad(out.loss, losses)
        assert out.loss.isfinite()
        assert slopes.isfinite().all()
        worst = [max if tau > 0 else min][0](losses[ids == 0].tolist())
        if scale > 1:
            assert out.group_losses[0].item() == pytest.approx(100 / 60 * 4 / 8 * worst, rel=0.01)


@pytest.mark.parametrize("tau", [0.4, -0.4])
def test_a_loss_that_is_not_finite_is_not_hidden_by_its_weight(tau: float) -> None:
    for update in ("inline", "lagged"):
        weights = weights_of(inner_tilt=tau, update=update)
        before = {name: value.clone() for name, value in weights.state_dict().items() if "pending" not in name}
        losses = torch.tensor([0.3, math.inf, 0.2], requires_grad=True)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = gk.GroupRobustLoss(weights).from_pair_losses(losses, torch.tensor([0, 0, 1]))
            if update == "lagged":
                weights.step()
        assert "not finite" in str(said[0].message)
        assert not out.loss.isfinite()
        for name, value in before.items():
            if name != "skipped_updates":
                assert torch.equal(weights.state_dict()[name].nan_to_num(7), value.nan_to_num(7)), name


def micro_batches(weights: gk.GroupWeights, losses: torch.Tensor, ids: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """The gradient of a step that comes in parts."""
    leaf, loss_fn = losses.clone().requires_grad_(), gk.GroupRobustLoss(weights)
    for start, end in zip([0, *cuts], [*cuts, len(losses)], strict=True):
        total = len(losses) if weights.estimator == "importance" else None
        loss_fn.from_pair_losses(leaf[start:end], ids[start:end], total_pairs=total).loss.backward()
    weights.step()
    return leaf.grad


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("tau", [None, 0.5, -0.5])
def test_accumulation_is_one_batch(tau: float | None, soft: bool) -> None:
    ids = SHARES if soft else torch.tensor(IDS)
    one, many = (weights_of(update="lagged", inner_tilt=tau, baseline=[0.3, 0.3, 0.3]) for _ in range(2))
    for step in range(3):
        losses = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        grads = micro_batches(one, losses, ids, []), micro_batches(many, losses, ids, [1, 6])
        torch.testing.assert_close(*grads)
        torch.testing.assert_close(one.log_alpha, many.log_alpha)
        for name in ("pending_sums", "pending_counts", "pending_shares"):
            assert not many.state_dict()[name].any(), name


def test_running_baseline_is_the_lowest_running_mean() -> None:
    """A group that is hard but as good as it has been is not followed; one that gets worse is."""
    weights = gk.GroupWeights(2, estimator="group_mean", step_size=0.5, baseline="running")
    batches = torch.tensor([[2.0, 1.0], [2.0, 0.2], [2.2, 0.2], [2.0, 0.9]], dtype=torch.float64)
    sums, norm, lowest, alpha = [0.0, 0.0], 0.0, [math.inf] * 2, [0.5, 0.5]
    for losses in batches.tolist():
        weights.update(torch.tensor(losses), torch.tensor([1, 1]))
        norm = 0.9 * norm + 0.1
        sums = [0.9 * s + 0.1 * x for s, x in zip(sums, losses, strict=True)]
        lowest = [min(low, s / norm) for low, s in zip(lowest, sums, strict=True)]
        excess = [max(0.0, x - low) for x, low in zip(losses, lowest, strict=True)]
        raw = [a * math.exp(0.5 * x) for a, x in zip(alpha, excess, strict=True)]
        alpha = [x / sum(raw) for x in raw]
        assert weights.alpha.tolist() == pytest.approx(alpha, rel=1e-6)
    assert weights.baseline.tolist() == pytest.approx(lowest, rel=1e-6)
    assert alpha[0] == pytest.approx(alpha[0])
    hard = gk.GroupWeights(2, estimator="group_mean", step_size=0.5, baseline="running")
    for _ in range(50):
        hard.update(torch.tensor([2.0, 0.1]), torch.tensor([1, 1]))
    torch.testing.assert_close(hard.alpha, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_running_baseline_leaves_out_absent_groups_and_bad_batches() -> None:
    weights = weights_of(baseline="running")
    weights.update(torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1, 2, 0]))
    assert weights.baseline.tolist() == pytest.approx([1.0, 1.0, math.inf])
    before = copy.deepcopy(weights.state_dict())
    with pytest.warns(RuntimeWarning, match="not finite"):
        weights.update(torch.tensor([math.nan, 2.0, 0.0]), torch.tensor([1, 2, 0]))
    for name, value in weights.state_dict().items():
        assert torch.equal(value, before[name]) or name == "skipped_updates", name
    assert weights.alpha.isfinite().all()


def test_excess_is_averaged_before_it_is_cut_off() -> None:
    weights = gk.GroupWeights(2, estimator="group_mean", step_size=1.0, baseline=[1.0, 0.0], loss_ema=0.5)
    for losses in ([0.0, 0.3], [2.5, 0.3]):
        weights.update(torch.tensor(losses), torch.tensor([1, 1]))
    # Group 0: means of (-1, 1.5) are -1, then (-1 + 2 * 1.5) / 3; cut off 0 and 2/3. Group 1: .3 and .3.
    expected = torch.tensor([0 + 2 / 3, 0.3 + 0.3], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(weights.alpha, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "lacking"),
    [
        ({"baseline": "running"}, "baseline=none, here running.*no baseline, baseline_sums, baseline_weights"),
        ({"inner_tilt": 0.5, "update": "lagged"}, "inner_tilt=0.0, here 0.5.*no tilted_means, pending_log_tilts"),
        ({"baseline": [1.0, 2.0, 3.0]}, "baseline=none, here given"),
    ],
)
def test_state_goes_on_and_older_ones_say_what_they_lack(options: dict, lacking: str) -> None:
    def feed(weights: gk.GroupWeights, seed: int) -> None:
        losses = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        gk.GroupRobustLoss(weights).from_pair_losses(losses, torch.tensor(IDS))
        if weights.update_mode == "lagged":
            weights.step()

    whole, second, older = (
        weights_of(**options),
        weights_of(**options),
        weights_of(update=options.get("update", "inline")),
    )
    for seed in range(3):
        feed(whole, seed)
    second.load_state_dict(whole.state_dict())
    for weights in (whole, second):
        feed(weights, 9)
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    with pytest.warns(RuntimeWarning, match=lacking):
        second.load_state_dict(older.state_dict())
    assert second.alpha.tolist() == pytest.approx([1 / 3] * 3)
    feed(second, 1)
    other = (
        weights_of(**{**options, "baseline": [1.0, 2.0, 4.0]}) if isinstance(options.get("baseline"), list) else None
    )
    if other is not None:
        with pytest.warns(RuntimeWarning, match=r"baseline was \[1.0, 2.0, 3.0\]. It goes on with \[1.0, 2.0, 4.0\]"):
            other.load_state_dict(whole.state_dict())
        assert other.baseline.tolist() == [1.0, 2.0, 4.0]


def test_the_defaults_state_is_as_it_was() -> None:
    names = [
        "log_alpha",
        "group_sizes",
        "pending_sums",
        "pending_counts",
        "skipped_updates",
        "shared_updates",
        "settings",
    ]
    state = weights_of().state_dict()
    assert sorted(state) == sorted(names)
    assert state["settings"].shape == (9,)


def plan_of(weights: gk.GroupWeights, ids: torch.Tensor) -> str:
    """What the planner would take for a head so wide that three products pay."""
    hidden = torch.randn(2 * len(ids), 64, 32, requires_grad=True)
    head = LinearHead(torch.randn(4096, 32, requires_grad=True), None, 1.0, 0.0)
    rows = Rows(torch.zeros(2 * len(ids), 64, dtype=torch.int64))
    forecast = forecast_of(weights, ids)
    budget = Budget(10**9)
    return plan_for(hidden, head, rows, budget, 0 if forecast is None else forecast.accumulators).name


def test_the_planner_sweeps_where_it_can_forecast_and_else_not() -> None:
    ids = torch.tensor(IDS)
    assert forecast_of(weights_of(inner_tilt=0.5), ids).accumulators == 2
    assert forecast_of(weights_of(inner_tilt=0.5, update="lagged"), ids).accumulators == 1
    assert forecast_of(weights_of(baseline="running", update="lagged"), ids) is not None
    for weights in (
        weights_of(baseline="running"),
        weights_of(step_size="auto"),
        weights_of(inner_tilt=0.5, floor=0.1),
    ):
        assert forecast_of(weights, ids) is None
        assert plan_of(weights, ids) in ("keep", "recompute")
        labels = torch.ones(16, 4, dtype=torch.int64)
        hidden, head = torch.randn(16, 4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
        loss_fn = gk.LinearGroupRobustLoss(weights, reference_free=True, plan="sweep")
        with pytest.raises(ValueError, match="'sweep': it needs"):
            loss_fn(hidden, head, labels, ids)
    assert forecast_of(weights_of(), SHARES) is None
    assert plan_of(weights_of(), SHARES) in ("keep", "recompute")


@pytest.mark.parametrize("update", ["inline", "lagged"])
@pytest.mark.parametrize("tau", [0.5, -0.5])
def test_the_sweep_of_a_tilt_is_exact_in_small_chunks(tau: float, update: str) -> None:
    """Groups larger than a chunk, and pairs longer than one."""
    torch.manual_seed(0)
    _, labels = batch(num_pairs=8, length=7, vocab=11)
    hidden, head = torch.randn(16, 7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    grads = []
    for plan, extra in (("sweep", 0), ("recompute", 0)):
        weights = weights_of(inner_tilt=tau, update=update)
        if update == "lagged":
            weights.tilted_means.copy_(torch.tensor([0.4, math.nan, 0.9]))
        loss_fn = gk.LinearGroupRobustLoss(weights, beta=2.0, reference_free=True, plan="auto")
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        loss_fn.budget = Budget(10**6 if plan == "sweep" else extra, plan)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, value in (("CHUNK_ELEMENTS", 14 * 11), ("MIN_CHUNK_ROWS", 14)):
                patch.setattr(f"grpo_kernels.kernels.linear_plan.{name}", value)
            out = loss_fn(*leaves, labels, torch.tensor(IDS))
            grads.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_shares_of_one_group_each_are_ids() -> None:
    logits, labels = batch(num_pairs=8)
    results = []
    for ids in (torch.tensor(IDS), ONE_GROUP_EACH, ONE_GROUP_EACH.float()):
        out = gk.GroupRobustLoss(weights_of(), reference_free=True)(logits, labels, ids)
        results.append((out.loss, out.alpha, out.group_losses, *torch.autograd.grad(out.loss, logits)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options", [{"step_size": "auto"}, {"inner_tilt": 0.4, "baseline": "running", "update": "lagged"}]
)
def test_compiled_is_eager(options: dict) -> None:
    """In one graph, the whole state to the bit, for ids and for shares."""
    for ids in (torch.tensor(IDS), SHARES):
        torch.compiler.reset()
        eager, ours = (weights_of(**options) for _ in range(2))
        loss_of = gk.GroupRobustLoss(ours, backend="torch").from_pair_losses
        compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
        for seed in range(2):
            losses = torch.rand(8, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            results = []
            for weights, call in (
                (eager, gk.GroupRobustLoss(eager, backend="torch").from_pair_losses),
                (ours, compiled),
            ):
                loss = call(losses, ids).loss
                results.append((loss, *torch.autograd.grad(loss, losses)))
                if weights.update_mode == "lagged":
                    weights.step()
            assert all(torch.equal(*both) for both in zip(*results, strict=True))
        for name, value in eager.state_dict().items():
            assert torch.equal(ours.state_dict()[name].nan_to_num(7), value.nan_to_num(7)), name


@pytest.mark.parametrize("bad", [[0.5, 0.6, 0.0], [1.5, -0.5, 0.0], [math.nan, 0.5, 0.5]])
def test_bad_shares_make_the_loss_nan_and_leave_alpha(bad: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    shares, weights = SHARES.clone(), weights_of()
    shares[3] = torch.tensor(bad)
    loss_fn = gk.GroupRobustLoss(weights)
    with pytest.warns(RuntimeWarning, match="not finite"):
        assert loss_fn.from_pair_losses(torch.rand(8, requires_grad=True), shares).loss.isnan()
    assert weights.alpha.tolist() == pytest.approx([1 / 3] * 3)
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="group_ids must be at least 0 and add up to 1 in each row"):
        loss_fn.from_pair_losses(torch.rand(8, requires_grad=True), shares)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.rand(8), TypeError, "group_ids must be int64 or int32, got torch.float32"),
        (torch.rand(8, 2), ValueError, r"or \(8, 3\), its share in each group, got \(8, 2\)"),
        (torch.zeros(8, 3, dtype=torch.int64), TypeError, "must be float32 or float64 memberships, got torch.int64"),
        (torch.rand(8, 3).bfloat16(), TypeError, "must be float32 or float64 memberships, got torch.bfloat16"),
    ],
)
def test_bad_memberships(ids: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gk.GroupRobustLoss(weights_of()).from_pair_losses(torch.rand(8, requires_grad=True), ids)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"baseline": "lowest"}, ValueError, "baseline must be 'running' or a number for each group, got 'lowest'"),
        ({"baseline": [1.0]}, ValueError, r"baseline must be 3 finite numbers, one for each group, got \[1.0\]"),
        ({"baseline": [1.0, math.nan, 2.0]}, ValueError, "baseline must be 3 finite numbers"),
        ({"baseline": {"a": 1.0}}, TypeError, "baseline must be 'running' or a number for each group, got {'a': 1.0}"),
        ({"inner_tilt": 0}, ValueError, "inner_tilt must not be 0"),
        ({"inner_tilt": math.inf}, ValueError, "inner_tilt must be finite"),
        ({"inner_tilt": "up"}, TypeError, "inner_tilt must be a number, got str"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        weights_of(**options)
