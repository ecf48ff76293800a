"""What test_ptx.py runs, in a process of its own where Triton compiles: both backends' launchers over the interpreter.

Triton's tiles are small here, so that small rows have several, and CUDA's blocks have 64 threads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import truth
from torch import Tensor

from grpo_kernels.kernels.group_robust import COEFFICIENTS, GroupRobustTables
from ptx import cuda_kernels, triton_kernels
from ptx.device import Device

IGNORED = -100
BLOCK, NUM_WARPS, FINISH_BLOCK = 256, 2, 64
SIZES = [60, 35, 5, 20, 80]


def _triton() -> tuple[ModuleType, Callable[[Device], AbstractContextManager]]:
    import grpo_kernels.kernels.triton as backend
    from grpo_kernels.kernels.triton import group_robust, tiles

    tiles.TILES.update({key: tiles.Tile(BLOCK, NUM_WARPS, "for tests") for key in tiles.TILES})
    group_robust.BLOCK_T = group_robust.BLOCK_B = group_robust.BLOCK_K = FINISH_BLOCK
    return backend, triton_kernels.on


def _cuda() -> tuple[ModuleType, Callable[[Device], AbstractContextManager]]:
    from grpo_kernels.kernels import cuda

    return cuda, cuda_kernels.on


BACKENDS = {"triton": _triton, "cuda": _cuda}


@dataclass(frozen=True)
class Rows:
    """Token log-probabilities and their gradient."""

    dtype: torch.dtype = torch.float32
    vocab: int = 300
    splits: int = 1
    stride: int | None = None  # of rows, in elements
    inplace: bool = False
    seed: int = 0

    def logits(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        num_rows, stride = 4, self.stride or self.vocab
        # Nobody may touch what lies before, between and behind the rows.
        flat = torch.full((num_rows * stride + 16,), torch.nan, dtype=self.dtype)
        logits = flat.as_strided((num_rows, self.vocab), (stride, 1))
        logits.copy_(3 * torch.randn(num_rows, self.vocab, generator=generator))
        return logits, torch.tensor([self.vocab - 1, IGNORED, 0, self.vocab // 2])


def run_rows(compiler: str, case: Rows, mutate: Callable[[str, str], str] | None = None) -> None:
    """
    Raises:
        Fault: found by the interpreter. AssertionError: a result is wrong, or was never written.
    """
    backend, on = BACKENDS[compiler]()
    device = Device(case.seed, mutate or (lambda name, text: text))
    logits, labels = case.logits()
    exact, slopes = truth.token_terms(logits, labels)
    upstream = torch.linspace(-1, 2, labels.numel())
    with on(device):
        device.memory.add(logits, "logits")
        device.memory.guard(logits)
        token_logps, lse = device.call(backend.token_logps_forward, logits, labels, IGNORED, splits=case.splits)
        before = logits.clone()
        out = logits if case.inplace else torch.empty_strided(logits.shape, logits.stride(), dtype=case.dtype)
        device.memory.add(out, "out", initialised=False)
        upstream = upstream.to(lse.dtype)
        device.call(backend.token_logps_backward, upstream, logits, labels, lse, IGNORED, out)
    for one in (token_logps, lse, out):
        assert device.memory.is_written(one)
    plain = before.to(lse.dtype).log_softmax(-1)
    picked = torch.where(labels == IGNORED, 0, plain.gather(-1, labels.clamp(min=0)[:, None])[:, 0])
    truth.assert_within_budget(token_logps, exact, picked, "token_logps")
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), case.vocab)
    plain_gradient = (upstream * (labels != IGNORED))[:, None] * (onehot - plain.exp())
    exact_gradient = upstream.double()[:, None] * slopes
    truth.assert_within_budget(out, exact_gradient, plain_gradient.to(case.dtype), "dlogits")


@dataclass(frozen=True)
class Fused:
    """The whole forward, and the gradient from its coefficients."""

    dtype: torch.dtype = torch.float64
    vocab: int = 300
    splits: int = 1
    packed: bool = False
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> tuple[Tensor, Tensor, list[int] | None]:
        """logits, labels, cu_seqlens of 4 sequences; a counted label of each, an ignored one of most."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = (3 * torch.randn(4, 2, self.vocab, generator=generator)).to(self.dtype)
        labels = torch.randint(0, self.vocab, (4, 2), generator=generator)
        labels[0, 1] = labels[3, 0] = IGNORED
        labels[1, 1] = self.vocab - 1
        if not self.packed:
            return logits, labels, None
        return logits.flatten(0, 1), labels.flatten(), [0, 1, 4, 6, 8]


def run_fused(compiler: str, case: Fused, mutate: Callable[[str, str], str] | None = None) -> None:
    """As run_rows."""
    backend, on = BACKENDS[compiler]()
    device = Device(case.seed, mutate or (lambda name, text: text))
    logits, labels, ends = case.inputs()
    ids, ref = torch.tensor([4, 0]), torch.linspace(-9, -8, 4, dtype=torch.float64)
    log_alpha = torch.tensor([0.4, 0.1, 0.1, 0.15, 0.25], dtype=torch.float64).log()
    alpha_before = log_alpha.exp().tolist()
    options = {
        **{"loss_type": "sigmoid", "label_smoothing": 0.1, "average": True, "ignore_index": IGNORED},
        **{"estimator": "importance", "step_size": 0.3, "adjustment": 0.0, "floor": 0.0, "chi": 1.0},
        **{"update": "inline", "splits": case.splits, **case.options},
    }
    state = [torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.int64), torch.zeros((), dtype=torch.int64)]
    tables: GroupRobustTables
    with on(device):
        device.memory.add(logits, "logits")
        tables = device.call(
            backend.group_robust_forward,
            *(logits, labels, None if ends is None else torch.tensor(ends), ref, ids, 0.1, None, None, log_alpha),
            *(torch.tensor(SIZES), *state),
            **options,
        )
        coefficients = tables.sequences[COEFFICIENTS]
        if ends is None:
            scale = coefficients[:, None].expand(labels.shape)
        out = torch.empty_like(logits)
        device.memory.add(out, "out", initialised=False)
        device.call(
            backend.token_logps_backward,
            coefficients if case.packed else scale,
            *(logits, labels, tables.lse, IGNORED, out),
            row_sequence=tables.row_sequence if case.packed else None,
        )
    for one in (*tables, out):
        assert one.numel() == 0 or device.memory.is_written(one)
    if case.options:
        return  # the formulas of truth.py have no such options: what was shown is that nothing was done wrong
    _compare(case, logits, labels, ends, ref, ids.tolist(), alpha_before, log_alpha, tables, out)


def _compare(
    case: Fused,
    logits: Tensor,
    labels: Tensor,
    ends: list[int] | None,
    ref: Tensor,
    ids: list[int],
    alpha: list[float],
    log_alpha: Tensor,
    tables: GroupRobustTables,
    out: Tensor,
) -> None:
    logps, slopes = truth.sequence_terms(logits, labels, ends, average=True)
    ratios = logps - ref
    h = (ratios[:2] - ratios[2:]).tolist()
    exact = truth.group_robust(h, ids, alpha, 0.3, SIZES, "importance", 0.1, "sigmoid", 0.1)
    dh = torch.tensor(exact["dh"], dtype=torch.float64)
    slope_of = torch.cat([dh, -dh])
    if ends is None:
        exact_gradient = slope_of[:, None, None] * slopes
    else:
        lengths = torch.tensor(ends).diff()
        exact_gradient = slope_of.repeat_interleave(lengths)[:, None] * slopes
    # A token's log-probability has the roundings of its largest logit, and of log V; the rest is float64.
    eps = torch.finfo(tables.loss.dtype).eps
    roundings = 16 * eps * (1 + logits.abs().max().item())
    for name, got, wanted in (
        ("loss", tables.loss[None], exact["loss"]),
        ("alpha", log_alpha.exp(), exact["alpha"]),
        ("pair_losses", tables.pairs[0], exact["pair_losses"]),
        ("group losses", tables.groups[1], exact["group_losses"]),
        ("sequence log-probabilities", tables.sequences[0], logps.tolist()),
    ):
        error = (got.double() - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()
        assert error <= roundings * max(1.0, *map(abs, wanted)), f"{name}: error {error}"
    error = (out.double() - exact_gradient).abs().max().item()
    largest = exact_gradient.abs().max().item()
    assert error <= (torch.finfo(case.dtype).eps + 2 * roundings) * largest, f"dlogits: error {error} of {largest}"
