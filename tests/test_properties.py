"""Whatever the shapes, strides, dtypes, masks, ids, sizes and options: every backend against the float64 formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import EMPTY_BY_DESIGN, one_rounding
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import grpo_kernels as gk

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def settled(backend: str) -> settings:
    # Triton's interpreter takes a tenth of a second for a launch, too long to look for the smallest failure.
    slow = backend == "triton" and not torch.cuda.is_available()
    return settings(
        max_examples=12 if slow else 100,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate] if slow else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """A batch of pairs, padded or packed, in some layout of memory, and options of the loss that go together."""
    num_pairs, length, vocab = draw(st.integers(1, 4)), draw(st.integers(0, 6)), draw(st.integers(1, 33))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    spread = draw(st.sampled_from([0.0, 1.0, 8.0, 40.0]))
    shape = (2 * num_pairs, length, vocab)
    logits = spread * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    labels = torch.randint(0, vocab, shape[:2], generator=generator, device="cpu")
    labels[torch.rand(shape[:2], generator=generator, device="cpu") < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    num_groups = draw(st.integers(1, 5))
    loss_type = draw(st.sampled_from(["sigmoid", "ipo", "hinge", "robust"]))
    return {
        "logits": logits,
        "labels": labels.to(draw(st.sampled_from([torch.int64, torch.int32]))),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(["contiguous", "sliced", "transposed", "packed"])),
        "group_ids": torch.tensor(
            draw(st.lists(st.integers(0, num_groups - 1), min_size=num_pairs, max_size=num_pairs))
        ),
        "sizes": draw(st.lists(st.integers(1, 10**6), min_size=num_groups, max_size=num_groups)),
        "ref": 10 * torch.randn(2 * num_pairs, generator=generator, dtype=torch.float64, device="cpu"),
        "beta": draw(st.sampled_from([1e-4, 0.1, 1.0, 1e3])),
        "loss_type": loss_type,
        "e": draw(st.sampled_from([0.0, 0.2])) if loss_type in ("sigmoid", "robust") else 0.0,
        "average": draw(st.booleans()),
        "estimator": draw(st.sampled_from(["importance", "group_mean"])),
        "step_size": draw(st.sampled_from([0.0, 1e-3, 0.5])),
    }


def laid_out(problem: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logits that require grad, labels, cu_seqlens) on the default device."""
    device = torch.get_default_device()
    logits, labels = problem["logits"].to(device, problem["dtype"]), problem["labels"].to(device)
    if problem["layout"] == "sliced":
        logits = F.pad(logits, (1, 2))[..., 1 : 1 + logits.shape[-1]]
        labels = F.pad(labels, (0, 3))[:, : labels.shape[1]]
    elif problem["layout"] == "transposed":
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    if problem["layout"] != "packed":
        return logits.detach().requires_grad_(), labels, None
    ends = torch.arange(logits.shape[0] + 1, device=device) * logits.shape[1]
    return logits.flatten(0, 1).detach().requires_grad_(), labels.flatten(), ends


@EMPTY_BY_DESIGN
def test_the_whole_loss(backend: str) -> None:
    @settled(backend)
    @given(problems())
    def check(problem: dict[str, Any]) -> None:
        logits, labels, cu_seqlens = laid_out(problem)
        dtype, num_pairs = problem["dtype"], problem["group_ids"].shape[0]
        weights = gk.GroupWeights(
            group_sizes=problem["sizes"], step_size=problem["step_size"], estimator=problem["estimator"]
        )
        loss_fn = gk.GroupRobustLoss(
            weights.to(logits.device),
            beta=problem["beta"],
            loss_type=problem["loss_type"],
            label_smoothing=problem["e"],
            average_log_prob=problem["average"],
            backend=backend,
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        ref = problem["ref"].to(logits.device, wide)
        out = loss_fn(logits, labels, problem["group_ids"].to(logits.device), ref, cu_seqlens)
        (grad,) = torch.autograd.grad(out.loss, logits)

        shape = problem["logits"].shape
        rounded = logits.detach().cpu().double().view(shape)
        logps, slopes = truth.sequence_terms(rounded, problem["labels"], average=problem["average"])
        ratios = logps - ref.cpu().double()
        h = (ratios[:num_pairs] - ratios[num_pairs:]).tolist()
        uniform = [1 / len(problem["sizes"])] * len(problem["sizes"])
        exact = truth.group_robust(
            h,
            problem["group_ids"].tolist(),
            uniform,
            problem["step_size"],
            problem["sizes"],
            problem["estimator"],
            problem["beta"],
            problem["loss_type"],
            problem["e"],
        )
        # What rounding the log-probabilities to float32 does to a margin, and so to everything after it.
        eps = torch.finfo(wide).eps
        off = 8 * eps * max(1.0, ratios.abs().max().item(), logps.abs().max().item(), ref.abs().max().item())
        steep = max(1.0, problem["beta"]) * (1 / (1 - 2 * problem["e"]))
        for value, low, high in zip(out.pair_losses.tolist(), *bounds(problem, h, off), strict=True):
            slack = 1e-6 * (1 + abs(low) + abs(high)) if wide == torch.float32 else 1e-12 * (1 + abs(low) + abs(high))
            assert low - slack <= value <= high + slack
        moved = problem["step_size"] * max(map(abs, exact["group_losses"]), default=0.0)
        if problem["loss_type"] != "hinge" and moved < 1 and problem["beta"] <= 1:
            expected = torch.tensor(exact["alpha"], dtype=torch.float64)
            torch.testing.assert_close(out.alpha.cpu(), expected, rtol=1e3 * eps * steep, atol=1e-12)
            dh = torch.tensor(exact["dh"], dtype=torch.float64)
            exact_grad = torch.cat([dh, -dh])[:, None, None] * slopes
            error = (grad.detach().cpu().double().view(shape) - exact_grad).abs().max().item() if grad.numel() else 0.0
            largest = exact_grad.abs().max().item() if grad.numel() else 0.0
            # IPO's slope is the margin itself; a float32 of it is off by `off`.
            of_slope = 2 * off * max(map(abs, exact["alpha"])) * largest_factor(problem)
            tiny = torch.finfo(dtype).smallest_normal
            assert error <= 2 * one_rounding(dtype, backend) * largest + 1e3 * eps * largest + of_slope + tiny
        assert bool((grad.view(shape).cpu()[problem["labels"] == -100] == 0).all())
        torch.testing.assert_close(out.alpha.sum().cpu(), torch.tensor(1.0, dtype=torch.float64))

    check()


def bounds(problem: dict[str, Any], h: list[float], off: float) -> tuple[list[float], list[float]]:
    """The pair losses' range where each margin is off by at most ``off``."""
    options = (problem["beta"], problem["loss_type"], problem["e"])
    around = [[truth.pair_loss(x + d, *options)[0] for d in (-off, 0.0, off)] for x in h]
    return [min(values) for values in around], [max(values) for values in around]


def largest_factor(problem: dict[str, Any]) -> float:
    num_pairs = problem["group_ids"].shape[0]
    if problem["estimator"] == "group_mean":
        return 1.0
    return max(sum(problem["sizes"]) / size / num_pairs for size in problem["sizes"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(backend: str, dtype: torch.dtype) -> None:
    """One entry +inf or all -inf are no distribution: NaN. Anything else is exact, however far apart."""
    top = 32768.0  # exact in every dtype
    inf = math.inf
    rows = {
        "all equal": ([3.0] * 5, -math.log(5)),
        "far apart": ([-top, top, -top, -top, -top], 0.0),
        "the label far down": ([top, -top, -top, -top, -top], -2 * top),
        "masked by -inf": ([-inf, 0.0, -inf, 0.0, -inf], -math.log(2)),
        "the label masked": ([0.0, -inf, 0.0, 0.0, 0.0], -inf),
    }
    for name, (row, expected) in rows.items():
        logits = torch.tensor(row, dtype=dtype).view(1, 1, 5).requires_grad_()
        logps = gk.sequence_logps(logits, torch.tensor([[1]]), backend=backend)
        assert logps.item() == pytest.approx(expected, rel=1e-6), name
        (grad,) = torch.autograd.grad(logps.sum(), logits)
        exact = torch.zeros(5, dtype=torch.float64)
        exact[1] = 1
        exact -= torch.tensor(row, dtype=dtype).double().softmax(0)
        torch.testing.assert_close(grad.view(5).double(), exact, rtol=2 * one_rounding(dtype, backend), atol=1e-6)
    for row in ([0.0, inf, 0.0, 0.0, 0.0], [-inf] * 5):
        logps = gk.sequence_logps(torch.tensor(row, dtype=dtype).view(1, 1, 5), torch.tensor([[1]]), backend=backend)
        assert logps.isnan().all()


def test_huge_margins(backend: str) -> None:
    """Log-probabilities 1e4 apart: the loss is linear on one side and 0 on the other, never inf or NaN."""
    logits = torch.zeros(4, 1, 2)
    logits[0, 0, 1] = logits[3, 0, 1] = -1e4  # the label of the first pair's chosen and of the second's rejected
    logits.requires_grad_()
    loss_fn = gk.GroupRobustLoss(
        gk.GroupWeights(group_sizes=[1], step_size=0.1), beta=1.0, reference_free=True, backend=backend
    )
    labels = torch.ones(4, 1, dtype=torch.int64)
    out = loss_fn(logits, labels, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(out.pair_losses.detach(), torch.tensor([1e4 - math.log(2), 0.0]))
    (grad,) = torch.autograd.grad(out.loss, logits)
    torch.testing.assert_close(grad[0, 0], torch.tensor([0.5, -0.5]))
    torch.testing.assert_close(grad[2, 0], torch.tensor([-0.25, 0.25]))
    assert not grad[[1, 3]].any()


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_more_than_2_to_the_31_logits(backend: str, tmp_path: Path) -> None:
    """70,000 positions of a sparse file: only counted rows are read, so only they are ever in memory."""
    if gk.backends()[backend]:
        pytest.skip("; ".join(gk.backends()[backend]))
    length, vocab, counted = 70_000, 32_000, [40_000, 69_999]
    path = tmp_path / "logits"
    with path.open("wb") as file:
        file.truncate(2 * length * vocab)
    logits = torch.from_file(str(path), size=length * vocab, dtype=torch.float16, shared=False).view(1, length, vocab)
    labels = torch.full((1, length), -100)
    for row, label in zip(counted, (7, vocab - 1), strict=True):
        logits[0, row] = torch.randn(vocab)
        labels[0, row] = label
    rows, upstream = logits[0, counted].float().requires_grad_(), torch.tensor([2.0])
    exact = rows.log_softmax(-1)[[0, 1], [7, vocab - 1]].sum(0, keepdim=True)
    logps = gk.sequence_logps(logits.requires_grad_(), labels, backend=backend)
    torch.testing.assert_close(logps, exact)
    if backend == "cpp":  # a gradient of 4.2 GiB; once is enough
        (grad,) = torch.autograd.grad(logps, logits, upstream)
        (expected,) = torch.autograd.grad(exact, rows, upstream)
        torch.testing.assert_close(grad[0, counted].float(), expected, rtol=2**-10, atol=2**-24)
        assert not grad[0, 39_999].any()
        assert not grad[0, 40_001].any()
