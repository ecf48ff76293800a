"""GroupWeights: the update against the formulas, the properties of alpha, and its life as a module's state."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

import grpo_kernels as gk

SIZES = [60, 35, 5]


def weights_with(alpha: list[float] | None = None, **options) -> gk.GroupWeights:
    weights = gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.3, **options})
    if alpha is not None:
        weights.log_alpha.copy_(torch.tensor(alpha, dtype=torch.float64).log())
    return weights


def statistics(h: list[float], ids: list[int], num_groups: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    losses = [truth.pair_loss(x, 0.1, "sigmoid")[0] for x in h]
    sums = [sum(v for v, g in zip(losses, ids, strict=True) if g == k) for k in range(num_groups)]
    return torch.tensor(sums, dtype=torch.float64), torch.tensor([ids.count(k) for k in range(num_groups)])


@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
@pytest.mark.parametrize("ids", [[0, 0, 1, 2, 1], [0, 0, 0, 1, 1], [2, 2, 2, 2, 2]])
def test_update_is_the_formula(estimator: str, ids: list[int]) -> None:
    h = [3.0, -8.0, 14.0, -30.0, 1.0]
    alpha = [0.5, 0.3, 0.2]
    weights = weights_with(alpha, estimator=estimator)
    weights.update(*statistics(h, ids))
    expected = truth.group_robust(h, ids, alpha, 0.3, SIZES, estimator)["alpha"]
    torch.testing.assert_close(weights.alpha, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_group_mean_does_not_starve_absent_groups() -> None:
    """Equal losses, shares .6/.35/.05, 8 pairs a batch: the rare group keeps its weight."""
    weights = weights_with(estimator="group_mean", step_size=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        ids = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), 8, replacement=True, generator=generator)
        counts = torch.bincount(ids, minlength=3)
        weights.update(0.7 * counts.double(), counts)
    torch.testing.assert_close(weights.alpha, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_importance_is_unbiased_over_pooled_batches() -> None:
    """The mean of L_g over single-pair draws is the group's mean loss."""
    weights, losses = weights_with(), [0.2, 1.0, 3.0]
    total = torch.zeros(3, dtype=torch.float64)
    for g, size in enumerate(SIZES):
        sums = torch.zeros(3, dtype=torch.float64)
        sums[g] = losses[g]
        total += size / 100 * weights.group_losses(sums, torch.eye(3)[g].long())
    torch.testing.assert_close(total, torch.tensor(losses, dtype=torch.float64))


@given(
    alpha=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6),
    losses=st.lists(st.floats(0.0, 50.0), min_size=6, max_size=6),
    step_size=st.floats(0.0, 20.0),
    floor=st.sampled_from([0.0, 0.05, 0.5]),
    present=st.lists(st.booleans(), min_size=6, max_size=6),
    estimator=st.sampled_from(["importance", "group_mean"]),
)
@settings(max_examples=150, deadline=None)
def test_alpha_stays_on_the_simplex(alpha, losses, step_size, floor, present, estimator) -> None:
    k = len(alpha)
    start = [(1 - floor) * a / sum(alpha) + floor / k for a in alpha]
    weights = gk.GroupWeights(group_sizes=[10] * k, step_size=step_size, floor=floor, estimator=estimator)
    weights.log_alpha.copy_(torch.tensor(start, dtype=torch.float64).log())
    counts = torch.tensor(present[:k]).long()
    weights.update(torch.tensor(losses[:k], dtype=torch.float64) * counts, counts)
    after = weights.alpha
    assert after.isfinite().all()
    assert (after >= floor / k * (1 - 1e-9)).all()
    assert after.sum().item() == pytest.approx(1.0, abs=1e-12)
    if estimator == "group_mean":
        absent = counts == 0
        torch.testing.assert_close(after[absent], torch.tensor(start, dtype=torch.float64)[absent])


def test_moves_towards_the_worst_group_and_permutes_with_the_labels() -> None:
    sums, counts = torch.tensor([0.2, 3.0, 0.9], dtype=torch.float64), torch.tensor([1, 2, 1])
    for estimator in ("importance", "group_mean"):
        weights = weights_with([0.4, 0.4, 0.2], estimator=estimator, group_sizes=[10, 10, 10])
        weights.update(sums, counts)
        assert weights.alpha[1] > 0.4
        order = torch.tensor([2, 0, 1])
        relabelled = weights_with([0.2, 0.4, 0.4], estimator=estimator, group_sizes=[10, 10, 10])
        relabelled.update(sums[order], counts[order])
        torch.testing.assert_close(relabelled.alpha, weights.alpha[order])


def test_floor_and_chi_formulas() -> None:
    sums, counts = statistics([3.0, -8.0, -30.0], [0, 1, 2])
    plain, floored, mixed = weights_with(), weights_with(floor=0.2), weights_with(chi=0.4)
    for weights in (plain, floored, mixed):
        weights.update(sums, counts)
    torch.testing.assert_close(floored.alpha, 0.8 * plain.alpha + 0.2 / 3)
    slower = weights_with(step_size=0.3 * 0.4)
    slower.update(sums, counts)
    torch.testing.assert_close(mixed.alpha, slower.alpha)
    torch.testing.assert_close(mixed.loss_weights(), 0.6 / 3 + 0.4 * mixed.alpha)
    torch.testing.assert_close(plain.loss_weights(), plain.alpha)


def test_a_group_far_down_comes_back_with_a_floor() -> None:
    weights = weights_with(step_size=5.0, floor=0.03, group_sizes=[1, 1, 1], estimator="group_mean")
    good, bad = torch.tensor([9.0, 9.0, 0.0]), torch.tensor([0.0, 0.0, 9.0])
    for _ in range(500):
        weights.update(good, torch.ones(3, dtype=torch.int64))
    torch.testing.assert_close(weights.alpha[2].item(), 0.01)
    weights.update(bad, torch.ones(3, dtype=torch.int64))
    assert weights.alpha[2] > 0.9


def test_adjustment_is_added_to_what_moves_alpha_only() -> None:
    sums, counts = statistics([1.0, 1.0, 1.0], [0, 1, 2])
    weights = weights_with(adjustment=2.0)
    losses = weights.group_losses(sums, counts)
    weights.update(sums, counts)
    raised = losses + 2.0 / torch.tensor(SIZES, dtype=torch.float64).sqrt()
    torch.testing.assert_close(weights.alpha, torch.softmax(0.3 * raised, 0))
    torch.testing.assert_close(weights.group_losses(sums, counts), losses)


def test_many_updates_neither_drift_nor_overflow() -> None:
    weights = weights_with(step_size=10.0)
    for _ in range(2000):
        weights.update(torch.tensor([50.0, 0.0, 0.0]), torch.tensor([1, 1, 1]))
    assert weights.alpha.tolist() == [1.0, 0.0, 0.0]
    assert weights.log_alpha.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_loss_skips_counts_and_warns_once(bad: float) -> None:
    weights = weights_with([0.5, 0.3, 0.2])
    before = weights.log_alpha.clone()
    with pytest.warns(RuntimeWarning, match="alpha was not updated"):
        weights.update(torch.tensor([1.0, bad, 1.0]), torch.tensor([1, 1, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights.update(torch.tensor([bad, 1.0, 1.0]), torch.tensor([1, 1, 1]))
    assert torch.equal(weights.log_alpha, before)
    assert weights.skipped_updates == 2
    weights.update(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1, 1, 1]))
    assert not torch.equal(weights.log_alpha, before)


def test_an_empty_batch_moves_nothing() -> None:
    for estimator in ("importance", "group_mean"):
        weights = weights_with([0.5, 0.3, 0.2], estimator=estimator, adjustment=1.0)
        before = weights.log_alpha.clone()
        weights.update(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
        assert torch.equal(weights.log_alpha, before)


def test_lagged_step_is_one_update_of_everything() -> None:
    parts = [statistics([3.0, -8.0], [0, 1]), statistics([5.0], [2]), statistics([-9.0], [1])]
    lagged, once = weights_with(update="lagged"), weights_with()
    for part in parts:
        lagged.accumulate(*part)
    assert torch.equal(lagged.alpha, torch.full((3,), 1 / 3, dtype=torch.float64))
    lagged.step()
    once.update(sum(p[0] for p in parts), sum(p[1] for p in parts))
    torch.testing.assert_close(lagged.alpha, once.alpha)
    moved = lagged.log_alpha.clone()
    lagged.step()  # nothing was seen since
    assert torch.equal(lagged.log_alpha, moved)
    with pytest.raises(RuntimeError, match="belongs to update='lagged'"):
        once.step()


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "to", "parent"])
def test_dtype_casts_leave_alpha_alone(cast: str) -> None:
    weights = weights_with([0.123456789012345, 0.3, 0.576543210987655])
    before = weights.log_alpha.clone()
    if cast == "to":
        weights.to(torch.float16)
    elif cast == "parent":
        torch.nn.ModuleList([weights, torch.nn.Linear(2, 2)]).to(dtype=torch.bfloat16)
    else:
        getattr(weights, cast)()
    assert weights.log_alpha.dtype == torch.float64
    assert torch.equal(weights.log_alpha, before)
    assert weights.group_sizes.dtype == torch.int64


def test_device_moves_are_followed() -> None:
    weights = weights_with().to(device="meta", dtype=torch.bfloat16)
    assert weights.log_alpha.device.type == "meta"
    assert weights.log_alpha.dtype == torch.float64
    weights = weights.to_empty(device="cpu")
    weights.reset_parameters()
    torch.testing.assert_close(weights.alpha, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert weights.group_sizes.tolist() == weights_with().group_sizes.tolist()


@pytest.mark.parametrize("how", ["reset_parameters", "load_state_dict", "assign"])
def test_built_without_memory(how: str) -> None:
    """As FSDP2's users build models: the same as built in memory, sizes and a given baseline, too."""
    options = {"baseline": [0.1, 0.2, 0.3], "update": "lagged"}
    with torch.device("meta"):
        weights = weights_with(**options)
    assert all(buffer.is_meta for buffer in weights.buffers())
    other = weights_with(**options)
    if how != "reset_parameters":
        other.accumulate(*statistics([3.0, -8.0, 1.0], [0, 1, 2]))
        other.step()
    if how != "assign":
        weights.to_empty(device="cpu")
    if how == "reset_parameters":
        weights.reset_parameters()
    else:
        weights.load_state_dict(other.state_dict(), assign=how == "assign")
    for name, value in other.state_dict().items():
        assert torch.equal(weights.state_dict()[name], value), name


def test_state_round_trips_to_the_bit() -> None:
    weights = weights_with(update="lagged")
    weights.accumulate(*statistics([3.0, -8.0, 1.0], [0, 1, 2]))
    weights.step()
    weights.accumulate(*statistics([0.3], [2]))
    file = io.BytesIO()
    torch.save(weights.state_dict(), file)
    file.seek(0)
    other = weights_with(update="lagged")
    other.load_state_dict(torch.load(file, weights_only=True))
    for copied in (other, copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        for name, value in weights.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value), name


@pytest.mark.parametrize("assign", [False, True])
def test_a_rounded_checkpoint_is_put_back_onto_the_simplex(assign: bool) -> None:
    weights = weights_with()
    weights.update(*statistics([3.0, -8.0, 1.0], [0, 1, 2]))
    rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in weights.state_dict().items()}
    other = weights_with()
    other.load_state_dict(rounded, assign=assign)
    assert other.log_alpha.dtype == torch.float64
    assert float(other.alpha.sum()) == pytest.approx(1, abs=1e-14)
    torch.testing.assert_close(other.alpha, weights.alpha, rtol=0.05, atol=0)


@pytest.mark.parametrize("off", [0.1, -1.0, math.nan, -math.inf])
def test_a_corrupt_alpha_is_refused(off: float) -> None:
    state = weights_with().state_dict()
    state["log_alpha"] = state["log_alpha"] + off
    with pytest.raises(RuntimeError, match="log_alpha of the checkpoint must be weights on the simplex"):
        weights_with().load_state_dict(state)


def test_a_checkpoint_of_other_groups_is_refused() -> None:
    state = weights_with().state_dict()
    with pytest.raises(RuntimeError, match=r"group_sizes of the checkpoint \[60, 35, 5\] are not this module's"):
        weights_with(group_sizes=[60, 35, 6]).load_state_dict(state)
    with pytest.raises(RuntimeError, match="group_sizes of the checkpoint"):
        weights_with(group_sizes=[60, 40]).load_state_dict(state)
    with pytest.raises(RuntimeError, match="log_alpha of the checkpoint is of 3 groups, not 4"):
        gk.GroupWeights(4, step_size=0.1, estimator="group_mean").load_state_dict(
            gk.GroupWeights(3, step_size=0.1, estimator="group_mean").state_dict()
        )


@pytest.mark.filterwarnings("ignore:the checkpoint's alpha was moved with other options")
def test_groups_that_another_rule_has_left_no_weight() -> None:
    saved = weights_with([0.0, 0.0, 1.0], rule="cvar", level=0.1, step_size=None).state_dict()
    for floor, expected in ((0.0, [0.0, 0.0, 1.0]), (0.3, [0.1 / 1.2, 0.1 / 1.2, 1 / 1.2])):
        weights = weights_with(estimator="group_mean", floor=floor)
        weights.load_state_dict(saved)
        weights.update(*statistics([3.0, -8.0], [0, 1]))  # none of the one that has it all
        torch.testing.assert_close(weights.alpha, torch.tensor(expected, dtype=torch.float64))


def test_what_only_this_rank_has_seen_goes_with_its_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_with(update="lagged")
    state = weights.state_dict()
    monkeypatch.setattr(gk.GroupWeights, "num_ranks", 2)
    for forget in (weights.reset_parameters, lambda: weights.load_state_dict(state)):
        weights.accumulate(*statistics([3.0], [0]))
        assert weights._own_statistics().counts.tolist() == [1, 0, 0]
        forget()
        assert weights._own_statistics().counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_sizes": [3, 0]}, ValueError, "group_sizes must be at least 1, got 0 for group 1"),
        ({"group_sizes": [-1, 2]}, ValueError, "group_sizes must be at least 1, got -1 for group 0"),
        ({"group_sizes": [1.5, 2.0]}, TypeError, "group_sizes must be whole numbers"),
        ({"group_sizes": []}, ValueError, r"group_sizes must have shape \(K,\)"),
        ({"group_sizes": [[1, 2]]}, ValueError, r"group_sizes must have shape \(K,\)"),
        ({"group_sizes": [1, 2], "num_groups": 3}, ValueError, "group_sizes must have num_groups=3 entries, got 2"),
        ({}, ValueError, "num_groups or group_sizes must be given"),
        ({"num_groups": 2}, ValueError, "group_sizes must be given for estimator='importance'"),
        ({"num_groups": 2, "estimator": "group_mean", "adjustment": 1.0}, ValueError, "given for adjustment=1.0"),
        ({"num_groups": 0, "estimator": "group_mean"}, ValueError, "num_groups must be at least 1, got 0"),
        ({"num_groups": 2.0, "estimator": "group_mean"}, TypeError, "num_groups must be an int, got float"),
        ({"group_sizes": [1], "step_size": -0.1}, ValueError, "step_size must be finite and in"),
        ({"group_sizes": [1], "estimator": "mean"}, ValueError, "estimator must be one of"),
        ({"group_sizes": [1], "update": "later"}, ValueError, "update must be one of 'inline', 'lagged', got 'later'"),
        ({"group_sizes": [1], "floor": 1.0}, ValueError, "floor must be finite and in"),
        ({"group_sizes": [1], "chi": 1.1}, ValueError, "chi must be finite and in"),
        ({"group_sizes": [1], "adjustment": -1}, ValueError, "adjustment must be finite and in"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gk.GroupWeights(**{"step_size": 0.1, **options})


def test_bad_statistics() -> None:
    with pytest.raises(ValueError, match=r"group_loss_sums must have shape \(3,\), got \(2,\)"):
        weights_with().update(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"group_counts must have shape \(3,\), got \(4,\)"):
        weights_with().update(torch.zeros(3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"accumulate\(\) belongs to update='lagged'"):
        weights_with().accumulate(torch.zeros(3), torch.zeros(3, dtype=torch.int64))


def test_a_million_groups() -> None:
    weights = gk.GroupWeights(group_sizes=torch.ones(10**6, dtype=torch.int64), step_size=1e-3)
    counts = torch.zeros(10**6, dtype=torch.int64)
    counts[5] = 1
    weights.update(counts.double(), counts)
    assert weights.alpha.sum().item() == pytest.approx(1)
    assert weights.alpha.argmax() == 5
