"""step_size="auto" is AdaHedge: the paper's formulas in plain numbers, its regret, and its life in GroupWeights."""

from __future__ import annotations

import math

import pytest
import torch
import truth
from conftest import batch

import grpo_kernels as gk
from grpo_kernels.groups import hedge

ONES = torch.ones(3, dtype=torch.int64)


def auto(num_groups: int = 3, **options) -> gk.GroupWeights:
    return gk.GroupWeights(num_groups, **{"estimator": "group_mean", "step_size": "auto", **options})


def fed(weights: gk.GroupWeights, batches: torch.Tensor) -> list[list[float]]:
    """Alpha before each batch."""
    alphas = []
    for losses in batches:
        alphas.append(weights.alpha.tolist())
        weights.update(losses, torch.ones(len(losses), dtype=torch.int64))
    return alphas


@pytest.mark.parametrize("start", ["random", "equal", "tie"])
def test_it_is_the_papers_algorithm(start: str) -> None:
    """Beside losses at random: first batches that are alike, and first leaders that tie."""
    batches = torch.rand(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if start == "equal":
        batches[:4] = 0.7
    if start == "tie":
        batches[0] = torch.tensor([0.2, 0.9, 0.9])
    weights = auto()
    expected = truth.ada_hedge(batches.tolist())
    for alpha, (wanted, _, _) in zip(fed(weights, batches), expected, strict=True):
        assert alpha == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    gap_sum = sum(gap for _, _, gap in expected)
    assert weights.hedge_gap_sum.item() == pytest.approx(gap_sum, rel=1e-9)
    assert weights.current_step_size().item() == pytest.approx(math.log(3) / gap_sum, rel=1e-9)


def test_the_first_batch_as_the_docs_say_it() -> None:
    """Uniform until losses differ; then D = max - mean, and the worst has K times the weight of one with the mean."""
    weights = auto(4)
    assert weights.current_step_size().item() == math.inf
    weights.update(torch.full((4,), 0.3), torch.ones(4, dtype=torch.int64))
    assert weights.alpha.tolist() == pytest.approx([0.25] * 4)
    assert weights.current_step_size().item() == math.inf
    weights.update(torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.ones(4, dtype=torch.int64))
    assert weights.hedge_gap_sum.item() == pytest.approx(0.5)
    assert (weights.alpha[1] / weights.alpha[2]).item() == pytest.approx(4)


def adversarial(kind: str, steps: int, num_groups: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(steps + num_groups)
    noise = torch.rand(steps, num_groups, generator=generator, dtype=torch.float64)
    if kind == "random":
        return noise
    if kind == "one is worse":
        return noise.clamp(max=0.6) + 0.4 * torch.nn.functional.one_hot(torch.tensor(0), num_groups)
    if kind == "by turns":  # what leads a follower of the leader astray
        return torch.nn.functional.one_hot(torch.arange(steps) % num_groups, num_groups).double()
    change = torch.arange(steps) * 3 // steps  # the worst group is another in each third
    return 0.5 * noise + 0.5 * torch.nn.functional.one_hot(change % num_groups, num_groups)


def run(batches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(regret, D) (...,) of many runs at once, from losses (T, ..., K)."""
    gains, gap_sum = torch.zeros_like(batches[0]), torch.zeros_like(batches[0, ..., 0])
    total, present = torch.zeros_like(gap_sum), torch.ones_like(batches[0], dtype=torch.bool)
    for losses in batches:
        total += (hedge.log_weights(gains, gap_sum).exp() * losses).sum(-1)
        gains, gap_sum = hedge.after_batch(gains, gap_sum, losses, present)
    return batches.sum(0).amax(-1) - total, gap_sum


@pytest.mark.parametrize(("steps", "num_groups"), [(10, 2), (200, 2), (200, 7)])
def test_regret_is_within_the_bound(steps: int, num_groups: int) -> None:
    """alpha's losses are at most 2 D below the worst group's (lemma 3), D bounded by theorem 6; at any scale."""
    kinds = ["random", "one is worse", "by turns", "changes"]
    scales = torch.tensor([1e-6, 1.0, 2500.0], dtype=torch.float64).view(3, 1)
    batches = torch.stack([adversarial(kind, steps, num_groups) for kind in kinds], 1).unsqueeze(2) * scales
    regret, gap_sum = run(batches)  # (kinds, scales)
    largest = (batches.amax(-1) - batches.amin(-1)).amax(0)
    log_k = math.log(num_groups)
    assert (regret <= 2 * gap_sum * (1 + 1e-9)).all()
    assert (regret <= largest * (math.sqrt(steps * log_k) + 4 / 3 * log_k + 2)).all()
    assert (regret[1] < 3 * scales.squeeze()).all(), "easy losses: the regret does not grow with the steps"


def test_neither_scale_nor_shift_nor_labels_count() -> None:
    """Losses are in units of 2**-8, so that sums of shifted ones are exact and ties stay ties."""
    plain = torch.randint(0, 5, (40, 3), generator=torch.Generator().manual_seed(0)).double() / 256
    order = torch.tensor([2, 0, 1])
    versions = torch.stack([plain, 1024 * plain, plain + 16, plain[:, order]], 1)
    gains, gap_sum = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for losses in versions:
        gains, gap_sum = hedge.after_batch(gains, gap_sum, losses, torch.ones(4, 3, dtype=torch.bool))
        same, scaled, shifted, relabelled = hedge.log_weights(gains, gap_sum).exp()
        assert same.sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(scaled, same, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shifted, same, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(relabelled, same[order], rtol=1e-9, atol=1e-12)


def test_absent_groups_keep_their_weight_but_for_the_change_of_eta() -> None:
    """Sleeping experts: with the eta of before, G of an absent group gives it the weight that it had."""
    gains = torch.tensor([[0.3, 0.0, -0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    gap_sum = torch.tensor([0.4, 0.0], dtype=torch.float64)
    present = torch.tensor([True, False, True])
    losses = torch.tensor([0.9, math.nan, 0.1], dtype=torch.float64)
    new_gains, new_gap_sum = hedge.after_batch(gains, gap_sum, losses, present)
    before, same_eta = hedge.log_weights(gains, gap_sum), hedge.log_weights(new_gains, gap_sum)
    torch.testing.assert_close(same_eta[0, 1], before[0, 1])
    weights = before[0].exp()[present]
    mean = (weights * losses[present]).sum() / weights.sum()
    eta = math.log(3) / 0.4
    mixed = ((weights / weights.sum()) * (eta * losses[present]).exp()).sum().log() / eta
    torch.testing.assert_close(new_gap_sum[0], gap_sum[0] + weights.sum() * (mixed - mean))
    torch.testing.assert_close(new_gap_sum[1], torch.tensor(2 / 3 * (0.9 - 0.5), dtype=torch.float64))
    assert new_gains.isfinite().all()


def test_leaders_that_are_absent_cost_nothing() -> None:
    gains, gap_sum = torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    new_gains, new_gap_sum = hedge.after_batch(
        gains, gap_sum, torch.ones(3).double(), torch.tensor([False, True, True])
    )
    assert new_gap_sum == 0
    assert new_gains.tolist() == [0.0, -1.0, -2.0]


def test_one_group_floor_and_chi() -> None:
    one = auto(1)
    one.update(torch.tensor([2.0]), torch.tensor([1]))
    assert one.alpha.tolist() == [1.0]
    assert one.current_step_size() == math.inf
    batches = torch.rand(10, 3, dtype=torch.float64)
    plain, floored, mixed = auto(), auto(floor=0.3), auto(chi=0.4)
    for weights in (plain, floored, mixed):
        fed(weights, batches)
    torch.testing.assert_close(floored.alpha, 0.7 * plain.alpha + 0.1)
    torch.testing.assert_close(mixed.alpha, plain.alpha)  # of chi L, and scale does not count
    torch.testing.assert_close(mixed.loss_weights(), 0.6 / 3 + 0.4 * plain.alpha)


def test_bad_batches_are_left_out() -> None:
    weights = auto()
    fed(weights, torch.rand(3, 3, dtype=torch.float64))
    before = {name: value.clone() for name, value in weights.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="not finite"):
        weights.update(torch.tensor([math.nan, 1.0, 1.0]), ONES)
    weights.update(torch.zeros(3), 0 * ONES)
    for name, value in weights.state_dict().items():
        assert torch.equal(value, before[name]) or name == "skipped_updates", name


def test_the_state_goes_on_and_older_ones_say_what_they_lack() -> None:
    batches = torch.rand(8, 3, dtype=torch.float64)
    whole, second = auto(), auto()
    fed(whole, batches[:5])
    second.load_state_dict(whole.state_dict())
    for weights in (whole, second):
        fed(weights, batches[5:])
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    fixed = gk.GroupWeights(3, estimator="group_mean", step_size=0.5)
    assert not any("hedge" in name for name in fixed.state_dict()), "the default's checkpoints stay as they were"
    with pytest.warns(
        RuntimeWarning,
        match=r"step_size=0.5, here auto.*has no hedge_gains, hedge_gap_sum: what step_size='auto' .* begins anew",
    ):
        second.load_state_dict(fixed.state_dict())
    assert second.hedge_gap_sum == 0
    with pytest.warns(RuntimeWarning, match="step_size=auto, here 0.5.*left out .*: hedge_gains, hedge_gap_sum"):
        fixed.load_state_dict(whole.state_dict())
    assert whole.bfloat16().hedge_gains.dtype == torch.float64


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("update", ["inline", "lagged"])
def test_losses_move_it_on_both_paths(linear: bool, update: str) -> None:
    """From logits and from hidden states, whose plan must not count on the forecast of a fixed step size."""
    weights = gk.GroupWeights(group_sizes=[60, 35, 5], step_size="auto", update=update)
    hidden, labels = batch(num_pairs=4)
    ids = torch.tensor([0, 1, 2, 0])
    head = torch.eye(hidden.shape[-1], dtype=torch.float64).requires_grad_()  # hidden states that are the logits
    if linear:
        loss_fn = gk.LinearGroupRobustLoss(weights, reference_free=True)
    else:
        loss_fn = gk.GroupRobustLoss(weights, reference_free=True)
    batches, alphas = [], []
    for _ in range(3):
        out = loss_fn(hidden, head, labels, ids) if linear else loss_fn(hidden, labels, ids)
        (grad,) = torch.autograd.grad(out.loss, hidden)
        if update == "lagged":
            weights.step()
        batches.append(out.group_losses.tolist())
        alphas.append(out.alpha.tolist())
        torch.testing.assert_close(out.loss, (out.alpha * out.group_losses).sum())
        logps, slopes = truth.sequence_terms(hidden, labels)
        dh = torch.tensor([truth.pair_loss(float(h), 0.1, "sigmoid")[1] for h in logps[:4] - logps[4:]])
        dh = dh * out.alpha[ids] * (100 / torch.tensor([60, 35, 5])[ids]) / 4
        torch.testing.assert_close(grad, torch.cat([dh, -dh])[:, None, None] * slopes)
    expected = truth.ada_hedge([*batches, batches[0]])
    first = 1 if update == "inline" else 0  # inline: the weights after the batch
    for alpha, (wanted, _, _) in zip(alphas, expected[first:], strict=False):
        assert alpha == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": "adaptive"}, "step_size must be a number or 'auto', got 'adaptive'"),
        ({"rule": "cvar", "level": 0.5}, "step_size has no meaning for rule='cvar', which takes level; got auto"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        auto(**options)
