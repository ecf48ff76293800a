"""What test_ptx.py runs, in a process of its own where Triton compiles: both backends' launchers over the interpreter.

Triton's tiles are small here, so that small rows have several, and CUDA's blocks have 64 threads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType

import torch
import truth
from torch import Tensor

from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels.group_robust import (
    COEFFICIENTS,
    GROUP_LOSSES,
    LOGPS,
    PAIR_LOSSES,
    GroupRobustTables,
    GroupState,
    SequenceGradients,
)
from ptx import cuda_kernels, triton_kernels
from ptx.device import Device

IGNORED = -100
BLOCK, NUM_WARPS, FINISH_BLOCK = 512, 2, 64  # 16 bytes a thread of bfloat16
SIZES, ALPHA = [60, 35, 5, 20, 80], [0.4, 0.1, 0.1, 0.15, 0.25]
STEP = ("importance", 0.3, 0.0, 0.0, 1.0, "inline")  # estimator, step_size, adjustment, floor, chi, update
Mutate = Callable[[str, str], str]


def unchanged(name: str, text: str) -> str:
    return text


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
class Tokens:
    """Token log-probabilities and their gradient."""

    dtype: torch.dtype = torch.float32
    vocab: int = 300
    splits: int = 1
    stride: int | None = None  # of rows, in elements
    far: str | None = None  # "rows" or "columns" that are so far apart that the last is beyond 2**32 elements
    inplace: bool = False
    seed: int = 0

    def logits(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        num_rows, stride = 4, self.stride or self.vocab
        labels = torch.tensor([self.vocab - 1, IGNORED, 0, self.vocab // 2])
        if self.far is not None:
            apart = 2**32 // ((num_rows if self.far == "rows" else self.vocab) - 1) + 3
            strides = (apart, 1) if self.far == "rows" else (1, apart)
            logits = torch.empty(2**32 + 2**12, dtype=self.dtype).as_strided((num_rows, self.vocab), strides)
            return logits.copy_(3 * torch.randn(num_rows, self.vocab, generator=generator)), labels
        # Nobody may touch what lies before, between and behind the rows.
        flat = torch.full((num_rows * stride + 16,), torch.nan, dtype=self.dtype)
        logits = flat.as_strided((num_rows, self.vocab), (stride, 1))
        logits.copy_(3 * torch.randn(num_rows, self.vocab, generator=generator))
        return logits, labels


def run_tokens(compiler: str, case: Tokens, mutate: Mutate | None = None) -> None:
    """
    Raises:
        Fault: found by the interpreter. AssertionError: a result is wrong, or was never written.
    """
    backend, on = BACKENDS[compiler]()
    device = Device(case.seed, mutate or unchanged)
    logits, labels = case.logits()
    exact, slopes = truth.token_terms(logits, labels)
    upstream = torch.linspace(-1, 2, labels.numel())
    with on(device):
        if case.far is None:
            device.memory.add(logits, "logits")
            device.memory.guard(logits)
        else:
            device.memory.add_pieces(logits, "logits")
        token_logps, lse = device.call(backend.token_logps_forward, logits, labels, IGNORED, splits=case.splits)
        before = logits.clone()
        out = logits if case.inplace else torch.empty_strided(logits.shape, logits.stride(), dtype=case.dtype)
        device.memory.add(out, "out", initialised=False)
        upstream = upstream.to(lse.dtype)
        device.call(backend.token_logps_backward, upstream, logits, labels, lse, IGNORED, out)
    for one in (token_logps, lse) if case.inplace else (token_logps, lse, out):
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
    every_option: bool = False  # more than the formulas of truth.py have: only checked for what it must not do
    seed: int = 0

    def inputs(self) -> tuple[Tensor, Rows, Pairs, GroupState]:
        """4 sequences, a counted label of each, an ignored one of most; 2 pairs of 5 groups."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = (3 * torch.randn(4, 2, self.vocab, generator=generator)).to(self.dtype)
        labels = torch.randint(0, self.vocab, (4, 2), generator=generator)
        labels[0, 1] = labels[3, 0] = IGNORED
        labels[1, 1] = self.vocab - 1
        ends = torch.tensor([0, 1, 4, 6, 8]) if self.packed else None
        if self.packed:
            logits, labels = logits.flatten(0, 1), labels.flatten()
        ref_logps = torch.linspace(-9, -8, 4, dtype=torch.float64)
        given = {"margin": torch.ones(2), "weights": torch.ones(2)} if self.every_option else {}
        pairs = Pairs(torch.tensor([4, 0]), ref_logps, beta=0.1, label_smoothing=0.1, **given)
        update = ("group_mean", 0.3, 1.0, 0.1, 0.5, "lagged") if self.every_option else STEP
        state = (
            torch.zeros(5, dtype=torch.float64),
            torch.zeros(5, dtype=torch.int64),
            torch.zeros((), dtype=torch.int64),
        )
        groups = GroupState(torch.tensor(ALPHA, dtype=torch.float64).log(), torch.tensor(SIZES), *state, *update)
        return logits, Rows(labels, ends, ignore_index=IGNORED, average=True), pairs, groups


def run_fused(compiler: str, case: Fused, mutate: Mutate | None = None) -> None:
    """As run_tokens."""
    backend, on = BACKENDS[compiler]()
    device = Device(case.seed, mutate or unchanged)
    logits, rows, pairs, groups = case.inputs()
    with on(device):
        tables = device.call(backend.group_robust_forward, logits, rows, pairs, groups, splits=case.splits)
        scale = tables.sequences[COEFFICIENTS]
        gradients = SequenceGradients(scale, None, tables.row_sequence)
        if not case.packed:
            gradients = SequenceGradients(scale[:, None].expand(rows.labels.shape))
        out = torch.empty_like(logits)
        device.memory.add(out, "out", initialised=False)
        device.call(
            backend.token_logps_backward,
            gradients,
            *(logits, rows.labels, tables.lse, IGNORED, out),
        )
    for one in (*tables, out):
        assert one.numel() == 0 or device.memory.is_written(one)
    if not case.every_option:
        _compare(case, logits, rows, pairs, groups, tables, out)


def _compare(
    case: Fused, logits: Tensor, rows: Rows, pairs: Pairs, groups: GroupState, tables: GroupRobustTables, out: Tensor
) -> None:
    ends = None if rows.cu_seqlens is None else rows.cu_seqlens.tolist()
    logps, slopes = truth.sequence_terms(logits, rows.labels, ends, average=True)
    ratios = logps - pairs.ref_logps
    exact = truth.group_robust(
        (ratios[:2] - ratios[2:]).tolist(), pairs.group_ids.tolist(), ALPHA, groups.step_size, SIZES,
        beta=pairs.beta, label_smoothing=pairs.label_smoothing,
    )  # fmt: skip
    dh = torch.tensor(exact["dh"], dtype=torch.float64)
    lengths = torch.tensor([0, 2, 4, 6, 8] if ends is None else ends).diff()
    slope_of_row = torch.cat([dh, -dh]).repeat_interleave(lengths)
    exact_gradient = (slope_of_row[:, None] * slopes.reshape(8, -1)).reshape(logits.shape)
    # A token's log-probability has the roundings of its largest logit, and of log V; the rest is float64.
    roundings = 16 * torch.finfo(tables.loss.dtype).eps * (1 + logits.abs().max().item())
    for name, got, wanted in (
        ("loss", tables.loss[None], exact["loss"]),
        ("alpha", groups.log_alpha.exp(), exact["alpha"]),
        ("pair_losses", tables.pairs[PAIR_LOSSES], exact["pair_losses"]),
        ("group losses", tables.groups[GROUP_LOSSES], exact["group_losses"]),
        ("sequence log-probabilities", tables.sequences[LOGPS], logps.tolist()),
    ):
        error = (got.double() - torch.tensor(wanted, dtype=torch.float64)).abs().max().item()
        assert error <= roundings * max(1.0, *map(abs, wanted)), f"{name}: error {error}"
    error = (out.double() - exact_gradient).abs().max().item()
    largest = exact_gradient.abs().max().item()
    assert error <= (torch.finfo(case.dtype).eps + 2 * roundings) * largest, f"dlogits: error {error} of {largest}"
