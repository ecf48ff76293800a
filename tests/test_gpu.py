"""What only a GPU can show: sizes beyond 2**31, CUDA graphs, streams, launches, synchronisation, reproducibility."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import grpo_kernels as gk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
BACKENDS = [name for name in ("triton", "cuda") if name in gk.backends() and not gk.backends()[name]]
SIZES = [60, 35, 5]


def problem(num_pairs: int, length: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    shape = (2 * num_pairs, length)
    logits = torch.empty(*shape, vocab, dtype=dtype, device="cuda").normal_(std=3)
    labels = torch.randint(0, vocab, shape, device="cuda")
    labels[:, : length // 3] = -100
    group_ids = torch.randint(0, 3, (num_pairs,), device="cuda")
    return logits, labels, group_ids, torch.randn(2 * num_pairs, device="cuda")


def make(backend: str, **options) -> gk.GroupRobustLoss:
    weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.3)
    return gk.GroupRobustLoss(weights, backend=backend, **options).cuda()


def step(loss_fn: gk.GroupRobustLoss, logits: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
    leaf = logits.detach().requires_grad_()
    out = loss_fn(leaf, *rest)
    return (out.loss, out.alpha, out.pair_losses, *torch.autograd.grad(out.loss, leaf))


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    """alpha is float64, but of float32 log-probabilities, whose sums run in another order."""
    both = (one.float() if one.dtype == torch.float64 else one for one in (got, want))
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [127, 32_000, 128_256, 151_936, 50_257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_real_vocabularies(backend: str, vocab: int, dtype: torch.dtype) -> None:
    logits, *rest = problem(4, 24, vocab, dtype)
    loss, alpha, pair_losses, grad = step(make(backend), logits, *rest)
    exact = step(make("reference"), logits.double(), *rest)
    torch.testing.assert_close(loss.double(), exact[0].double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alpha, exact[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pair_losses.double(), exact[2].double(), rtol=1e-5, atol=1e-5)
    largest = exact[3].abs().max()
    eps = torch.finfo(dtype).eps
    assert (grad.double() - exact[3]).abs().max() <= max(eps / 2, 3e-6) * largest
    assert (grad[rest[0] == -100] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_logits(backend: str) -> None:
    logits, *rest = problem(1, 8500, 130_000)  # 2.2e9 logits, 4.4 GB
    last = logits[-1, -1].clone()
    _, _, _, grad = step(make(backend, inplace_backward=True), logits, *rest)
    assert grad.data_ptr() == logits.data_ptr()
    label = rest[0][-1, -1]
    softmax = last.double().softmax(0)
    scale = grad[-1, -1, label].double() / (1 - softmax[label])
    exact = -scale * softmax
    exact[label] = grad[-1, -1, label].double()
    assert scale.abs() > 0
    assert (grad[-1, -1].double() - exact).abs().max() <= 2**-7 * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_positions_than_a_grid_axis(backend: str) -> None:
    logits, labels, *rest = problem(1, 70_000, 512)
    labels[:, :60_000] = -100
    loss, *_ = step(make(backend), logits, labels, *rest)
    exact, *_ = step(make("reference"), logits[:, 60_000:].double(), labels[:, 60_000:], *rest)
    torch.testing.assert_close(loss.double(), exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_pairs", "length", "vocab"), [(1, 3, 50_257), (2, 20, 50_257), (16, 257, 50_257), (2048, 6, 127)]
)
def test_fifty_runs_are_bitwise_equal(backend: str, num_pairs: int, length: int, vocab: int) -> None:
    """Few rows are split over programs, many are not, short ones end together: a race or an atomic sum of floats
    would show sooner or later."""
    logits, *rest = problem(num_pairs, length, vocab)
    first = step(make(backend), logits, *rest)
    for _ in range(50):
        again = step(make(backend), logits, *rest)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [50_257, 50_280, 128_256])
def test_packed_rows(backend: str, vocab: int) -> None:
    """Sequences of one, two, ... rows one after another are the padded ones without what is ignored."""
    logits, labels, ids, ref = problem(4, 8, vocab)
    lengths = torch.arange(1, 9, device="cuda")
    labels.masked_fill_(torch.arange(8, device="cuda") >= lengths.unsqueeze(1), -100)
    kept = torch.arange(8, device="cuda") < lengths.unsqueeze(1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    *padded, padded_grad = step(make(backend), logits, labels, ids, ref)
    *packed, grad = step(make(backend), logits[kept], labels[kept], ids, ref, ends)
    for got, want in zip(packed, padded, strict=True):
        assert_close(got, want)
    assert_close(grad, padded_grad[kept])
    assert (padded_grad[~kept] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_synchronisation(backend: str) -> None:
    inputs, loss_fn = problem(4, 64, 1000), make(backend)
    step(loss_fn, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(loss_fn, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_launch_each_way(backend: str) -> None:
    inputs, loss_fn = problem(4, 64, 1000), make(backend, inplace_backward=True)
    step(loss_fn, *inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(loss_fn, *inputs)
        torch.cuda.synchronize()
    launches = Counter(event.key for event in profile.events() if "memset" not in event.key.lower())
    ours = {name: count for name, count in launches.items() if "group_robust" in name or "logps" in name}
    assert len(ours) == 2, launches
    assert set(ours.values()) == {1}, launches


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend: str) -> None:
    logits, *rest = problem(4, 64, 1000, torch.float32)
    eager, captured = make(backend), make(backend)
    static = logits.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured, static, *rest)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    captured.group_weights.reset_parameters()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(captured, static, *rest)
    for seed in range(3):
        torch.manual_seed(seed)
        static.normal_()
        expected = step(eager, static, *rest)
        graph.replay()
        for got, want in zip(results, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_streams_at_once(backend: str) -> None:
    inputs = [problem(4, 64, 32_000), problem(4, 64, 32_000)]
    expected = [step(make(backend), *x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    for _ in range(10):
        results = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                results.append(step(make(backend), *x))
        torch.cuda.synchronize()
        for got, want in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])  # the second replays CUDA graphs
def test_compiled_by_inductor(backend: str, mode: str) -> None:
    torch.compiler.reset()
    inputs = problem(4, 64, 1000, torch.float32)
    eager, loss_fn = make(backend), make(backend)
    compiled = torch.compile(loss_fn, fullgraph=True, mode=mode)
    for _ in range(4):
        for got, want in zip(step(compiled, *inputs), step(eager, *inputs), strict=True):
            assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_groups", [1, 4096, 4097, 1_000_000])
def test_many_groups(backend: str, num_groups: int) -> None:
    logits, labels, _, ref = problem(4, 16, 1000, torch.float32)
    ids = torch.tensor([0, num_groups - 1, num_groups // 2, num_groups // 2], device="cuda")
    results = []
    for name in (backend, "torch"):
        weights = gk.GroupWeights(group_sizes=torch.arange(1, num_groups + 1), step_size=0.3, floor=0.1)
        results.append(step(gk.GroupRobustLoss(weights, backend=name).cuda(), logits, labels, ids, ref))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
