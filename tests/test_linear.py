"""linear_sequence_logps of every backend and plan against the float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import batch
from test_sequence_logps import DTYPES, plain_logps, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import grpo_kernels as gk
from grpo_kernels.kernels import dispatch, linear, linear_plan, torch_chunked


def linear_inputs(dtype: torch.dtype, bias: bool = True) -> list[Tensor]:
    shapes = [(6, 7, 9), (13, 9), *([(13,)] if bias else [])]
    return [torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.interpreted(bias=True, elements=1 << 23)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("elements", [13, 1 << 23])
def test_linear_value_and_gradients(
    backend: str, dtype: torch.dtype, bias: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", elements)
    _, labels = batch()
    inputs = linear_inputs(dtype, bias)
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    hidden, weight, *rest = (x.detach().double() for x in inputs)
    exact, slopes = truth.sequence_terms(F.linear(hidden, weight, *rest), labels)
    dlogits = (upstream[:, None, None] * slopes).flatten(0, 1)
    exact_grads = [(dlogits @ weight).view_as(hidden), dlogits.T @ hidden.flatten(0, 1), dlogits.sum(0)]
    plain, plain_grads = run(lambda: plain_logps(F.linear(*inputs), labels), inputs, upstream)

    def ours() -> Tensor:
        return gk.linear_sequence_logps(*inputs[:2], labels, bias=inputs[2] if bias else None, backend=backend)

    got, grads = run(ours, inputs, upstream)
    truth.assert_within_budget(got, exact, plain, "logps")
    for name, grad, exact_grad, plain_grad in zip(
        ("dhidden", "dweight", "dbias"), grads, exact_grads, plain_grads, strict=False
    ):
        assert grad.dtype == dtype
        truth.assert_within_budget(grad, exact_grad, plain_grad, name)


def test_linear_skips_what_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, labels = batch()
    hidden, weight = linear_inputs(torch.float64, bias=False)
    asked = []
    original = linear.linear_token_logps_backward

    def spy(*args):
        grads = original(*args)
        asked.append([grad is not None for grad in grads])
        return grads

    monkeypatch.setattr(linear, "linear_token_logps_backward", spy)
    (only_hidden,) = torch.autograd.grad(
        gk.linear_sequence_logps(hidden, weight.detach(), labels, backend="torch").sum(), hidden
    )
    (only_weight,) = torch.autograd.grad(
        gk.linear_sequence_logps(hidden.detach(), weight, labels, backend="torch").sum(), weight
    )
    both = torch.autograd.grad(
        gk.linear_sequence_logps(hidden, weight, labels, backend="torch").sum(), (hidden, weight)
    )
    assert asked == [[True, False, False], [False, True, False], [True, True, False]]
    # The plans take the softmax of a row in different orders: float64's rounding, times V = 13 terms that are added up.
    torch.testing.assert_close(both[0], only_hidden, rtol=0, atol=1e-13)
    torch.testing.assert_close(both[1], only_weight, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_row_read_once_gives_what_two_readings_give(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: Any = dispatch.kernels_of(backend)
    monkeypatch.setattr(torch_chunked, "SCRATCH_ELEMENTS", 3 * 37)  # several turns
    torch.manual_seed(0)
    logits = (4 * torch.randn(11, 37)).to(dtype)
    labels = torch.randint(0, 37, (11,))
    logits[1, labels[1]] = -torch.inf
    logits[2, 5] = torch.inf
    logits[3] += 9984
    labels[4], labels[5] = 37, -1  # outside the vocabulary
    logits[6, 7] = torch.nan
    token_logps, lse = kernels.token_logps_forward(logits, labels, -100)
    gradient = torch.empty_like(logits)
    kernels.token_logps_backward(torch.ones_like(token_logps), logits, labels, lse, -100, gradient)

    at_once = logits.clone()
    found_logps, found_lse = kernels.token_logps_and_unit_gradient(at_once, labels, -100)
    # Sums of 37 terms in another order, and one rounding to the dtype.
    few = 8 * torch.finfo(token_logps.dtype).eps
    torch.testing.assert_close(found_logps, token_logps, rtol=few, atol=few, equal_nan=True)
    torch.testing.assert_close(found_lse.sum(1), lse.sum(1), rtol=few, atol=few, equal_nan=True)
    torch.testing.assert_close(at_once, gradient, rtol=torch.finfo(dtype).eps, atol=few, equal_nan=True)
    assert found_logps[1] == -torch.inf
    assert at_once[[2, 4, 5, 6]].isnan().any(1).all()
    nothing = kernels.token_logps_and_unit_gradient(logits[:0], labels[:0], -100)
    assert [tuple(x.shape) for x in nothing] == [(0,), (0, 2)]


PLANS = {"recompute": ("recompute", 0), "keep some": ("auto", 13 * 8 * 26), "keep all": ("keep", 1 << 20)}


@pytest.mark.interpreted(dtype=torch.float32, chunk_rows=4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
@pytest.mark.parametrize("plan", PLANS)
def test_linear_plans_agree_with_the_truth(
    backend: str, dtype: torch.dtype, chunk_rows: int, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is kept, in chunks of whatever size, twice over, and with an upstream gradient that is not 1."""
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 13 * chunk_rows)
    _, labels = batch()
    inputs = linear_inputs(dtype)
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    hidden, weight, bias = (x.detach().double() for x in inputs)
    exact, slopes = truth.sequence_terms(F.linear(hidden, weight, bias), labels)
    dlogits = (upstream[:, None, None] * slopes).flatten(0, 1)
    exact_grads = [(dlogits @ weight).view_as(hidden), dlogits.T @ hidden.flatten(0, 1), dlogits.sum(0)]
    plain, plain_grads = run(lambda: plain_logps(F.linear(*inputs), labels), inputs, upstream)
    name, max_extra_bytes = PLANS[plan]
    options = {"plan": name, "max_extra_bytes": max_extra_bytes, "backend": backend}
    out = gk.linear_sequence_logps(*inputs[:2], labels, bias=inputs[2], **options)
    truth.assert_within_budget(out.detach(), exact, plain, "logps")
    first = torch.autograd.grad(out, inputs, upstream.to(out.dtype), retain_graph=True)
    again = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    for name, grad, same, exact_grad, plain_grad in zip(
        ("dhidden", "dweight", "dbias"), first, again, exact_grads, plain_grads, strict=True
    ):
        truth.assert_within_budget(grad, exact_grad, plain_grad, name)
        assert torch.equal(grad, same)


@pytest.mark.interpreted(dtype=torch.bfloat16, plan="keep some", softcap=2.0)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.25, None), (1.0, 2.0), (-1.5, 3.0)])
def test_linear_scale_and_softcap(
    backend: str,
    dtype: torch.dtype,
    plan: str,
    logit_scale: float,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 13 * 4)
    _, labels = batch()
    inputs = linear_inputs(dtype)
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)

    def plain(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = logit_scale * F.linear(hidden, weight, bias)
        return plain_logps(softcap * torch.tanh(z / softcap) if softcap else z, labels)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact, exact_grads = run(lambda: plain(*wide), wide, upstream)
    plain_value, plain_grads = run(lambda: plain(*inputs), inputs, upstream)
    name, max_extra_bytes = PLANS[plan]
    options = {"plan": name, "max_extra_bytes": max_extra_bytes, "backend": backend}
    options |= {"logit_scale": logit_scale, "softcap": softcap}
    got, grads = run(lambda: gk.linear_sequence_logps(*inputs[:2], labels, bias=inputs[2], **options), inputs, upstream)
    truth.assert_within_budget(got, exact, plain_value, "logps")
    for what, grad, exact_grad, plain_grad in zip(
        ("dhidden", "dweight", "dbias"), grads, exact_grads, plain_grads, strict=True
    ):
        truth.assert_within_budget(grad, exact_grad, plain_grad, what)
    frozen = gk.linear_sequence_logps(inputs[0], inputs[1].detach(), labels, bias=inputs[2].detach(), **options)
    (dhidden,) = torch.autograd.grad(frozen, inputs[0], upstream.to(frozen.dtype))
    truth.assert_within_budget(dhidden, exact_grads[0], plain_grads[0], "dhidden of a frozen head")


@pytest.mark.interpreted(inplace=True, softcap=3.0)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.25, None), (-1.5, 3.0)])
def test_scale_and_softcap_of_logits_are_those_of_hidden_states(
    backend: str, logit_scale: float, softcap: float | None, inplace: bool
) -> None:
    _, labels = batch()
    hidden, weight, bias = linear_inputs(torch.float64)
    options = {"logit_scale": logit_scale, "softcap": softcap, "reference_free": True, "backend": backend}
    ids, results = torch.tensor([0, 1, 0]), []
    for from_hidden in (True, False):
        groups = gk.GroupWeights(group_sizes=[60, 40], step_size=0.5)
        if from_hidden:
            out = gk.LinearGroupRobustLoss(groups, **options)(hidden, weight, labels, ids, bias=bias)
        else:
            loss_fn = gk.GroupRobustLoss(groups, inplace_backward=inplace, **options)
            out = loss_fn(F.linear(hidden, weight, bias), labels, ids)
        results.append([out.loss.detach(), *torch.autograd.grad(out.loss, [hidden, weight, bias])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-13)
    given = {"logit_scale": logit_scale, "softcap": softcap, "backend": backend}
    tokens = gk.token_logps(F.linear(hidden, weight, bias), labels, **given)
    torch.testing.assert_close(tokens, gk.linear_token_logps(hidden, weight, labels, bias=bias, **given))


def test_linear_weight_of_another_dtype(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in hidden's dtype; the weight's gradient in its own, summed in float32 and not rounded to bfloat16."""
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 13 * 4)
    _, labels = batch()
    hidden, master = (x.detach() for x in linear_inputs(torch.float32, bias=False))
    hidden = hidden.bfloat16().requires_grad_()
    master.requires_grad_()
    rounded = master.detach().bfloat16().requires_grad_()
    mixed = gk.linear_sequence_logps(hidden, master, labels, backend=backend)
    same = gk.linear_sequence_logps(hidden, rounded, labels, backend=backend)
    assert torch.equal(mixed, same)
    grads, expected = (torch.autograd.grad(out.sum(), (hidden, w)) for out, w in ((mixed, master), (same, rounded)))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    assert torch.equal(grads[0], expected[0])
    assert torch.equal(grads[1].bfloat16(), expected[1])
    if backend != "reference":
        assert not torch.equal(grads[1], expected[1].float())


def test_linear_accumulate_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 40 * 64)
    hidden, weight = torch.randn(1, 512, 16).bfloat16(), torch.randn(40, 16).bfloat16().float().requires_grad_()
    labels = torch.randint(0, 40, (1, 512))
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        logps = gk.linear_sequence_logps(hidden, weight, labels, accumulate_dtype=dtype, backend="torch")
        (grads[dtype],) = torch.autograd.grad(logps.sum(), weight)
    assert torch.equal(grads[torch.bfloat16], grads[torch.bfloat16].bfloat16().float())
    assert 0 < (grads[torch.bfloat16] - grads[torch.float32]).abs().max() < 0.02 * grads[torch.float32].abs().max()


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("accumulated", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_products_that_a_gpu_has(
    dtype: torch.dtype, accumulated: torch.dtype, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU PyTorch knows the dtypes of its products, but not of those that add to sums."""

    def addmm(sums: Tensor, *factors: Tensor, out_dtype: torch.dtype, out: Tensor) -> None:
        assert sums.dtype == out.dtype == out_dtype == torch.float32
        assert {factor.dtype for factor in factors} <= {torch.bfloat16, torch.float16}

    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(linear, "_adds_in_product", lambda dtype: adds)
    with FakeTensorMode():
        factors = [torch.ones(8, size, dtype=dtype, device="cuda") for size in (32, 16)]
        sums = torch.zeros(32, 16, dtype=accumulated, device="cuda")
        linear.add_products(sums, None, *factors, torch.ones(8, 1, device="cuda"))


def test_linear_weight_gradient_does_not_drift_with_the_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 512, 16).bfloat16(), torch.randn(40, 16).bfloat16().requires_grad_()
    labels = torch.randint(0, 40, (1, 512))
    exact_weight = weight.detach().double().requires_grad_()
    exact_logps = gk.linear_sequence_logps(hidden.double(), exact_weight, labels, backend="torch")
    (exact,) = torch.autograd.grad(exact_logps.sum(), exact_weight)
    errors = []
    for chunk_rows in (512, 64, 4):
        monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", 40 * chunk_rows)
        logps = gk.linear_sequence_logps(hidden, weight, labels, backend="torch")
        (grad,) = torch.autograd.grad(logps.sum(), weight)
        errors.append(((grad.double() - exact).norm() / exact.norm()).item())
    assert errors[2] < 1.5 * errors[0]
    assert errors[0] < 2**-7


def test_linear_packed_shifted_and_strided(backend: str) -> None:
    _, labels = batch()
    hidden, weight = (x.detach() for x in linear_inputs(torch.float64, bias=False))
    logits = F.linear(hidden, weight)
    for options in ({"shift_labels": True}, {"average": True}):
        expected = gk.sequence_logps(logits, labels, backend="reference", **options)
        sliced = F.pad(hidden, (0, 0, 0, 1))[:, :-1].requires_grad_()
        strided_weight = weight.t().contiguous().t()
        got = gk.linear_sequence_logps(sliced, strided_weight, labels, backend=backend, **options)
        torch.testing.assert_close(got, expected)
        (grad,) = torch.autograd.grad(got.sum(), sliced)
        leaf = hidden.clone().requires_grad_()
        total = gk.sequence_logps(F.linear(leaf, weight), labels, backend="reference", **options).sum()
        torch.testing.assert_close(grad, torch.autograd.grad(total, leaf)[0])
        packed = gk.linear_sequence_logps(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            cu_seqlens=torch.arange(0, 43, 7),
            backend=backend,
            **options,
        )
        torch.testing.assert_close(packed, expected)


def test_linear_under_autocast() -> None:
    _, labels = batch()
    # Small whole numbers, whose products bfloat16 holds: no processor's order of summation rounds differently.
    hidden, weight = (x.detach().round().requires_grad_() for x in linear_inputs(torch.float32, bias=False))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gk.linear_sequence_logps(hidden, weight, labels, backend="torch")
        expected = gk.sequence_logps(F.linear(hidden, weight), labels, backend="torch")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)
    grad_hidden, grad_weight = torch.autograd.grad(got.sum(), (hidden, weight))
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32


def test_linear_gradcheck(backend: str) -> None:
    labels = torch.tensor([[1, -100, 0]])
    inputs = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((1, 3, 2), (4, 2), (4,))]
    assert torch.autograd.gradcheck(
        lambda h, w, b: gk.linear_sequence_logps(h, w, labels, bias=b, backend=backend), inputs
    )
