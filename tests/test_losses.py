"""GroupRobustLoss and LinearGroupRobustLoss: the whole method against the formulas, and its properties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import EMPTY_BY_DESIGN, batch, one_rounding
from loss_cases import SIZES, ids, inputs, make

import grpo_kernels as gk
from grpo_kernels.kernels import linear_plan

LOSSES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.3)]


@pytest.mark.interpreted(estimator="importance", dtype=torch.float32)
@pytest.mark.parametrize(("loss_type", "e"), LOSSES)
@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_whole_method(backend: str, loss_type: str, e: float, estimator: str, dtype: torch.dtype) -> None:
    logits, labels, ref = inputs(dtype)
    ref = ref.to(torch.float64 if dtype == torch.float64 else torch.float32)
    loss_fn = make(backend, loss_type=loss_type, label_smoothing=e, estimator=estimator)
    out = loss_fn(logits, labels, ids(), ref_logps=ref)
    (grad,) = torch.autograd.grad(out.loss, logits)
    logps, slopes = truth.sequence_terms(logits, labels)
    ratios = logps - ref.double()
    h = (ratios[:4] - ratios[4:]).tolist()
    exact = truth.group_robust(h, ids().tolist(), [1 / 3] * 3, 0.3, SIZES, estimator, 0.1, loss_type, e)
    # float32: log-probabilities, below 64 in size, are off by 2**-19, a margin by 4 of these, an IPO loss (h - 5)^2 by
    # 2 |h - 5| times that, and a group's loss is up to 5 times the pairs' mean: 2**-17 and 2**-14 of the larger ones.
    assert logps.abs().max() < 64
    close = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2**-14, "atol": 2**-17}
    for name in ("pair_losses", "group_losses", "alpha"):
        got = getattr(out, name).detach().double()
        torch.testing.assert_close(got, torch.tensor(exact[name], dtype=torch.float64), **close)
    torch.testing.assert_close(out.loss.detach().double(), torch.tensor(exact["loss"][0], dtype=torch.float64), **close)
    dh = torch.tensor(exact["dh"], dtype=torch.float64)
    exact_grad = torch.cat([dh, -dh])[:, None, None] * slopes
    # By as much the slope of a pair is off, and twice that with alpha; then the gradient is rounded once.
    tolerance = 1e-12 if dtype == torch.float64 else 2**-16 + one_rounding(dtype, backend)
    assert (grad.double() - exact_grad).abs().max() <= tolerance * exact_grad.abs().max()
    torch.testing.assert_close(out.chosen_rewards.double(), 0.1 * ratios[:4], **close)
    torch.testing.assert_close(out.rejected_rewards.double(), 0.1 * ratios[4:], **close)
    assert out.group_counts.tolist() == [1, 2, 1]
    torch.testing.assert_close(out.alpha, loss_fn.group_weights.alpha, rtol=1e-14, atol=0)


def test_alpha_after_several_steps(backend: str) -> None:
    loss_fn, alpha = make(backend), [1 / 3] * 3
    for seed in range(4):
        logits, labels = batch(num_pairs=4, seed=seed)
        out = loss_fn(logits, labels, ids(), ref_logps=torch.zeros(8))
        logps, _ = truth.sequence_terms(logits, labels)
        exact = truth.group_robust((logps[:4] - logps[4:]).tolist(), ids().tolist(), alpha, 0.3, SIZES)
        alpha = exact["alpha"]
        assert out.loss.item() == pytest.approx(exact["loss"][0])
    assert out.alpha.tolist() == pytest.approx(alpha)


def test_one_group_is_plain_dpo_and_ipo(backend: str) -> None:
    """The textbook losses of TRL and the papers: -log sigmoid(beta h) and (h - 1 / (2 beta))^2, averaged."""
    logits, labels, ref = inputs()
    logps = gk.sequence_logps(logits, labels, backend="reference")
    h = (logps - ref)[:4] - (logps - ref)[4:]
    plain = {"sigmoid": -F.logsigmoid(0.1 * h).mean(), "ipo": ((h - 5.0) ** 2).mean()}
    for loss_type, expected in plain.items():
        weights = gk.GroupWeights(group_sizes=[100], step_size=0.5)
        loss_fn = gk.GroupRobustLoss(weights, beta=0.1, loss_type=loss_type, backend=backend)
        out = loss_fn(logits, labels, torch.zeros(4, dtype=torch.int64), ref_logps=ref)
        torch.testing.assert_close(out.loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, logits, retain_graph=True)[0],
            torch.autograd.grad(expected, logits, retain_graph=True)[0],
        )


def test_permuting_pairs_permutes_losses_and_changes_nothing_else(backend: str) -> None:
    logits, labels, ref = inputs()
    order = torch.tensor([2, 0, 3, 1])
    both = torch.cat([order, order + 4])
    a = make(backend)(logits, labels, ids(), ref_logps=ref)
    b = make(backend)(logits[both], labels[both], ids()[order], ref_logps=ref[both])
    torch.testing.assert_close(b.pair_losses, a.pair_losses[order])
    torch.testing.assert_close(b.loss, a.loss)
    torch.testing.assert_close(b.alpha, a.alpha)


def test_swapping_chosen_and_rejected_changes_the_loss(backend: str) -> None:
    logits, labels, ref = inputs()
    swap = torch.cat([torch.arange(4, 8), torch.arange(4)])
    a = make(backend)(logits, labels, ids(), ref_logps=ref)
    b = make(backend)(logits[swap], labels[swap], ids(), ref_logps=ref[swap])
    difference = 0.1 * ((a.chosen_logps - ref[:4]) - (a.rejected_logps - ref[4:]))
    torch.testing.assert_close(b.pair_losses - a.pair_losses, difference)
    assert difference.abs().min() > 1e-3


@pytest.mark.interpreted(path=["logits", "sweep"])
@pytest.mark.parametrize("path", ["logits", "packed", "from_logps", "sweep", "keep", "recompute"])
def test_interleaved_pairs_are_the_same_pairs(backend: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in the order of one layout, all that a loss returns and the gradient, in the order of the other."""
    if path in ("sweep", "keep", "recompute") and backend == "reference":
        pytest.skip("it has no plans")
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 13 * 14)  # a pair, or two
    (logits, labels, ref), head = inputs(), torch.randn(13, 5, dtype=torch.float64)
    options = {"margin": torch.linspace(-1, 1, 4), "weights": torch.linspace(0.5, 2, 4), "beta": torch.rand(4) + 0.1}
    values = gk.sequence_logps(logits.detach(), labels) if path == "from_logps" else logits.detach()
    values = torch.randn(8, 7, 5, dtype=torch.float64) if path in ("sweep", "keep", "recompute") else values
    results = []
    for layout, order in (("chosen_first", torch.arange(8)), ("interleaved", torch.arange(8).view(2, 4).t().flatten())):
        rows, y, of_reference = values[order].requires_grad_(), labels[order], ref[order]
        weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.3)
        of_loss = {"layout": layout, "backend": backend, "loss_type": ["sigmoid", "sppo_hard"]}
        if path in ("sweep", "keep", "recompute"):
            loss_fn = gk.LinearGroupRobustLoss(weights, plan=path, **of_loss)
            out = loss_fn(rows, head, y, ids(), of_reference)
        elif path == "from_logps":
            out = gk.GroupRobustLoss(weights, **of_loss).from_logps(rows, ids(), of_reference)
        elif path == "packed":
            packed = torch.arange(0, 57, 7)
            out = gk.GroupRobustLoss(weights, **of_loss)(
                rows.flatten(0, 1), y.flatten(), ids(), of_reference, cu_seqlens=packed
            )
        else:
            of_loss["loss_type"] = "sigmoid"
            out = gk.GroupRobustLoss(weights, **of_loss)(rows, y, ids(), of_reference, **options)
        (grad,) = torch.autograd.grad(out.loss + out.chosen_logps.sum() / 8, rows)
        results.append([*out, grad[order.argsort()]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-12)


def test_preference_losses_of_interleaved_pairs() -> None:
    logps, ref, counts = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64), torch.arange(1, 9)
    order = torch.arange(8).view(2, 4).t().flatten()
    first = gk.preference_losses(logps, ref, loss_type="ipo", token_counts=counts)
    other = gk.preference_losses(
        logps[order], ref[order], loss_type="ipo", token_counts=counts[order], layout="interleaved"
    )
    torch.testing.assert_close(other, first)
    with pytest.raises(ValueError, match=r"layout must be .*'rejected_first'"):
        gk.preference_losses(logps, ref, layout="rejected_first")


def test_relabelling_groups_permutes_alpha(backend: str) -> None:
    logits, labels, ref = inputs()
    a = make(backend)(logits, labels, ids(), ref_logps=ref)
    new_id = torch.tensor([2, 0, 1])
    sizes = torch.tensor(SIZES)[new_id.argsort()].tolist()
    weights = gk.GroupWeights(group_sizes=sizes, step_size=0.3)
    b = gk.GroupRobustLoss(weights, beta=0.1, backend=backend)(logits, labels, new_id[ids()], ref_logps=ref)
    torch.testing.assert_close(b.alpha[new_id], a.alpha)
    torch.testing.assert_close(b.loss, a.loss)


def test_an_absent_group(backend: str) -> None:
    logits, labels, ref = inputs()
    ids = torch.tensor([0, 0, 1, 1])
    out = make(backend)(logits, labels, ids, ref_logps=ref)
    assert out.group_losses[2] == 0
    assert out.group_counts[2] == 0
    assert out.alpha[2] < 1 / 3
    kept = make(backend, estimator="group_mean")(logits, labels, ids, ref_logps=ref)
    assert kept.alpha[2].item() == pytest.approx(1 / 3)


def test_padding_changes_nothing(backend: str) -> None:
    logits, labels, ref = inputs()
    a = make(backend)(logits, labels, ids(), ref_logps=ref)
    wide, wide_labels = F.pad(logits, (0, 0, 0, 5), value=9.0), F.pad(labels, (0, 5), value=-100)
    b = make(backend)(wide, wide_labels, ids(), ref_logps=ref)
    torch.testing.assert_close(b.loss, a.loss)


def test_packed_equals_padded(backend: str) -> None:
    logits, labels, ref = inputs()
    a = make(backend)(logits, labels, ids(), ref_logps=ref)
    b = make(backend)(logits.flatten(0, 1), labels.flatten(), ids(), ref_logps=ref, cu_seqlens=torch.arange(0, 57, 7))
    torch.testing.assert_close(b.loss, a.loss)
    torch.testing.assert_close(
        torch.autograd.grad(b.loss, logits, retain_graph=True)[0], torch.autograd.grad(a.loss, logits)[0]
    )


def test_linear_equals_logits(backend: str) -> None:
    _, labels, ref = inputs()
    hidden = torch.randn(8, 7, 5, dtype=torch.float64).requires_grad_()
    weight = torch.randn(13, 5, dtype=torch.float64).requires_grad_()
    bias = torch.randn(13, dtype=torch.float64).requires_grad_()
    outs = [
        gk.LinearGroupRobustLoss(gk.GroupWeights(group_sizes=SIZES, step_size=0.3), backend=backend)(
            hidden, weight, labels, ids(), ref_logps=ref, bias=bias
        ),
        make(backend)(F.linear(hidden, weight, bias), labels, ids(), ref_logps=ref),
    ]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    grads = [torch.autograd.grad(out.loss, (hidden, weight, bias)) for out in outs]
    for linear, unfused in zip(*grads, strict=True):
        torch.testing.assert_close(linear, unfused)


def test_from_pair_losses() -> None:
    """The step after the pair losses alone: as from_logps, whatever made the losses."""
    logps, ids = torch.randn(8, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, 1, 0])
    whole, part = (gk.GroupRobustLoss(gk.GroupWeights(group_sizes=[3, 5, 2], step_size=0.4)) for _ in range(2))
    for _ in range(2):
        expected = whole.from_logps(logps, ids, torch.zeros(8, dtype=torch.float64))
        got = part.from_pair_losses(gk.preference_losses(logps), ids)
    for name in ("loss", "pair_losses", "group_losses", "group_counts", "alpha", "group_means"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), equal_nan=True)
    assert torch.equal(torch.autograd.grad(got.loss, logps)[0], torch.autograd.grad(expected.loss, logps)[0])
    assert got.chosen_logps.shape == got.rejected_rewards.shape == (4,)
    assert got.chosen_logps.isnan().all()
    metrics = got.metrics()
    assert metrics.pop("loss") == got.loss
    assert all(value.isnan() for value in metrics.values()), "nobody knows them: an accuracy of 0 would be a lie"
    losses = got.pair_losses.detach()
    means = [losses[[0, 3]].mean(), losses[[1, 2]].mean(), torch.tensor(torch.nan, dtype=torch.float64)]
    torch.testing.assert_close(got.group_means, torch.stack(means), equal_nan=True)
    for bad, error, message in (
        (losses.long(), TypeError, "pair_losses must be float32 or float64, got torch.int64"),
        (losses.unsqueeze(1), ValueError, r"pair_losses must have shape \(B,\), got \(4, 1\)"),
        (losses[:3], ValueError, r"group_ids must have shape \(3,\)"),
    ):
        with pytest.raises(error, match=message):
            part.from_pair_losses(bad, ids)


def test_grad_output_scales_the_gradient(backend: str) -> None:
    """Liger 968 and 1298: an upstream gradient other than 1 was silently ignored."""
    logits, labels, ref = inputs()
    loss = make(backend)(logits, labels, ids(), ref_logps=ref).loss
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (scaled,) = torch.autograd.grad(-2.5 * loss, logits)
    torch.testing.assert_close(scaled, -2.5 * once)


@EMPTY_BY_DESIGN
@pytest.mark.parametrize("name", ["loss", "pair_losses", "group_losses", "chosen_logps", "rejected_logps"])
def test_outputs_said_to_be_differentiable_are(backend: str, name: str) -> None:
    """With alpha held (step_size 0), each output's gradient is that of finite differences."""
    logits, labels = batch(num_pairs=2, length=3, vocab=4)
    loss_fn = make(backend, reference_free=True, step_size=0.0)
    ids = torch.tensor([1, 0])
    fast = backend == "triton"  # random projections instead of every entry: half a minute in the interpreter
    assert torch.autograd.gradcheck(lambda x: getattr(loss_fn(x, labels, ids), name), logits, fast_mode=fast)


def test_the_rest_is_detached() -> None:
    logits, labels, ref = inputs()
    out = make()(logits, labels, ids(), ref_logps=ref)
    for name in ("group_counts", "alpha", "chosen_rewards", "rejected_rewards"):
        assert not getattr(out, name).requires_grad
    assert not any(value.requires_grad for value in out.metrics().values())


def test_metrics() -> None:
    logits, labels, ref = inputs()
    out = make()(logits, labels, ids(), ref_logps=ref)
    metrics = out.metrics()
    assert all(value.dim() == 0 for value in metrics.values())
    assert metrics["rewards/margins"].item() == pytest.approx((out.chosen_rewards - out.rejected_rewards).mean().item())
    wins = (out.chosen_rewards > out.rejected_rewards).double().mean().item()
    assert metrics["rewards/accuracies"].item() == pytest.approx(wins)
    assert metrics["logps/rejected"].item() == pytest.approx(out.rejected_logps.mean().item())
    assert len({value.untyped_storage().data_ptr() for value in metrics.values()}) == 1  # one copy fetches them all


def test_alpha_is_left_alone_in_eval_and_under_no_grad(backend: str) -> None:
    logits, labels, ref = inputs()
    loss_fn = make(backend)
    before = loss_fn.group_weights.log_alpha.clone()
    with torch.no_grad():
        loss_fn(logits, labels, ids(), ref_logps=ref)
    assert torch.equal(loss_fn.group_weights.log_alpha, before)
    loss_fn.eval()
    out = loss_fn(logits, labels, ids(), ref_logps=ref)
    assert torch.equal(loss_fn.group_weights.log_alpha, before)
    assert out.loss.item() == pytest.approx((out.group_losses / 3).sum().item())
    loss_fn.train()(logits, labels, ids(), ref_logps=ref)
    assert not torch.equal(loss_fn.group_weights.log_alpha, before)


def test_lagged_accumulation_equals_one_batch(backend: str) -> None:
    """Two micro-batches, lagged: same alpha as the whole batch's, one update late."""
    logits, labels, ref = inputs()
    loss_fn, whole = make(backend, update="lagged"), make(backend)
    for pairs in ([0, 1], [2, 3]):
        rows = torch.tensor(pairs + [p + 4 for p in pairs])
        out = loss_fn(logits[rows], labels[rows], ids()[pairs], ref_logps=ref[rows], total_pairs=4)
        assert out.alpha.tolist() == pytest.approx([1 / 3] * 3)
    loss_fn.group_weights.step()
    expected = whole(logits, labels, ids(), ref_logps=ref).alpha
    torch.testing.assert_close(loss_fn.group_weights.alpha, expected)


def test_pair_weights_margin_and_beta_reach_the_loss(backend: str) -> None:
    logits, labels, ref = inputs()
    vectors = {"beta": torch.tensor([0.1, 0.5, 1.0, 2.0]), "margin": torch.rand(4), "weights": torch.rand(4)}
    out = make(backend)(logits, labels, ids(), ref_logps=ref, **vectors)
    logps = gk.sequence_logps(logits, labels, backend=backend)
    torch.testing.assert_close(out.pair_losses, gk.preference_losses(logps, ref, **vectors))
    torch.testing.assert_close(out.chosen_rewards, vectors["beta"] * (logps - ref)[:4].detach())


def test_two_losses_share_alpha() -> None:
    logits, labels, ref = inputs()
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.3)
    first, second = gk.GroupRobustLoss(weights), gk.GroupRobustLoss(weights, loss_type="hinge")
    alone = gk.GroupWeights(group_sizes=SIZES, step_size=0.3)
    for loss_fn, loss_type in ((first, "sigmoid"), (second, "hinge"), (first, "sigmoid")):
        out = loss_fn(logits, labels, ids(), ref_logps=ref)
        expected = gk.GroupRobustLoss(alone, loss_type=loss_type)(logits, labels, ids(), ref_logps=ref)
        assert torch.equal(out.alpha, expected.alpha)
        assert torch.equal(out.loss, expected.loss)
