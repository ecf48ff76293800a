"""The operators under torch.library.opcheck, and the losses under torch.compile(fullgraph=True)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from conftest import SIMULATED, batch
from loss_cases import ids

import grpo_kernels as gk
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels import ops
from grpo_kernels.kernels.linear_pairs import Forecast
from grpo_kernels.kernels.linear_plan import LinearPlan

OPS = torch.ops.grpo_kernels
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@functools.cache
def fused_calls() -> dict[str, tuple]:
    logits, labels = batch(num_pairs=4, length=4, dtype=torch.float32)
    logits = logits.detach()
    state = gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.3)
    flat = (
        *ops.ROWS.pack(Rows(labels, average=True)),
        *ops.PAIRS.pack(Pairs(ids(), torch.randn(8))),
        *ops.GROUPS.pack(state.fused_state("inline")),
    )
    forward = (logits, *flat, "triton")
    _, sequences, pairs, _, _, lse, row_sequence = OPS.group_robust_loss(*forward)
    saved = (lse, row_sequence, sequences, pairs, ids(), labels, -100, "triton")
    upstream = (torch.tensor(2.0), torch.randn(4, 8), torch.randn(3, 4), torch.randn(5, 3, dtype=torch.float64))
    calls = [forward, (*upstream, logits, *saved), (upstream[0], None, None, None, logits, *saved)]
    return dict(zip(FUSED, [*calls, (*upstream, logits.clone(), *saved)], strict=True))


# Known before the interpreter has run once, which is dear.
FUSED = (
    "group_robust_loss",
    "group_robust_loss_backward",
    "group_robust_loss_backward:loss_only",
    "group_robust_loss_backward_",
)
HAS_FUSED = not gk.backends()["triton"] and not torch.cuda.is_available()


@functools.cache
def operator_calls() -> dict[str, tuple]:
    logits, labels = batch(dtype=torch.float32)
    logits = logits.detach()
    hidden, weight, bias = torch.randn(6, 7, 5), torch.randn(13, 5), torch.randn(13)
    _, lse = OPS.token_logps(logits, labels, -100, "torch")
    head, upstream = (weight, bias, 0.5, 3.0), torch.randn(6, 7)
    # All labels count: rows of `kept` beyond those that do are never written.
    some, every = (ops.ROWS.pack(Rows(x, token_weights=torch.rand(6, 7))) for x in (labels, labels.clamp(min=0)))

    def plan(name: str, kept_rows: int = 0, needs_grad: tuple[bool, bool, bool] = (True, True, True)) -> tuple:
        return ops.PLAN.pack(LinearPlan(name, 9, kept_rows, needs_grad, torch.float32))

    of_hidden, of_weight = (True, False, False), (False, True, False)
    _, linear_lse, kept, _ = OPS.linear_token_logps(hidden, *head, *every, *plan("keep", 42), "torch", False)
    backward = (upstream, hidden, *head, *every)
    pairs = Pairs(torch.tensor([1, 0, 1]), torch.randn(6), weights=torch.rand(3), label_smoothing=0.2)
    forecast = Forecast(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), 2)
    of_pairs = (*ops.PAIRS.pack(pairs), *ops.FORECAST.pack(forecast), "torch")
    _, *swept = OPS.linear_pair_logps(hidden, *head, *some, *plan("sweep"), *of_pairs)
    return {
        "copy_in_forward": (hidden,),
        "token_logps": (logits, labels, -100, "torch"),
        "token_logps_backward": (upstream, logits, labels, lse, -100, "torch"),
        "token_logps_backward_": (upstream, logits.clone(), labels, lse, -100, "torch"),
        "token_metrics": (logits, labels, -100),
        "linear_token_logps": (hidden, *head, *some, *plan("none"), "torch", False),
        "linear_token_logps:keep": (hidden, *head, *every, *plan("keep", 42), "torch", True),
        "linear_token_logps:frozen": (hidden, *head, *some, *plan("frozen"), "torch", False),
        "linear_token_logps_backward": (*backward, *plan("recompute"), linear_lse, kept[:0], "torch"),
        "linear_token_logps_backward:keep": (*backward, *plan("keep", 42), linear_lse, kept, "torch"),
        "linear_token_logps_backward:hidden": (*backward, *plan("keep", 42, of_hidden), linear_lse, kept, "torch"),
        "linear_token_logps_backward:frozen": (
            *backward,
            *plan("frozen", 0, of_hidden),
            linear_lse,
            hidden * 2,
            "torch",
        ),
        "linear_pair_logps": (hidden, *head, *some, *plan("sweep"), *of_pairs),
        "linear_pair_logps:weight": (hidden, *head, *some, *plan("sweep", 0, of_weight), *of_pairs),
        "linear_pair_logps_backward": (torch.randn(6), hidden, *head, *some, *plan("sweep"), *swept, "torch"),
    }


@pytest.mark.filterwarnings("ignore:.*sequences had gradients of their log-probabilities")
@pytest.mark.parametrize("name", [*operator_calls(), *(FUSED if HAS_FUSED else ())])
def test_opcheck(name: str) -> None:
    operator = getattr(OPS, name.split(":")[0]).default
    arguments = (fused_calls() if name in FUSED else operator_calls())[name]
    torch.library.opcheck(operator, copy.deepcopy(arguments), test_utils=CHECKS)


# On the CPU: torch and cpp share their graphs, in which a backend is a string, and so do triton and the CUDA kernels.
# Theirs in place is Inductor's, of cpp where it is built.
IN_PLACE = {"torch": False, "triton": False, SIMULATED: True}
WITH_INDUCTOR = "torch" if torch.cuda.is_available() or gk.backends()["cpp"] else "cpp"


@pytest.mark.interpreted(compiler="aot_eager", inplace=False)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("inplace", [False, True])
def test_fullgraph(backend: str, compiler: str, inplace: bool) -> None:
    if backend == "reference":
        pytest.skip("plain PyTorch: nothing of ours is compiled")
    if compiler == "inductor" and (backend != WITH_INDUCTOR or not inplace):
        pytest.skip("Inductor sees the same graph for all; in place it has to keep the order, too")
    if compiler == "aot_eager" and not torch.cuda.is_available() and inplace != IN_PLACE.get(backend):
        pytest.skip("another backend has the graph, or Inductor")
    torch.compiler.reset()

    def make() -> gk.GroupRobustLoss:
        weights = gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.3)
        return gk.GroupRobustLoss(weights, inplace_backward=inplace, backend=backend)

    eager, loss_fn = make(), make()
    compiled = torch.compile(loss_fn, fullgraph=True, backend=compiler)
    for seed, length in ((1, 7), (2, 7), (3, 9)):  # the third recompiles with dynamic shapes
        logits, labels = batch(num_pairs=4, length=length, dtype=torch.float32, seed=seed)
        ref = torch.randn(8)
        results = []
        for module in (eager, compiled):
            leaf = logits.detach().clone().requires_grad_()
            out = module(leaf * 1.0, labels, ids(), ref_logps=ref)
            results.append((out.loss, out.alpha, *torch.autograd.grad(out.loss, leaf)))
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
    torch.testing.assert_close(loss_fn.group_weights.log_alpha, eager.group_weights.log_alpha)


@pytest.mark.interpreted(options={}, compiled="checkpoint")
@pytest.mark.parametrize("options", [{}, {"update": "lagged"}, {"loss_ema": 0.5}], ids=["inline", "lagged", "ema"])
@pytest.mark.parametrize("compiled", ["checkpoint", "loss"])
def test_run_again_by_checkpointing_it_raises_or_is_exact(backend: str, compiled: str, options: dict) -> None:
    """PyTorch would hand over buffers that the forward has overwritten, and the gradient would silently be wrong."""
    from torch.utils.checkpoint import checkpoint

    if backend == "cpp":
        pytest.skip("the graph is that of torch; backend is a string in it")
    if (backend == "reference" and options) or (backend == SIMULATED and "loss_ema" in options):
        pytest.skip("what moves alpha is that of torch")

    def make() -> gk.GroupRobustLoss:
        weights = gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.9, **options)
        return gk.GroupRobustLoss(weights, reference_free=True, backend=backend)

    torch.compiler.reset()
    eager, loss_fn = make(), make()

    def checkpointed(logits: torch.Tensor, labels: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: inner(x * 1.0, labels, group_ids).loss, logits, use_reentrant=False)

    inner = torch.compile(loss_fn, backend="aot_eager") if compiled == "loss" else loss_fn
    run = torch.compile(checkpointed, backend="aot_eager") if compiled == "checkpoint" else checkpointed
    for seed in (1, 2):
        logits, labels = batch(num_pairs=4, dtype=torch.float32, seed=seed)
        expected = torch.autograd.grad(eager(logits * 1.0, labels, ids()).loss, logits)[0]
        loss = run(logits, labels, ids())
        try:
            gradient = torch.autograd.grad(loss, logits)[0]
        except RuntimeError as error:
            if "keep the loss outside the checkpointed region" not in str(error):
                raise
        else:  # versions of PyTorch differ in what a compiled checkpoint runs again
            assert compiled == "checkpoint"
            torch.testing.assert_close(gradient, expected)
        for got, want in zip(loss_fn.group_weights.buffers(), eager.group_weights.buffers(), strict=True):
            torch.testing.assert_close(got, want)


def test_dynamic_shapes_and_another_beta() -> None:
    torch.compiler.reset()
    weights = gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.0)
    loss_fn = gk.GroupRobustLoss(weights, reference_free=True, backend="torch")
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for beta, length in ((0.1, 7), (0.2, 7), (0.3, 9)):
        logits, labels = batch(num_pairs=4, length=length, dtype=torch.float32)
        loss_fn.beta = beta
        got = compiled(logits, labels, ids()).loss
        torch.testing.assert_close(got, loss_fn(logits, labels, ids()).loss)
        torch.testing.assert_close(
            compiled(logits, labels, ids(), beta=2 * beta).loss, loss_fn(logits, labels, ids(), beta=2 * beta).loss
        )


def test_fullgraph_linear_and_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(13, 8), torch.nn.Linear(8, 13)
            weights = gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.3)
            self.loss = gk.LinearGroupRobustLoss(weights, reference_free=True, shift_labels=True, backend="torch")

        def forward(self, ids: torch.Tensor, labels: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
            return self.loss(self.embed(ids).tanh(), self.head.weight, labels, group_ids, bias=self.head.bias).loss

    model = Model()
    _, labels = batch(num_pairs=4)
    tokens = labels.clamp(min=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, labels, ids())
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.loss.group_weights.reset_parameters()
    eager = model(tokens, labels, ids())
    eager.backward()
    torch.testing.assert_close(loss, eager)
    for got, p in zip(grads, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)


def test_fullgraph_of_a_mixture() -> None:
    """Losses with two slopes, of sums and of means, in one graph with moving alpha."""
    logits, labels = batch(num_pairs=4)
    options = {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.1], "use_weighting": True}
    losses = [
        gk.GroupRobustLoss(gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.3), backend="torch", **options)
        for _ in range(2)
    ]
    torch.compiler.reset()
    compiled = torch.compile(losses[0], fullgraph=True, backend="aot_eager")
    for call in (compiled, losses[1]):
        call(logits, labels, ids(), torch.zeros(8, dtype=torch.float64)).loss.backward()
        logits.grad, expected = None, logits.grad
    compiled(logits, labels, ids(), torch.zeros(8, dtype=torch.float64)).loss.backward()
    second = losses[1](logits.detach().requires_grad_(), labels, ids(), torch.zeros(8, dtype=torch.float64))
    assert not torch.equal(logits.grad, expected), "alpha has moved"
    torch.testing.assert_close(losses[0].group_weights.alpha, second.alpha)


@pytest.mark.parametrize("plan", ["sweep", "recompute"])
def test_strides(plan: str) -> None:
    """A head stored as (D, V), hidden states as (T, S, D): gradients have the strides that the compiler was told."""
    stored, states = torch.randn(8, 13).requires_grad_(), torch.randn(7, 8, 8).requires_grad_()
    _, labels = batch(num_pairs=4)

    def loss(stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        groups = gk.GroupWeights(group_sizes=[60, 35, 5], step_size=0.3)
        loss_fn = gk.LinearGroupRobustLoss(groups, reference_free=True, plan=plan, backend="torch")
        return loss_fn(states.transpose(0, 1), stored.t(), labels, ids()).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    expected = torch.autograd.grad(loss(stored, states), (stored, states))
    for got, exact in zip(torch.autograd.grad(compiled(stored, states), (stored, states)), expected, strict=True):
        torch.testing.assert_close(got, exact)


def test_gradient_accumulation_through_shared_parameters() -> None:
    """Two backward passes into .grad add up."""
    logits, labels = batch()
    loss_fn = gk.GroupRobustLoss(gk.GroupWeights(group_sizes=[1], step_size=0.0), reference_free=True)
    ids = torch.zeros(3, dtype=torch.int64)
    loss_fn(logits, labels, ids).loss.backward()
    once = logits.grad.clone()
    loss_fn(logits, labels, ids).loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)
