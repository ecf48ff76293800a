"""The linear path's sweep: exact whatever it forecasts, at three products where the forecast is right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import EMPTY_BY_DESIGN
from test_sequence_logps import DTYPES
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import grpo_kernels as gk
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.groups.forecast import forecast_of
from grpo_kernels.kernels import linear, linear_pairs, linear_plan, torch_chunked

SIZES = [40, 25, 3]
NUM_PAIRS, LENGTH, HIDDEN, VOCAB = 6, 9, 8, 40


def ids() -> Tensor:
    return torch.tensor([2, 0, 2, 1, 0, 2])


def batch(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """[hidden, weight, bias], labels with prompts and padding, ref_logps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * NUM_PAIRS, LENGTH, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes]
    labels = torch.randint(0, VOCAB, shapes[0][:2], generator=generator, device="cpu")
    labels[:, :2] = -100
    for s in range(0, 2 * NUM_PAIRS, 3):
        labels[s, 4 + s // 3 :] = -100
    ref = 3 * torch.randn(2 * NUM_PAIRS, generator=generator, dtype=torch.float64, device="cpu") - 30
    device = torch.get_default_device()
    ref = ref.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    return [x.to(device, dtype).requires_grad_() for x in tensors], labels.to(device), ref


def group_weights(**options: Any) -> gk.GroupWeights:
    return gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.05, **options})


def value_and_grads(
    inputs: list[Tensor], loss_of: Callable[[list[Tensor]], Tensor], steps: int = 2
) -> tuple[Tensor, list[Tensor]]:
    """Of the second step: alpha is no longer uniform."""
    for _ in range(steps):
        loss = loss_of(inputs)
        grads = torch.autograd.grad(3.0 * loss, inputs)
    return loss.detach(), list(grads)


def sweep_is_exact(
    backend: str, dtype: torch.dtype, make_weights: Callable[[], gk.GroupWeights], **options: Any
) -> None:
    """Against the logits path: float64 is the truth, the same dtype what plain PyTorch gets."""
    inputs, labels, ref = batch(dtype)
    pair = {name: options.pop(name) for name in ("beta", "margin", "weights") if isinstance(options.get(name), Tensor)}

    def unfused(inputs: list[Tensor]) -> Tensor:
        logits = F.linear(*inputs)
        return unfused_loss(logits, labels, ids(), ref.to(torch.promote_types(ref.dtype, logits.dtype)), **pair).loss

    unfused_loss = gk.GroupRobustLoss(make_weights(), backend="reference", **options)
    exact, exact_grads = value_and_grads([x.detach().double().requires_grad_() for x in inputs], unfused)
    unfused_loss = gk.GroupRobustLoss(make_weights(), backend="reference", **options)
    plain, plain_grads = value_and_grads(inputs, unfused)
    loss_fn = gk.LinearGroupRobustLoss(make_weights(), plan="sweep", backend=backend, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got, grads = value_and_grads(
            inputs, lambda x: loss_fn(x[0], x[1], labels, ids(), ref_logps=ref, bias=x[2], **pair).loss
        )
    truth.assert_within_budget(got, exact, plain, "loss")
    for name, grad, exact_grad, plain_grad in zip(
        ("dhidden", "dweight", "dbias"), grads, exact_grads, plain_grads, strict=True
    ):
        assert grad.dtype == dtype
        if dtype == torch.float32:  # sums over as many rows, in another order than plain PyTorch's
            bound = labels.numel() * 2**-24 * exact_grad.abs().max()
            assert (grad.double() - exact_grad).abs().max() <= bound, name
        else:
            truth.assert_within_budget(grad, exact_grad, plain_grad, name)


@pytest.fixture
def sweeping_backend(backend: str) -> str:
    if backend == "reference":
        pytest.skip("it has no plans")
    return backend


@pytest.mark.interpreted(dtype=torch.float32, chunk_rows=20, estimator="importance")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_rows", [1, 20, 1000])
@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
def test_sweep_is_exact(
    sweeping_backend: str, dtype: torch.dtype, chunk_rows: int, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of one pair (every group goes on), of a few (some do), and of all."""
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", VOCAB * chunk_rows)
    sweep_is_exact(sweeping_backend, dtype, lambda: group_weights(estimator=estimator))


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "ipo"},
        {"loss_type": "hinge", "beta": 0.5},
        {"loss_type": "robust", "label_smoothing": 0.2},
        {"average_log_prob": True, "beta": 2.0},
        {"beta": torch.linspace(0.05, 0.4, 6), "margin": torch.linspace(-1, 1, 6), "weights": torch.rand(6)},
        {"reference_free": False, "label_smoothing": 0.1},
    ],
    ids=["ipo", "hinge", "robust", "average", "of pairs", "smoothing"],
)
@pytest.mark.parametrize(
    "weights",
    [
        lambda: group_weights(adjustment=2.0),
        lambda: group_weights(update="lagged", estimator="group_mean", floor=0.1, chi=0.5),
        lambda: group_weights(rule="cvar", level=0.5, step_size=None, update="lagged"),
        lambda: group_weights(step_size=0.0),
        lambda: group_weights(chi=0.0),
        lambda: group_weights().eval(),
    ],
    ids=["adjusted", "lagged", "cvar", "still", "uniform", "eval"],
)
def test_sweep_of_every_loss(options: dict, weights: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", VOCAB * 20)
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    sweep_is_exact("torch", torch.float64, weights, **options)


def test_chunks_of_pairs() -> None:
    chunk = linear_pairs.Chunk
    groups, lengths = [2, 0, 2, 1, 0, 2], [5, 9, 5, 4, 30, 5]
    assert linear_pairs.chunks_of_pairs(groups, lengths, 14, moving=True) == (
        [4],
        [chunk([1, 3]), chunk([0, 2], is_open=True), chunk([5], is_open=True, is_last=True)],
    )
    assert linear_pairs.chunks_of_pairs(groups, lengths, 14, moving=False) == (
        [4],
        [chunk([0, 1]), chunk([2, 3, 5])],
    )


def sweep_arguments(dtype: torch.dtype, chunk_rows: int, rate: float = 0.1) -> tuple[tuple, tuple]:
    inputs, labels, ref = batch(dtype)
    hidden, weight, bias = (x.detach() for x in inputs)
    log_weights = torch.zeros(3, dtype=torch.float64)
    forecast = linear_pairs.Forecast(log_weights, log_weights + rate, 2)
    plan = linear_plan.LinearPlan("sweep", chunk_rows, 0, (True, True, True), torch.float32)
    of_batch = (torch_chunked, hidden, linear.LinearHead(weight, bias), Rows(labels))
    return of_batch, (Pairs(ids(), ref), forecast, plan)


def sweep_back(upstream: Tensor, of_batch: tuple, swept: linear_pairs.Swept, plan: linear_plan.LinearPlan) -> tuple:
    kernels, *rest = of_batch
    return linear_pairs.sweep_backward(kernels, upstream, *rest, swept, plan)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_sweep_takes_three_products(rate: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, options = sweep_arguments(torch.bfloat16, 20, rate)
    one_product = 2 * int(inputs[3].counted.sum()) * HIDDEN * VOCAB
    with FlopCounterMode(display=False) as counter:
        swept = linear_pairs.Sweep(*inputs, *options).run()
    assert counter.get_total_flops() == 3 * one_product
    with FlopCounterMode(display=False) as counter:
        sweep_back(5 * swept.forecast.float(), inputs, swept, options[-1])
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_what_the_forecast_did_not_see(dtype: torch.dtype, close: float) -> None:
    """Gradients of the log-probabilities from elsewhere: the answer is right, and the cost is told."""
    inputs, labels, ref = batch(dtype)

    def total(plan: str, weights: Tensor) -> Tensor:
        loss_fn = gk.LinearGroupRobustLoss(group_weights(), plan=plan)
        out = loss_fn(inputs[0], inputs[1], labels, ids(), ref_logps=ref, bias=inputs[2])
        return out.loss - 0.01 * (weights * out.chosen_logps).sum()

    some = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.5, 0.0])
    expected = torch.autograd.grad(total("recompute", some), inputs)
    with pytest.warns(RuntimeWarning, match="6 of 12 sequences had gradients|[0-9]+ of 12 sequences had gradients"):
        got = torch.autograd.grad(total("sweep", some), inputs)
    for name, one, other in zip(("dhidden", "dweight", "dbias"), got, expected, strict=True):
        assert (one - other).abs().max() <= close * other.abs().max(), name


def test_groups_that_the_batch_lacks() -> None:
    inputs, labels, ref = batch(torch.float64)
    grads = []
    for plan in ("sweep", "recompute"):
        weights = group_weights(group_sizes=[40, 7, 25, 900, 3], step_size=0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            out = gk.LinearGroupRobustLoss(weights, plan=plan)(*inputs[:2], labels, 2 * ids(), ref_logps=ref)
            grads.append(torch.autograd.grad(out.loss, inputs[:2]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_only_the_weights_ratios_matter() -> None:
    """A million groups or a large data set make every offset very negative: e^-500 must not underflow."""
    inputs, options = sweep_arguments(torch.float32, 20)
    pairs, forecast, plan = options
    swept = linear_pairs.Sweep(*inputs, *options).run()
    small = linear_pairs.Sweep(*inputs, pairs, forecast._replace(offsets=forecast.offsets - 500), plan).run()
    torch.testing.assert_close(small.forecast, swept.forecast)
    torch.testing.assert_close(small.dweight, swept.dweight)


@pytest.mark.parametrize("moving", [False, True])
def test_pairs_longer_than_a_chunk(moving: bool) -> None:
    """They are computed again in the backward; their losses count for their group's weight all the same."""
    cut = 12  # rows; pairs have 7 to 14
    inputs, options = sweep_arguments(torch.float64, cut, 0.1 if moving else 0.0)
    swept = linear_pairs.Sweep(*inputs, *options).run()
    long_chunks = replace(options[-1], chunk_rows=1000)
    whole = linear_pairs.Sweep(*inputs, *options[:-1], long_chunks).run()
    assert 0 < int(swept.is_swept.sum()) < 2 * NUM_PAIRS
    torch.testing.assert_close(swept.logps, whole.logps)
    seen = swept.forecast[swept.is_swept], whole.forecast[swept.is_swept]
    torch.testing.assert_close(seen[0] / seen[0][0], seen[1] / seen[1][0])
    assert not swept.forecast[~swept.is_swept].any()
    # So small that it would pass for rounding, were those sequences not known to be missing.
    upstream = torch.where(swept.is_swept, 2.0, 1e-16) * whole.forecast
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = sweep_back(upstream, inputs, swept, options[-1])
    expected = sweep_back(upstream, inputs, whole, long_chunks)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    missing = ~swept.is_swept
    torch.testing.assert_close(got[0][missing], expected[0][missing], rtol=1e-9, atol=0)


@EMPTY_BY_DESIGN
def test_packed_and_frozen(sweeping_backend: str) -> None:
    inputs, labels, ref = batch(torch.float64)
    lengths = torch.tensor([9, 2, 9, 0, 5, 9, 9, 9, 3, 9, 9, 1])
    kept = torch.arange(LENGTH) < lengths.unsqueeze(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    labels = labels.masked_fill(~kept, -100)

    def loss(plan: str, packed: bool, *inputs: Tensor) -> Tensor:
        hidden, weight, bias = inputs
        loss_fn = gk.LinearGroupRobustLoss(group_weights(), plan=plan, backend=sweeping_backend)
        if not packed:
            return loss_fn(hidden, weight, labels, ids(), ref_logps=ref, bias=bias).loss
        return loss_fn(hidden[kept], weight, labels[kept], ids(), ref, bias, cu_seqlens).loss

    expected = torch.autograd.grad(loss("recompute", False, *inputs), inputs)
    for asked in ((0, 1, 2), (1,), (2,), (0, 1)):
        these = [x if i in asked else x.detach() for i, x in enumerate(inputs)]
        got = torch.autograd.grad(loss("sweep", True, *these), [inputs[i] for i in asked])
        for i, grad in zip(asked, got, strict=True):
            torch.testing.assert_close(grad, expected[i], rtol=1e-12, atol=1e-12)


def test_packed_pairs_fit_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products for packed rows, too: chunks grow to the pairs, which then need not be computed again."""
    inputs, labels, ref = batch(torch.float64)
    monkeypatch.setattr(linear_plan, "CHUNK_ELEMENTS", VOCAB)
    monkeypatch.setattr(linear_pairs, "linear_token_logps_backward", None)
    cu_seqlens = torch.arange(2 * NUM_PAIRS + 1) * LENGTH
    loss_fn = gk.LinearGroupRobustLoss(group_weights(), plan="sweep", backend="torch")
    hidden = inputs[0].flatten(0, 1)
    loss = loss_fn(hidden, inputs[1], labels.flatten(), ids(), ref_logps=ref, cu_seqlens=cu_seqlens).loss
    assert torch.autograd.grad(loss, inputs[1])[0].any()


def test_long_pairs_go_in_chunks_of_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = sweep_arguments(torch.float64, 12)
    sizes = []
    original = torch_chunked.token_logps_forward
    monkeypatch.setattr(
        torch_chunked,
        "token_logps_forward",
        lambda logits, *rest: (sizes.append(len(logits)), original(logits, *rest))[1],
    )
    linear_pairs.Sweep(*inputs, *options).run()
    assert sizes[0] == 12


def test_backward_twice_and_checkpointing() -> None:
    inputs, labels, ref = batch(torch.float64)

    def loss_of(loss_fn: gk.LinearGroupRobustLoss, *inputs: Tensor) -> Tensor:
        return loss_fn(inputs[0], inputs[1], labels, ids(), ref_logps=ref, bias=inputs[2]).loss

    loss = loss_of(gk.LinearGroupRobustLoss(group_weights(), plan="sweep"), *inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    loss_fn = gk.LinearGroupRobustLoss(group_weights(), plan="sweep")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        once_more = torch.autograd.grad(checkpoint(loss_of, loss_fn, *inputs, use_reentrant=False), inputs)
    for one, two, three in zip(first, again, once_more, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:a group's loss was not finite")
def test_losses_that_are_not_finite() -> None:
    """Alpha stays, the good pairs' hidden states get their gradients, dweight is NaN: as with any other plan."""
    inputs, labels, ref = batch(torch.float64)
    with torch.no_grad():
        inputs[0][1, 3] = torch.nan
    grads = []
    for plan in ("sweep", "recompute", "frozen"):
        weights, weight = group_weights(), inputs[1]
        options = {"plan": plan} if plan != "frozen" else {}
        weight = weight.detach() if plan == "frozen" else weight
        out = gk.LinearGroupRobustLoss(weights, **options)(inputs[0], weight, labels, ids(), ref_logps=ref)
        grads.append(torch.autograd.grad(out.loss, [x for x in (inputs[0], weight) if x.requires_grad]))
        assert out.loss.isnan()
        assert int(weights.skipped_updates) == 1
    for one, other in zip(*grads[:2], strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    torch.testing.assert_close(grads[2][0], grads[0][0], equal_nan=True)
    assert grads[0][0].isnan().any()
    assert grads[0][0][0].isfinite().all()


@EMPTY_BY_DESIGN
@pytest.mark.parametrize("plan", ["auto", "sweep", "keep"])
@pytest.mark.parametrize(("num_pairs", "length"), [(0, 3), (2, 0)])
def test_no_rows(plan: str, num_pairs: int, length: int) -> None:
    hidden = torch.randn(2 * num_pairs, length, 4, requires_grad=True)
    weight = torch.randn(5, 4, requires_grad=True)
    labels, group_ids = torch.zeros(2 * num_pairs, length).long(), torch.arange(num_pairs)
    groups = gk.GroupWeights(group_sizes=[3, 5], step_size=0.3)
    out = gk.LinearGroupRobustLoss(groups, plan=plan, reference_free=True)(hidden, weight, labels, group_ids)
    torch.testing.assert_close(out.pair_losses, torch.full((num_pairs,), math.log(2)))
    out.loss.backward()
    assert not weight.grad.any()
    assert hidden.grad.shape == hidden.shape


def test_no_slope_anywhere() -> None:
    """A hinge that every pair has passed: gradients of 0, not 0 / 0."""
    inputs, labels, ref = batch(torch.float64)
    margin = torch.full((NUM_PAIRS,), -1e4, dtype=torch.float64)
    loss_fn = gk.LinearGroupRobustLoss(group_weights(), plan="sweep", loss_type="hinge")
    out = loss_fn(*inputs[:2], labels, ids(), ref_logps=ref, margin=margin)
    assert all(not grad.any() for grad in torch.autograd.grad(out.loss, inputs[:2]))


@pytest.mark.parametrize(
    ("options", "accumulators"),
    [
        ({}, 2),
        ({"update": "lagged"}, 1),
        ({"chi": 0.0}, 1),
        ({"chi": 0.5}, None),
        ({"floor": 0.1}, None),
        ({"loss_ema": 0.5}, None),
        ({"rule": "soft_maximum", "step_size": None, "temperature": 1.0}, None),
        ({"group_sizes": [3], "floor": 0.1}, 1),
    ],
)
def test_what_can_be_forecast(options: dict, accumulators: int | None) -> None:
    group_ids = ids().clamp(max=len(options.get("group_sizes", SIZES)) - 1)
    forecast = forecast_of(group_weights(**options), group_ids)
    assert (None if forecast is None else forecast.accumulators) == accumulators
    if accumulators is None:
        inputs, labels, ref = batch(torch.float64)
        loss_fn = gk.LinearGroupRobustLoss(group_weights(**options), plan="sweep")
        with pytest.raises(ValueError, match="plan must be one that is possible here, got 'sweep'"):
            loss_fn(*inputs[:2], labels, group_ids, ref_logps=ref)


def test_huge_steps_are_still_exact() -> None:
    """Weights e^100 apart leave what float32 sums can hold: those groups are computed again."""
    inputs, labels, ref = batch(torch.float32)
    grads = []
    for plan in ("sweep", "recompute"):
        loss_fn = gk.LinearGroupRobustLoss(group_weights(step_size=40.0), plan=plan)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grads.append(torch.autograd.grad(loss_fn(*inputs[:2], labels, ids(), ref_logps=ref).loss, inputs[:2]))
    for one, other in zip(*grads, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=labels.numel() * 2**-24 * other.abs().max().item())


# -- the reference policy, online ----------------------------------------------------------------------------------


def test_online_reference(backend: str) -> None:
    inputs, labels, _ = batch(torch.float64)
    torch.manual_seed(1)
    ref_hidden = torch.randn(2 * NUM_PAIRS, LENGTH, 5, dtype=torch.float64).requires_grad_()  # a smaller model
    ref_weight, ref_bias = torch.randn(VOCAB, 5, dtype=torch.float64), torch.randn(VOCAB, dtype=torch.float64)
    head = {"logit_scale": 0.5, "softcap": 4.0, "average_log_prob": True}
    ref_logps = gk.linear_sequence_logps(
        ref_hidden.detach(), ref_weight, labels, bias=ref_bias, logit_scale=0.5, softcap=4.0, average=True
    )
    of_reference = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    results = []
    for given in ({"ref_logps": ref_logps}, of_reference):
        loss_fn = gk.LinearGroupRobustLoss(group_weights(), backend=backend, **head)
        out = loss_fn(*inputs[:2], labels, ids(), **given)
        results.append((out.loss.detach(), out.chosen_rewards, *torch.autograd.grad(out.loss, inputs[:2])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    assert ref_hidden.grad is None


def test_online_reference_is_checked() -> None:
    inputs, labels, ref = batch(torch.float32)
    loss_fn = gk.LinearGroupRobustLoss(group_weights())
    hidden, weight = inputs[0], inputs[1]
    for given, message in (
        ({"ref_hidden": hidden}, "ref_hidden and ref_weight must be given together, got no ref_weight"),
        ({"ref_weight": weight}, "got no ref_hidden"),
        ({"ref_hidden": hidden, "ref_weight": weight, "ref_logps": ref}, "given by ref_logps"),
        ({"ref_hidden": hidden, "ref_weight": weight[:, :3]}, r"weight must have shape \(V, 8\)"),
        ({"ref_hidden": hidden[:4], "ref_weight": weight}, "labels must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_fn(hidden, weight, labels, ids(), **given)
    free = gk.LinearGroupRobustLoss(group_weights(), reference_free=True)
    with pytest.raises(ValueError, match="given by reference_free=True"):
        free(hidden, weight, labels, ids(), ref_hidden=hidden, ref_weight=weight)
