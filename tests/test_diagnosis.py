"""GroupWeights.diagnose: its numbers by hand, and each warning when it is due and only then."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import batch

import grpo_kernels as gk
from grpo_kernels.groups import diagnosis

SIZES = [60, 35, 5]


def losses_of_turn(turn: int) -> torch.Tensor:
    return torch.tensor([[3.0, 0.0], [0.0, 3.0]])[turn % 2]


def run(weights: gk.GroupWeights, losses: list[torch.Tensor]) -> gk.GroupWeights:
    for loss in losses:
        weights.update(loss, torch.tensor([1, 1]))
    return weights


def test_numbers_by_hand() -> None:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.5, chi=0.5)
    before = weights.diagnose()
    assert before.updates == 0
    assert before.unseen == (None, None, None)
    assert before.entropy == pytest.approx(1)
    for ids in ([0, 0], [1, 0], [0, 1], [0]):
        weights.update(
            torch.bincount(torch.tensor(ids), minlength=3).double(), torch.bincount(torch.tensor(ids), minlength=3)
        )
    found = weights.diagnose()
    alpha = weights.alpha.tolist()
    q = [0.5 / 3 + 0.5 * a for a in alpha]
    assert found.updates == 4
    assert found.unseen == (0, 1, None)
    assert found.entropy == pytest.approx(-sum(a * math.log(a) for a in alpha) / math.log(3))
    assert (found.rarest_group, found.rarest_alpha) == (2, pytest.approx(alpha[2]))
    assert found.effective_groups == pytest.approx(1 / sum(x * x for x in q))
    assert found.effective_pairs == pytest.approx(1 / sum(x * x / n for x, n in zip(q, SIZES, strict=True)))
    assert found.metrics(["a", "b", "c"]) == {
        "groups/alpha_entropy": found.entropy,
        "groups/step_size": 0.5,
        "groups/effective_groups": found.effective_groups,
        "groups/rarest_alpha": found.rarest_alpha,
        "groups/effective_pairs": found.effective_pairs,
        "groups/a/unseen": 0.0,
        "groups/b/unseen": 1.0,
        "groups/c/unseen": 4.0,
    }


def test_a_caller_may_use_its_counts_again() -> None:
    weights, counts = gk.GroupWeights(group_sizes=[3, 1], step_size=0.5), torch.tensor([1, 1])
    weights.update(torch.ones(2), counts)
    counts.zero_()
    assert weights.diagnose().unseen == (0, 0)


def test_weights_in_proportion_to_sizes_are_all_pairs_and_one_weight_is_one_group() -> None:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.0)
    weights.log_alpha.copy_((torch.tensor(SIZES).double() / 100).log())
    assert weights.diagnose().effective_pairs == pytest.approx(100)
    weights.log_alpha.copy_(torch.tensor([0.0, -math.inf, -math.inf]))
    found = weights.diagnose()
    assert (found.entropy, found.effective_groups, found.effective_pairs) == pytest.approx((0, 1, 60))
    assert gk.GroupWeights(1, step_size=1.0, estimator="group_mean").diagnose().entropy == 1


def test_without_sizes_the_rarest_is_that_of_the_batches() -> None:
    weights = gk.GroupWeights(3, estimator="group_mean", step_size=0.1)
    assert weights.diagnose().rarest_group is None
    weights.update(torch.ones(3), torch.tensor([3, 1, 2]))
    found = weights.diagnose()
    assert found.rarest_group == 1
    assert found.effective_pairs is None
    assert "groups/effective_pairs" not in found.metrics("abc")


@pytest.mark.parametrize("looks", [1, 7])
def test_what_is_folded_away_still_counts(looks: int) -> None:
    """The same after hundreds of updates, however often one has looked on the way."""
    weights = gk.GroupWeights(3, estimator="group_mean", step_size=0.1)
    for update in range(300):
        counts = torch.tensor([1, int(update == 5), int(update in (0, 290))])
        weights.update(counts.double(), counts)
        if update % (300 // looks) == 0:
            weights.diagnose()
    found = weights.diagnose()
    assert found.updates == 300
    assert found.unseen == (0, 294, 9)
    assert found.rarest_group == 1
    assert weights.trail.look_back()[1].tolist() == [300, 1, 2]
    assert len(weights.trail._recent) < 2 * diagnosis.WINDOW


def test_a_trail_that_was_saved_goes_on() -> None:
    whole, second = (gk.GroupWeights(3, estimator="group_mean", step_size=0.1) for _ in range(2))
    counts = [torch.tensor([1, 0, 0]), torch.tensor([1, 1, 0]), torch.tensor([1, 0, 0])]
    for count in counts[:2]:
        whole.update(count.double(), count)
    second.load_state_dict(whole.state_dict())
    second.trail.load_state_dict(whole.trail.state_dict())
    assert second.diagnose().unseen == (0, 0, None)
    for weights in (whole, second):
        weights.update(counts[2].double(), counts[2])
    assert second.diagnose() == whole.diagnose()
    assert second.diagnose().unseen == (0, 1, None)


@pytest.mark.parametrize("update", ["inline", "lagged"])
def test_forwards_of_every_backend_are_seen(backend: str, update: str) -> None:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.5, update=update)
    loss_fn = gk.GroupRobustLoss(weights, reference_free=True, backend=backend)
    logits, labels = batch(num_pairs=2, dtype=torch.float32)
    for ids in ([0, 2], [0, 0]):
        loss_fn(logits, labels, torch.tensor(ids))
        if update == "lagged":
            weights.step()
    loss_fn.eval()(logits, labels, torch.tensor([1, 1]))
    found = weights.diagnose()
    assert found.updates == 2
    assert found.unseen == (0, None, 1)
    alphas, _, _ = weights.trail.look_back()
    torch.testing.assert_close(alphas[-1], weights.alpha)


def test_alpha_that_swings_is_told_and_one_that_moves_steadily_is_not() -> None:
    by_turns = [losses_of_turn(turn) for turn in range(20)]
    wild = run(gk.GroupWeights(2, estimator="group_mean", step_size=2.0), by_turns)
    (warning,) = wild.diagnose().warnings
    high = torch.tensor([6.0, 0.0]).softmax(0)[0]  # step_size 2, a gap of 3; then back to uniform
    assert f"in the last 20 updates the weight of group 0 went to and fro between 0.50 and {high:.2f}" in warning
    assert "A smaller step_size (now 2)" in warning
    calm = run(gk.GroupWeights(2, estimator="group_mean", step_size=0.02), by_turns)
    steady = run(gk.GroupWeights(2, estimator="group_mean", step_size=0.05), [losses_of_turn(0)] * 20)
    assert not calm.diagnose().warnings
    assert not steady.diagnose(total_steps=20).warnings
    sharp = run(gk.GroupWeights(2, estimator="group_mean", rule="soft_maximum", temperature=0.5), by_turns)
    assert "A larger temperature (now 0.5)" in sharp.diagnose().warnings[0]


def test_to_and_fro_is_three_times_the_way_from_the_lowest_to_the_highest() -> None:
    for turns, swings in ((3, True), (2, False)):
        first = torch.tensor([0.25, 0.75] * 2)[: turns + 1]
        found = diagnosis.swing(torch.stack([first, 1 - first], 1))
        assert found == ((0, 0.25, 0.75) if swings else None)


def test_alpha_that_has_not_left_uniform_is_told_at_half_time() -> None:
    slow = run(gk.GroupWeights(2, estimator="group_mean", step_size=1e-4), [losses_of_turn(0)] * 9)
    assert not slow.diagnose(total_steps=19).warnings
    (warning,) = slow.diagnose(total_steps=18).warnings
    assert "after 9 of 18 steps" in warning
    assert "a larger step_size (now 0.0001)" in warning
    assert not slow.diagnose().warnings, "nobody has said how many steps there will be"
    assert slow.diagnose(step=50, total_steps=60).warnings
    fixed = run(gk.GroupWeights(2, estimator="group_mean", step_size=0.0), [losses_of_turn(0)] * 9)
    assert not fixed.diagnose(total_steps=9).warnings, "uniform on purpose"
