"""sequence_logps of every backend against the float64 truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import batch
from torch import Tensor

import grpo_kernels as gk
from grpo_kernels.kernels import dispatch, torch_chunked

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def plain_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain PyTorch: float32 log_softmax, gather, sum."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = labels != -100
    picked = torch.log_softmax(wide, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * counted).sum(-1)


def run(function, inputs: list[Tensor], upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    out = function()
    return out.detach(), list(torch.autograd.grad(out, inputs, upstream.to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
def test_value_and_gradient(backend: str, dtype: torch.dtype, average: bool) -> None:
    logits, labels = batch(dtype=dtype)
    upstream = torch.linspace(-1.5, 2, logits.shape[0], dtype=torch.float64)
    exact, slopes = truth.sequence_terms(logits, labels, average=average)
    counts = (labels != -100).sum(-1).clamp(min=1) if average else 1
    plain, (plain_grad,) = run(lambda: plain_logps(logits, labels) / counts, [logits], upstream)
    got, (grad,) = run(lambda: gk.sequence_logps(logits, labels, average=average, backend=backend), [logits], upstream)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    truth.assert_within_budget(got, exact, plain, "logps")
    truth.assert_within_budget(grad, upstream[:, None, None] * slopes, plain_grad, "dlogits")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_equals_truth(backend: str, dtype: torch.dtype) -> None:
    logits, labels = batch(dtype=dtype)
    ends = [0, 5, 5, 18, 42]  # uneven, one of them empty
    packed, flat = logits.detach().flatten(0, 1).requires_grad_(), labels.flatten()
    upstream = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    exact, slopes = truth.sequence_terms(packed, flat, ends)
    rows = torch.repeat_interleave(upstream, torch.tensor(ends).diff())
    for index_dtype in (torch.int64, torch.int32):
        cu_seqlens = torch.tensor(ends, dtype=index_dtype)
        got, (grad,) = run(
            lambda c=cu_seqlens: gk.sequence_logps(packed, flat, cu_seqlens=c, backend=backend), [packed], upstream
        )
        per_row = plain_logps(packed.unsqueeze(1), flat.unsqueeze(1))
        plain = torch.stack([piece.sum() for piece in per_row.split([5, 0, 13, 24])])
        (plain_grad,) = torch.autograd.grad(plain, packed, upstream.to(plain.dtype))
        truth.assert_within_budget(got, exact, plain.detach(), "logps")
        truth.assert_within_budget(grad, rows[:, None] * slopes, plain_grad, "dlogits")


def test_packed_equals_padded(backend: str) -> None:
    logits, labels = batch(dtype=torch.float32)
    lengths = (labels != -100).sum(-1) + torch.arange(6) % 3
    pieces = [(logits[s, :n], labels[s, :n]) for s, n in enumerate(lengths.tolist())]
    keep = torch.stack([torch.arange(7) < n for n in lengths])
    padded = gk.sequence_logps(logits, labels.masked_fill(~keep, -100), backend=backend)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    packed = gk.sequence_logps(
        torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces]), cu_seqlens=cu_seqlens, backend=backend
    )
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)


def test_shift_labels(backend: str) -> None:
    logits, labels = batch()
    by_hand = torch.full_like(labels, -100)
    by_hand[:, :-1] = labels[:, 1:]
    exact, slopes = truth.sequence_terms(logits, by_hand)
    got, (grad,) = run(
        lambda: gk.sequence_logps(logits, labels, shift_labels=True, backend=backend),
        [logits],
        torch.ones(6, dtype=torch.float64),
    )
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(grad, slopes)
    cu_seqlens = torch.arange(0, 43, 7)
    packed = gk.sequence_logps(
        logits.flatten(0, 1), labels.flatten(), cu_seqlens=cu_seqlens, shift_labels=True, backend=backend
    )
    torch.testing.assert_close(packed, exact)


@pytest.mark.interpreted(inplace=True)
@pytest.mark.parametrize(
    "layout", ["sliced_positions", "sliced_vocabulary", "transposed", "strided_sequences", "expanded_labels"]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_non_contiguous_inputs(backend: str, layout: str, inplace: bool) -> None:
    base, labels = batch()
    base = base.detach()
    views = {
        "sliced_positions": F.pad(base, (0, 0, 0, 1))[:, :-1],
        "sliced_vocabulary": F.pad(base, (0, 3), value=50.0)[..., :-3],
        "transposed": base.transpose(0, 2).contiguous().transpose(0, 2),
        "strided_sequences": base.repeat_interleave(2, dim=0)[::2],
        "expanded_labels": base,
    }
    if layout == "expanded_labels":
        labels = labels[:1].expand(6, -1)
    logits = views[layout].requires_grad_()
    if layout != "expanded_labels":
        assert not logits.is_contiguous()
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    exact, slopes = truth.sequence_terms(base, labels)
    got, (grad,) = run(
        lambda: gk.sequence_logps(logits, labels, inplace_backward=inplace, backend=backend), [logits], upstream
    )
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(grad, upstream[:, None, None] * slopes)


def test_nothing_is_read_where_ignored(backend: str) -> None:
    """Only the optimised backends promise it: NaN on ignored rows reaches neither values nor gradients."""
    if backend == "reference":
        return
    logits, labels = batch()
    poisoned = logits.detach().clone()
    poisoned[labels == -100] = torch.nan
    poisoned.requires_grad_()
    exact, slopes = truth.sequence_terms(logits, labels)
    got, (grad,) = run(
        lambda: gk.sequence_logps(poisoned, labels, backend=backend), [poisoned], torch.ones(6, dtype=torch.float64)
    )
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(grad, slopes)


def test_all_positions_ignored(backend: str) -> None:
    logits, labels = batch()
    labels[2] = -100
    for average in (False, True):
        logps = gk.sequence_logps(logits, labels, average=average, backend=backend)
        (grad,) = torch.autograd.grad(logps.sum(), logits)
        assert logps[2] == 0
        assert (grad[2] == 0).all()
        assert grad.isfinite().all()
        assert (grad[labels != -100] != 0).any(-1).all()


@pytest.mark.parametrize("label", [-1, 13, 10**6, -101])
def test_label_outside_the_vocabulary(backend: str, label: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch()
    labels[1, 2] = label
    logps = gk.sequence_logps(logits, labels, backend=backend)
    assert logps[1].isnan()
    assert logps[[0, 2, 3, 4, 5]].isfinite().all()
    monkeypatch.setenv("GRPO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=rf"labels must be -100 or in \[0, 13\), got {label}"):
        gk.sequence_logps(logits, labels, backend=backend)


def test_adding_a_constant_to_a_row_changes_nothing(backend: str) -> None:
    logits, labels = batch()
    shifted = logits.detach() + 1e3 * torch.randn(6, 7, 1, dtype=torch.float64)
    torch.testing.assert_close(
        gk.sequence_logps(shifted, labels, backend=backend), gk.sequence_logps(logits, labels, backend=backend).detach()
    )


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_flat_and_far_away_logits(backend: str, offset: float) -> None:
    """V is no multiple of anything; equal logits give exactly -log V."""
    logits = torch.full((2, 3, 1003), offset, dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([[0, 1002, 500]] * 2)
    logps = gk.sequence_logps(logits, labels, backend=backend)
    torch.testing.assert_close(logps, torch.full((2,), -3 * 6.910750787961936))
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    torch.testing.assert_close(grad, F.one_hot(labels, 1003).float() - 1 / 1003, rtol=2e-6, atol=0)


def test_masked_vocabulary(backend: str) -> None:
    """-inf on entries that are no labels is a mask; on a label it gives log-probability -inf."""
    logits, labels = batch()
    masked = logits.detach().clone()
    masked[..., 12] = -torch.inf
    masked.requires_grad_()
    labels = labels.masked_fill(labels == 12, 3)
    exact, slopes = truth.sequence_terms(masked, labels)
    got, (grad,) = run(
        lambda: gk.sequence_logps(masked, labels, backend=backend), [masked], torch.ones(6, dtype=torch.float64)
    )
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(grad, slopes)
    labels[4, 3] = 12
    assert gk.sequence_logps(masked, labels, backend=backend)[4] == -torch.inf


def test_nan_logits_give_nan(backend: str) -> None:
    logits, labels = batch()
    broken = logits.detach().clone()
    broken[0, 3, 5] = torch.nan
    assert gk.sequence_logps(broken, labels, backend=backend)[0].isnan()


def test_token_logps(backend: str) -> None:
    logits, labels = batch()
    exact, slopes = truth.token_terms(logits, labels)
    upstream = torch.randn(6, 7, dtype=torch.float64)
    got, (grad,) = run(lambda: gk.token_logps(logits, labels, backend=backend), [logits], upstream)
    torch.testing.assert_close(got, exact)
    torch.testing.assert_close(grad, upstream.unsqueeze(-1) * slopes)
    shifted = gk.token_logps(logits, labels, shift_labels=True, backend=backend)
    torch.testing.assert_close(shifted.sum(-1), gk.sequence_logps(logits, labels, shift_labels=True, backend=backend))
    packed = gk.token_logps(logits[0], labels[0], cu_seqlens=torch.tensor([0, 3, 7]), backend=backend)
    torch.testing.assert_close(packed, exact[0])


def test_float64_gradcheck(backend: str) -> None:
    logits, labels = batch(num_pairs=1, length=4, vocab=5)
    assert torch.autograd.gradcheck(lambda x: gk.sequence_logps(x, labels, average=True, backend=backend), logits)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_saved_lse_is_exact(backend: str, offset: float) -> None:
    """Directly, because bfloat16's budget would hide a wrong one."""
    if backend == "reference":
        return
    logits, labels = batch(dtype=torch.float32)
    logits = logits.detach() + offset
    labels[3] = torch.arange(7)
    _, lse = dispatch.kernels_of(backend).token_logps_forward(logits, labels, -100)
    exact = torch.where(labels != -100, torch.logsumexp(logits.double(), -1), 0.0)
    torch.testing.assert_close(lse.double().sum(-1), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("elements", [1, 13, 40, 1 << 20])
def test_chunk_size_changes_nothing(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = batch()
    whole = gk.sequence_logps(logits, labels, backend="torch")
    (whole_grad,) = torch.autograd.grad(whole.sum(), logits)
    monkeypatch.setattr(torch_chunked, "SCRATCH_ELEMENTS", elements)
    for inplace in (False, True):
        leaf = logits.detach().clone().requires_grad_()
        chunked = gk.sequence_logps(leaf, labels, inplace_backward=inplace, backend="torch")
        (grad,) = torch.autograd.grad(chunked.sum(), leaf)
        assert torch.equal(chunked, whole)
        assert torch.equal(grad, whole_grad)


def test_inplace_backward_writes_over_the_logits() -> None:
    logits, labels = batch(dtype=torch.float32)
    base = logits.detach() * 1
    (expected,) = torch.autograd.grad(gk.sequence_logps(logits, labels, backend="torch").sum(), logits)
    base.requires_grad_()
    (grad,) = torch.autograd.grad(gk.sequence_logps(base, labels, inplace_backward=True, backend="torch").sum(), base)
    assert grad.data_ptr() == base.data_ptr()
    assert torch.equal(grad, expected)


def test_inplace_backward_is_noticed_by_other_readers(backend: str) -> None:
    if backend == "reference":
        pytest.skip("never writes in place")
    logits, labels = batch()
    middle = logits * 1.0
    total = gk.sequence_logps(middle, labels, inplace_backward=True, backend=backend).sum()
    other = (middle**2).sum()
    total.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_inplace_second_backward_is_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("never writes in place")
    logits, labels = batch()
    total = gk.sequence_logps(logits * 1.0, labels, inplace_backward=True, backend=backend).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_thousands_of_tokens_cost_no_digits(backend: str) -> None:
    """Token log-probabilities are float32, their sum is not taken in float32."""
    if backend == "reference":
        pytest.skip("plain PyTorch adds up in float32")
    logits, labels = torch.zeros(1, 200, 3), torch.zeros(1, 200, dtype=torch.int64)
    logits[0, 0, 1] = 1e5  # beside -1e5 each further -log 3 would be rounded to 1/128, always in the same direction
    tokens = gk.token_logps(logits, labels, backend=backend)
    total = gk.sequence_logps(logits, labels, backend=backend)
    exact = torch.tensor(tokens.double().sum().item(), dtype=torch.float32).item()
    assert total.item() == exact
    in_float32 = tokens.new_zeros(())
    for token in tokens.flatten():
        in_float32 += token
    assert in_float32.item() != exact  # so the test can fail


def test_retain_graph_gives_the_same_gradient_twice(backend: str) -> None:
    logits, labels = batch()
    total = gk.sequence_logps(logits, labels, backend=backend).sum()
    (first,) = torch.autograd.grad(total, logits, retain_graph=True)
    (second,) = torch.autograd.grad(total, logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize("upstream", [torch.sum, lambda logps: logps.square().sum()], ids=["constant", "not"])
def test_second_derivatives_are_refused(upstream: Callable) -> None:
    """Also where the incoming gradient is a constant: PyTorch alone would give zeros without a word."""
    logits, labels = batch()
    hidden, weight = torch.randn(6, 7, 5).double().requires_grad_(), torch.randn(13, 5).double().requires_grad_()
    ids = torch.tensor([0, 1, 0])

    def robust(kind: type, *inputs: Tensor, **options: str) -> Tensor:
        groups = gk.GroupWeights(group_sizes=[3, 2], step_size=0.1)
        return kind(groups, reference_free=True, **options)(*inputs, labels, ids).loss

    for inputs, call in (
        ([logits], lambda: gk.sequence_logps(logits, labels)),
        ([logits], lambda: gk.token_logps(logits, labels, backend="torch")),
        ([logits], lambda: robust(gk.GroupRobustLoss, logits)),
        ([logits], lambda: robust(gk.GroupRobustLoss, logits, backend="reference")),
        ([hidden, weight], lambda: gk.linear_sequence_logps(hidden, weight, labels)),
        ([hidden, weight], lambda: robust(gk.LinearGroupRobustLoss, hidden, weight, plan="sweep")),
    ):
        grads = torch.autograd.grad(upstream(call()), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            sum(grad.square().sum() for grad in grads).backward()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.functional.hessian(lambda x: upstream(gk.sequence_logps(x, labels)), logits.detach())


def test_two_runs_are_bitwise_equal(backend: str) -> None:
    length = 9 if backend == "triton" else 33
    logits, labels = batch(num_pairs=4, length=length, vocab=257, dtype=torch.float32)
    runs = []
    for _ in range(2):
        logps = gk.sequence_logps(logits, labels, backend=backend)
        runs.append((logps, *torch.autograd.grad(logps.sum(), logits)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
