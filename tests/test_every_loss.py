"""Every entry of the table of pair losses, mixtures of them, and their options, against the textbook in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import test_linear_pairs
import torch
import torch.nn.functional as F
import truth
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.pair_losses import PAIR_LOSSES, SCORES, of_h

BETA = 0.7
MIXTURES = {
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "norm": {"loss_type": ["sigmoid_norm", "hinge"], "loss_weights": [2.0, -0.5]},
    "apo": {"loss_type": ["apo_zero", "sft"]},
}
EVERY: dict[str, dict[str, Any]] = {name: {"loss_type": name} for name in PAIR_LOSSES} | MIXTURES


def smoothing_of(options: dict[str, Any]) -> float:
    names = [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    return 0.2 if any(PAIR_LOSSES[name].uses_label_smoothing for name in names) else 0.0


def uses_reference(options: dict[str, Any]) -> bool:
    names = [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    return any(PAIR_LOSSES[name].uses_reference for name in names)


def textbook(
    logps: Tensor, ref: Tensor | None, counts: Tensor, options: dict[str, Any], e: Any, beta: Any = BETA
) -> Tensor:
    """(B,) of (2B,)."""
    names = [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    p, n = logps.view(2, -1), counts.view(2, -1)
    r = p if ref is None else p - ref.view(2, -1)
    r = truth.TEXTBOOK_DIVERGENCES[options.get("f_divergence_type", "reverse_kl")](
        r, options.get("f_alpha_divergence_coef", 0.5)
    )
    weights = options.get("loss_weights") or [1.0] * len(names)
    return sum(w * truth.TEXTBOOK[name](r, p, n, beta, e) for name, w in zip(names, weights, strict=True))


def sequences(num_pairs: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and the reference's (2B,), whose ratios are from -3 to 3, and tokens."""
    counts = torch.randint(1, 6, (2 * num_pairs,)).double()
    logps = -(0.2 + 2 * torch.rand(2 * num_pairs).double()) * counts
    return logps.requires_grad_(), logps.detach() + 6 * torch.rand(2 * num_pairs).double() - 3, counts


def test_every_entry_has_a_textbook_and_a_description() -> None:
    assert set(truth.TEXTBOOK) == set(PAIR_LOSSES)
    for name, entry in PAIR_LOSSES.items():
        assert entry.score in SCORES, name
        assert entry.formula, name
        assert entry.source, name
        assert entry.moves_alpha, name


@pytest.mark.parametrize("name", EVERY)
def test_value_and_slopes(name: str) -> None:
    """With one label smoothing for all pairs, and with one for each."""
    options, smoothing = EVERY[name], smoothing_of(EVERY[name])
    logps, ref, counts = sequences()
    ref_logps = ref if uses_reference(options) else None
    for e in (smoothing, torch.linspace(0.05, 0.45, 40).double()) if smoothing else (smoothing,):
        got = gk.preference_losses(logps, ref_logps, beta=BETA, label_smoothing=e, token_counts=counts, **options)
        expected = textbook(logps, ref_logps, counts, options, e)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        upstream = torch.linspace(-1, 2, len(got)).double()
        grads = [torch.autograd.grad(x, logps, upstream)[0] for x in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
        assert grads[0].abs().sum() > 0


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_out(name: str, dtype: torch.dtype) -> None:
    """Scores of hundreds overflow nothing, and what is NaN stays so."""
    tokens = torch.full((12,), 100.0)
    chosen = torch.tensor([-1000.0, -900.0, -1.0, -500.0, -3.0, math.nan], dtype=dtype)
    logps = torch.cat([chosen, torch.full_like(chosen, -400.0)]).requires_grad_()
    ref = torch.full((12,), -500.0, dtype=dtype) if PAIR_LOSSES[name].uses_reference else None
    e = 0.1 if PAIR_LOSSES[name].needs_label_smoothing else 0.0
    losses = gk.preference_losses(logps, ref, beta=0.1, loss_type=name, label_smoothing=e, token_counts=tokens)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    if name == "discopop":  # e^-z is as large as it says, or inf in float32
        assert losses[2:5].isfinite().all()
        return
    assert losses[:5].isfinite().all()
    assert grad[:5].isfinite().all()
    assert losses[5].isnan()
    assert grad[5].isnan()


@pytest.mark.parametrize("divergence", truth.TEXTBOOK_DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_far_out(divergence: str, dtype: torch.dtype) -> None:
    """Log-ratios of hundreds on both sides of a pair are no NaN; a NaN stays one."""
    ratios = torch.tensor([-300.0, -90.0, 300.0, math.nan, -300.0, -300.0, -300.0, 0.0], dtype=dtype).requires_grad_()
    losses = gk.preference_losses(ratios, torch.zeros(8, dtype=dtype), f_divergence_type=divergence)
    (grad,) = torch.autograd.grad(losses.sum(), ratios)
    assert losses[:3].isfinite().all()
    assert grad[[0, 1, 2, 4, 5, 6]].isfinite().all()
    assert losses[3].isnan()
    assert grad[3].isnan()


def test_soft_labels_out_of_range() -> None:
    logps, ref, _ = sequences(2)
    for name, e, message in (
        ("sigmoid", [0.2, 1.2], r"in \[0, 1\] for each pair with loss_type=\['sigmoid'\], got 1.2"),
        ("robust", [0.2, 0.5], r"in \[0, 1/2\) for each pair with loss_type=\['robust'\], got 0.5"),
        ("exo_pair", [0.2, 0.0], r"in \(0, 1\) for each pair with loss_type=\['exo_pair'\], got 0"),
        ("sigmoid", [math.nan, 0.2], r"in \[0, 1\] for each pair with loss_type=\['sigmoid'\], got nan"),
    ):
        with pytest.raises(ValueError, match=f"label_smoothing must be {message}"):
            gk.preference_losses(logps, ref, loss_type=name, label_smoothing=torch.tensor(e).double())
    entry, e = PAIR_LOSSES["robust"], torch.tensor([0.2, 0.5, 0.7])  # where nobody looks, as on a GPU
    scores = of_h(torch.ones(3))
    assert entry.value(scores, 1.0, e).isnan().tolist() == [False, True, True]
    assert entry.slopes(scores, 1.0, e)[0].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("name", [name for name, entry in PAIR_LOSSES.items() if entry.uses_counts])
def test_an_answer_without_tokens(name: str) -> None:
    """Its log-probability is 0, whatever is asked of its mean: no NaN in the other's gradient."""
    logps = torch.tensor([0.0, -3.0, -0.0, -4.0, 0.0, -0.0]).requires_grad_()
    counts = torch.tensor([0, 2, 0, 3, 0, 0])
    ref = torch.zeros(6) if PAIR_LOSSES[name].uses_reference else None
    losses = gk.preference_losses(logps, ref, beta=0.5, loss_type=name, token_counts=counts)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("divergence", truth.TEXTBOOK_DIVERGENCES)
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo_norm"])
def test_f_divergences(divergence: str, loss_type: str) -> None:
    options = {"loss_type": loss_type, "f_divergence_type": divergence}
    if divergence == "alpha_divergence":
        options["f_alpha_divergence_coef"] = 0.3
    logps, ref, counts = sequences()
    got = gk.preference_losses(logps, ref, beta=BETA, token_counts=counts, **options)
    expected = textbook(logps, ref, counts, options, 0.0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), logps)[0] for x in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


def test_a_mixture_smooths_only_what_has_a_smoothing() -> None:
    logps, ref, counts = sequences(3)
    for e in (0.2, torch.rand(3).double()):
        parts = gk.preference_losses(logps, ref, label_smoothing=e)
        parts = parts + gk.preference_losses(logps, loss_type="simpo", token_counts=counts)
        mixture = gk.preference_losses(
            logps, ref, loss_type=["sigmoid", "simpo"], label_smoothing=e, token_counts=counts
        )
        torch.testing.assert_close(mixture, parts)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logps)[0] for x in (mixture, parts)))


def test_numbers_of_pairs() -> None:
    """beta, label_smoothing, margin and weights of each pair; WPO's likelihoods are constants."""
    logps, ref, counts = sequences(5)
    beta, e, margin, weights = (torch.rand(5).double() for _ in range(4))
    options = {"loss_type": ["sigmoid", "hinge"]}
    got = gk.preference_losses(
        logps,
        ref,
        beta=beta,
        label_smoothing=e,
        margin=margin,
        weights=weights,
        token_counts=counts,
        use_weighting=True,
        **options,
    )
    likelihood = (logps.detach() / counts).view(2, 5).sum(0).exp()
    shifted = torch.cat([logps[:5] - margin, logps[5:]])
    expected = weights * likelihood * textbook(shifted, ref, counts, options, e, beta)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(x.sum(), logps)[0] for x in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", EVERY)
def test_groups_on_logits(backend: str, name: str) -> None:
    """End to end with moving alpha, two steps: the weighted textbook."""
    if backend in ("triton", "cuda-simulated") and name not in ("sft", "mpo"):
        pytest.skip("after the log-probabilities all backends do the same: two of them here")
    options, e = EVERY[name], smoothing_of(EVERY[name])
    inputs, labels, ref = test_linear_pairs.batch(torch.float64)
    ids, ref = test_linear_pairs.ids(), ref if uses_reference(options) else None
    loss_fn = gk.GroupRobustLoss(
        test_linear_pairs.group_weights(step_size=0.1), beta=BETA, label_smoothing=e, backend=backend, **options
    )
    logits = F.linear(*inputs).detach()[:, :, :13].contiguous().requires_grad_()
    labels = torch.where(labels == -100, labels, labels % 13)
    for _ in range(2):
        out = loss_fn(logits, labels, ids, ref)
    logps = gk.sequence_logps(logits, labels, backend="reference")
    losses = textbook(logps, ref, (labels != -100).sum(-1).double(), options, e)
    expected = (out.alpha[ids] / torch.tensor([40, 25, 3])[ids] * 68 / 6 * losses).sum()
    torch.testing.assert_close(out.pair_losses, losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (out.loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(out.alpha, torch.full((3,), 1 / 3).double())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("plan", ["sweep", "keep", "recompute"])
def test_groups_on_hidden_states(name: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan; the sweep forecasts both slopes, so that no sequence is computed again, padded and packed."""
    import warnings

    from grpo_kernels.kernels import linear_plan

    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", test_linear_pairs.VOCAB * 20)
    options, e = EVERY[name], smoothing_of(EVERY[name])
    inputs, labels, ref = test_linear_pairs.batch(torch.float64)
    ids, ref = test_linear_pairs.ids(), ref if uses_reference(options) else None
    given = {"beta": BETA, "label_smoothing": e, **options}
    of_logits = gk.GroupRobustLoss(test_linear_pairs.group_weights(), backend="reference", **given)
    expected = of_logits(F.linear(*inputs), labels, ids, ref)
    exact = torch.autograd.grad(expected.loss, inputs)
    hidden, weight, bias = inputs
    packed = (hidden.flatten(0, 1), weight, labels.flatten(), ids, ref, bias, torch.arange(0, 109, 9))
    for arguments in ((hidden, weight, labels, ids, ref, bias), packed):
        loss_fn = gk.LinearGroupRobustLoss(test_linear_pairs.group_weights(), plan=plan, backend="torch", **given)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            got = loss_fn(*arguments)
            grads = torch.autograd.grad(got.loss, inputs)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-11, atol=1e-12)
        for one, other in zip(grads, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("update", ["inline", "lagged"])
def test_alpha_follows_the_preferences(update: str) -> None:
    """exp(eta L) of the preferences; loss and gradient are those of the sum at that alpha. Both paths, three steps."""
    inputs, labels, ref = test_linear_pairs.batch(torch.float64)
    ids, options = test_linear_pairs.ids(), MIXTURES["mpo"] | {"beta": BETA}
    log_alpha = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    of_logits, of_hidden = (
        make(
            gk.GroupWeights(num_groups=3, estimator="group_mean", step_size=0.9, update=update),
            alpha_follows="preference",
            **options,
        )
        for make in (gk.GroupRobustLoss, gk.LinearGroupRobustLoss)
    )
    for _ in range(3):
        of_labels = F.linear(*inputs).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        logps, counts = of_labels.masked_fill(labels == -100, 0).sum(-1), (labels != -100).sum(-1)
        weights_of = {True: [0.8, 0.2, 0.0], False: options["loss_weights"]}
        preference, whole = (
            textbook(logps, ref, counts, options | {"loss_weights": weights_of[alone]}, 0.0) for alone in (True, False)
        )
        before = log_alpha
        moved = before + 0.9 * torch.stack([preference[ids == g].mean() for g in range(3)]).detach()
        log_alpha = moved - moved.logsumexp(0)
        alpha = (log_alpha if update == "inline" else before).exp()
        exact = (alpha * torch.stack([whole[ids == g].mean() for g in range(3)])).sum()
        expected = torch.autograd.grad(exact, inputs)
        for loss_fn, arguments in ((of_logits, (F.linear(*inputs),)), (of_hidden, inputs[:2])):
            bias = {"bias": inputs[2]} if loss_fn is of_hidden else {}
            out = loss_fn(*arguments, labels, ids, ref, **bias)
            torch.testing.assert_close(out.loss, exact)
            for got, want in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
            if update == "lagged":
                loss_fn.group_weights.step()
            torch.testing.assert_close(loss_fn.group_weights.log_alpha, log_alpha)


def test_what_is_refused() -> None:
    logps, ref, counts = sequences(2)
    weights = gk.GroupWeights(group_sizes=[2], step_size=0.1)
    for options, message in (
        ({"loss_type": "aot"}, "got 'aot': it sorts the log-ratios of a batch"),
        ({"loss_type": []}, "loss_weights must have a number for each of loss_type"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights must have a number for each"),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be finite and in \(0.0, 0.5\), got 0.0"),
        ({"loss_type": "apo_zero", "label_smoothing": 0.1}, "label_smoothing has no meaning for loss_type='apo_zero'"),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, "losses of the margin of log-ratios only"),
        ({"f_divergence_type": "kl"}, "f_divergence_type must be one of 'reverse_kl'"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0}, "must not be 1"),
        ({"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef has no meaning without f_divergence_type="),
        ({"discopop_tau": 0.1}, "discopop_tau has no meaning without loss_type='discopop', got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.preference_losses(logps, ref, token_counts=counts, **options)
        with pytest.raises(ValueError, match=message):
            gk.GroupRobustLoss(weights, **options)
    for options, message in (
        ({"loss_type": None}, "loss_type must be a name or a list of names, got NoneType"),
        ({"loss_weights": 0.5}, "loss_weights must be a list of numbers, got float"),
        ({"loss_weights": ["a"]}, "loss_weights must be a number, got str"),
        ({"label_smoothing": "a"}, "label_smoothing must be a number, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            gk.preference_losses(logps, ref, **options)
        with pytest.raises(TypeError, match=message):
            gk.GroupRobustLoss(weights, **options)
    for name in ("beta", "label_smoothing"):  # (B,) is for a call
        with pytest.raises(TypeError, match=f"{name} must be a number, got Tensor"):
            gk.GroupRobustLoss(weights, **{name: torch.tensor([0.1])})
    with pytest.raises(ValueError, match=r"token_counts must have shape \(4,\), one for each sequence, got \(3,\)"):
        gk.preference_losses(logps, ref, token_counts=counts[:3])
    with pytest.raises(ValueError, match=r"ref_logps must be None for loss_type=\['simpo'\], which has no reference"):
        gk.GroupRobustLoss(weights, loss_type="simpo").from_logps(logps, torch.zeros(2).long(), ref)
    with pytest.raises(ValueError, match="token_counts must be given for losses of means"):
        gk.preference_losses(logps, ref, loss_type="sigmoid_norm")
    with pytest.raises(ValueError, match="ref_logps must be None for loss_type"):
        gk.preference_losses(logps, ref, loss_type="simpo", token_counts=counts)
    with pytest.raises(ValueError, match="margin has a meaning for losses of the margin only"):
        gk.preference_losses(logps, ref, loss_type="bco_pair", margin=torch.ones(2).double())
    with pytest.raises(ValueError, match="average_log_prob must be False for loss_type='sft'"):
        gk.GroupRobustLoss(weights, loss_type="sft", average_log_prob=True)
    with pytest.raises(TypeError, match="'loss_weight' is no option here"):
        gk.GroupRobustLoss(weights, loss_weight=[1.0])
    tilted = gk.GroupWeights(num_groups=2, estimator="group_mean", step_size=0.1, inner_tilt=1.0)
    with pytest.raises(ValueError, match="alpha_follows must be 'loss' with inner_tilt"):
        gk.GroupRobustLoss(tilted, loss_type=["sigmoid", "sft"], alpha_follows="preference")
    for names in ("sigmoid", ["sft"], ["sigmoid", "hinge"]):
        with pytest.raises(ValueError, match="has a meaning where loss_type lists 'sft' beside"):
            gk.GroupRobustLoss(
                gk.GroupWeights(group_sizes=[1, 1], step_size=0.1), loss_type=names, alpha_follows="preference"
            )
