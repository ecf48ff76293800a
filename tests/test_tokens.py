"""Token by token: log-probabilities from hidden states, and weights of the tokens on every path."""

from __future__ import annotations

import pytest
import test_linear_pairs
import torch
import torch.nn.functional as F
import truth
from conftest import batch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels import functional
from grpo_kernels.kernels import linear_plan, token_metrics


def hidden_and_head(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((6, 7, 5), (13, 5), (13,))]


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("shape", [(6, 7), (42,), (2, 3, 7)], ids=str)
def test_linear_token_logps(backend: str, plan: str, shape: tuple[int, ...]) -> None:
    """Of any leading dimensions, with a gradient for each token."""
    hidden, weight, bias = hidden_and_head()
    labels = batch()[1].reshape(shape)
    rows, upstream = hidden.reshape(*shape, 5), torch.linspace(-1, 2, 42).double().reshape(shape)
    got = gk.linear_token_logps(
        rows, weight, labels, bias=bias, logit_scale=0.5, softcap=4.0, plan=plan, backend=backend
    )
    exact = gk.token_logps(4 * torch.tanh(F.linear(hidden, weight, bias) / 8), labels.reshape(6, 7))
    torch.testing.assert_close(got, exact.reshape(shape), rtol=1e-12, atol=1e-12)
    inputs = (hidden, weight, bias)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(exact, inputs, upstream.reshape(6, 7)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_linear_token_logps_of_sequences() -> None:
    """Shifted and packed, as `token_logps` has them."""
    hidden, weight, _ = (x.detach() for x in hidden_and_head())
    labels, ends = batch()[1], torch.arange(0, 43, 7)
    logits = F.linear(hidden, weight)
    for options, of_rows in (({}, lambda x: x), ({"cu_seqlens": ends}, lambda x: x.flatten(0, 1))):
        got = gk.linear_token_logps(of_rows(hidden), weight, of_rows(labels), shift_labels=True, **options)
        exact = gk.token_logps(of_rows(logits), of_rows(labels), shift_labels=True, **options)
        torch.testing.assert_close(got, exact)
    with pytest.raises(ValueError, match=r"shift_labels needs sequences: hidden \(S, T, D\), or cu_seqlens"):
        gk.linear_token_logps(hidden.flatten(0, 1), weight, labels.flatten(), shift_labels=True)
    with pytest.raises(ValueError, match=r"labels must have shape \(42,\), one for each row of hidden"):
        gk.linear_token_logps(hidden.flatten(0, 1), weight, labels)
    with pytest.raises(TypeError, match="'average' is no option here; there are cu_seqlens"):
        gk.linear_token_logps(hidden, weight, labels, average=True)


def exact_metrics(logits: Tensor, labels: Tensor) -> gk.TokenMetrics:
    """In float64; a probability of 0 adds nothing to the entropy."""
    z, counted = logits.detach().double(), labels != -100
    logp = z - z.logsumexp(-1, keepdim=True)
    terms = torch.where(logp == -torch.inf, 0.0, logp.exp() * logp)
    values = (-terms.sum(-1), z.mean(-1), (2 * logp).logsumexp(-1))
    hits = (z.max(-1).values == z.gather(-1, labels.clamp(0, z.shape[-1] - 1)[..., None])[..., 0]) & (labels >= 0)
    return gk.TokenMetrics(*(torch.where(counted, value, 0.0) for value in values), hits & (labels < z.shape[-1]))


def assert_metrics(got: gk.TokenMetrics, exact: gk.TokenMetrics, dtype: torch.dtype) -> None:
    for name, one, other in zip(got._fields, got, exact, strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 64 * torch.finfo(torch.float32).eps
        of_hits = {"check_dtype": name == "is_top1"}
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, **of_hits)
        assert not one.requires_grad, name


@pytest.mark.interpreted(dtype=torch.float32, of_sequences=True)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_sequences", [False, True])
def test_metrics_of_logits(backend: str, dtype: torch.dtype, of_sequences: bool) -> None:
    """Beside the same log-probabilities and gradients; a row of one certain token, a label outside the vocabulary."""
    logits, labels = batch(dtype=dtype)
    with torch.no_grad():
        logits[3, 4], logits[3, 4, 2], labels[3, 4] = -torch.inf, 7.0, 2
        logits[4, 3], labels[4, 3] = logits[4, 3].double().argsort().argsort().to(dtype), 99
    plain = (gk.sequence_logps if of_sequences else gk.token_logps)(logits, labels, backend=backend)
    if of_sequences:
        logps, metrics = functional.sequence_logps_and_metrics(logits, labels, backend=backend)
    else:
        logps, metrics = gk.token_logps(logits, labels, return_metrics=True, backend=backend)
    assert torch.equal(logps.nan_to_num(7.0), plain.nan_to_num(7.0))
    upstream = torch.linspace(-1, 2, plain.numel()).to(plain.dtype).view_as(plain)
    grads = [torch.autograd.grad(x, logits, upstream)[0] for x in (logps, plain)]
    assert torch.equal(*(grad.nan_to_num(7.0) for grad in grads))
    exact = exact_metrics(logits, labels)
    assert_metrics(metrics, exact, dtype)
    assert metrics.entropy[3, 4] == 0
    assert 0 < int(metrics.is_top1.sum()) < int((labels != -100).sum())


@pytest.mark.interpreted(plan="auto")
@pytest.mark.parametrize("plan", ["auto", "recompute"])
def test_metrics_of_hidden_states(backend: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the chunks of every plan ("auto" keeps, or takes the frozen head's), padded, packed, shifted."""
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 13 * 4)
    monkeypatch.setattr(token_metrics, "SCRATCH_ELEMENTS", 13 * 3)
    hidden, weight, bias = hidden_and_head()
    labels, ends = batch()[1], torch.arange(0, 43, 7)
    head = {"bias": bias, "logit_scale": 0.5, "softcap": 4.0, "plan": plan, "backend": backend}
    exact = exact_metrics(4 * torch.tanh(F.linear(hidden, weight, bias) / 8), labels)
    plain = gk.linear_token_logps(hidden, weight, labels, **head)
    logps, metrics = gk.linear_token_logps(hidden, weight, labels, return_metrics=True, **head)
    assert torch.equal(logps, plain)
    assert_metrics(metrics, exact, torch.float64)
    grads = [torch.autograd.grad(x.sum(), (hidden, weight, bias), retain_graph=True) for x in (logps, plain)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    flat = (hidden.flatten(0, 1), weight, labels.flatten())
    logps, metrics = functional.linear_sequence_logps_and_metrics(*flat, cu_seqlens=ends, **head)
    torch.testing.assert_close(logps, plain.sum(1))
    assert_metrics(metrics, gk.TokenMetrics(*(x.flatten() for x in exact)), torch.float64)
    _, metrics = gk.linear_token_logps(*flat, return_metrics=True, **{**head, "plan": "auto"})
    assert_metrics(metrics, gk.TokenMetrics(*(x.flatten() for x in exact)), torch.float64)
    frozen = gk.linear_token_logps(
        hidden, weight.detach(), labels, return_metrics=True, **{**head, "bias": bias.detach(), "plan": "auto"}
    )
    assert_metrics(frozen[1], exact, torch.float64)
    _, metrics = gk.linear_token_logps(hidden, weight, labels, shift_labels=True, return_metrics=True, **head)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    assert_metrics(metrics, exact_metrics(4 * torch.tanh(F.linear(hidden, weight, bias) / 8), shifted), torch.float64)


def test_a_tie_is_a_hit_of_the_first() -> None:
    logits = torch.tensor([[[1.0, 5.0, 5.0]]]).expand(1, 2, 3)
    _, metrics = gk.token_logps(logits, torch.tensor([[1, 2]]), return_metrics=True)
    assert metrics.is_top1.tolist() == [[True, False]]


def test_metrics_need_whole_rows() -> None:
    shard = gk.VocabShard(0, 13, object())
    logits, labels = batch()
    hidden, weight, _ = hidden_and_head()
    for call in (
        lambda: gk.token_logps(logits, labels, vocab_shard=shard, return_metrics=True),
        lambda: functional.sequence_logps_and_metrics(logits, labels, vocab_shard=shard),
        lambda: gk.linear_token_logps(hidden, weight, labels, vocab_shard=shard, return_metrics=True),
        lambda: functional.linear_sequence_logps_and_metrics(hidden, weight, labels, vocab_shard=shard),
    ):
        with pytest.raises(NotImplementedError, match="return_metrics must be False where the vocabulary is sharded"):
            call()


@pytest.mark.parametrize("average", [False, True])
def test_token_weights(backend: str, average: bool) -> None:
    """Values and gradients against the truth, padded, shifted and packed."""
    logits, labels = batch()
    weights = torch.linspace(0, 2, 42, dtype=torch.float64).reshape(6, 7)
    token, slopes = truth.token_terms(logits, labels)
    counts = (labels != -100).sum(-1) if average else torch.ones(6)
    exact = (token * weights).sum(-1) / counts
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    exact_grad = (upstream / counts)[:, None, None] * weights.unsqueeze(-1) * slopes
    unshifted = [F.pad(x, (1, 0), value=fill)[:, :-1] for x, fill in ((labels, 3), (weights, 7.0))]
    padded = {"average": average, "backend": backend}
    for call in (
        lambda x: gk.sequence_logps(x, labels, token_weights=weights, **padded),
        lambda x: gk.sequence_logps(
            x.flatten(0, 1),
            labels.flatten(),
            token_weights=weights.flatten(),
            cu_seqlens=torch.arange(0, 43, 7),
            **padded,
        ),
    ):
        got = call(logits)
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
        (grad,) = torch.autograd.grad(got, logits, upstream)
        torch.testing.assert_close(grad, exact_grad, rtol=1e-12, atol=1e-12)
    some = labels[:, -1] == -100  # a shift loses the last position of the others
    got = gk.sequence_logps(
        logits[some], unshifted[0][some], token_weights=unshifted[1][some], shift_labels=True, **padded
    )
    torch.testing.assert_close(got, exact[some], rtol=1e-12, atol=1e-12)


@pytest.mark.interpreted(average=True)
@pytest.mark.parametrize("plan", ["sweep", "keep", "recompute"])
@pytest.mark.parametrize("average", [False, True])
def test_token_weights_in_the_loss(backend: str, plan: str, average: bool) -> None:
    """Both modules, every plan of the linear one."""
    inputs, labels, ref = test_linear_pairs.batch(torch.float64)
    ids, weights = test_linear_pairs.ids(), torch.linspace(0, 1, labels.numel()).double().reshape(labels.shape)
    options = {"average_log_prob": average, "backend": backend}
    of_logits = gk.GroupRobustLoss(test_linear_pairs.group_weights(), **options)
    expected = of_logits(F.linear(*inputs), labels, ids, ref, token_weights=weights)
    of_hidden = gk.LinearGroupRobustLoss(test_linear_pairs.group_weights(), plan=plan, **options)
    got = of_hidden(*inputs[:2], labels, ids, ref, inputs[2], token_weights=weights)
    assert not torch.allclose(of_logits(F.linear(*inputs), labels, ids, ref).chosen_logps, expected.chosen_logps)
    torch.testing.assert_close(got.chosen_logps, expected.chosen_logps)
    exact = torch.autograd.grad(expected.loss, inputs)
    for one, other in zip(torch.autograd.grad(got.loss, inputs), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("plan", ["sweep", "keep", "recompute", "logits"])
@pytest.mark.parametrize("shift", [False, True])
def test_weights_of_ignored_tokens_do_not_matter(plan: str, shift: bool) -> None:
    """NaN where nobody has filled them in."""
    inputs, labels, ref = test_linear_pairs.batch(torch.float32)
    ids, weights = test_linear_pairs.ids(), torch.linspace(0, 1, labels.numel()).reshape(labels.shape)
    results = []
    for at_ignored in (0.0, torch.nan):
        given = torch.where(labels == -100, at_ignored, weights)
        options = {"shift_labels": shift, "backend": "torch"}
        if plan == "logits":
            loss_fn = gk.GroupRobustLoss(test_linear_pairs.group_weights(), **options)
            out = loss_fn(F.linear(*inputs), labels, ids, ref, token_weights=given)
        else:
            loss_fn = gk.LinearGroupRobustLoss(test_linear_pairs.group_weights(), plan=plan, **options)
            out = loss_fn(*inputs[:2], labels, ids, ref, inputs[2], token_weights=given)
        results.append((out.loss, *torch.autograd.grad(out.loss, inputs)))
    for plain, with_nan in zip(*results, strict=True):
        assert torch.equal(plain, with_nan)
        assert with_nan.isfinite().all()


def test_bad_token_weights() -> None:
    logits, labels = batch()
    for weights, error, message in (
        ([1.0], TypeError, "token_weights must be a torch.Tensor, got list"),
        (torch.ones(6), ValueError, r"token_weights must have labels' shape \(6, 7\), got \(6,\)"),
        (torch.ones(6, 7).requires_grad_(), ValueError, "pass token_weights.detach()"),
        (torch.ones(6, 7, dtype=torch.int64), TypeError, "token_weights must be float32"),
    ):
        with pytest.raises(error, match=message):
            gk.sequence_logps(logits, labels, token_weights=weights)
