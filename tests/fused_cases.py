"""What a backend that fuses the whole loss is compared with: the same loss, computed after the log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import batch

import grpo_kernels as gk
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels.group_robust import COEFFICIENTS, GroupRobustTables, GroupState, SequenceGradients

BUFFERS = ("log_alpha", "group_sizes", "pending_sums", "pending_counts", "skipped_updates")

IDS, SIZES = torch.tensor([1, 0, 2, 1]), [60, 35, 5]
LOSSES = [
    {"loss_type": "sigmoid", "label_smoothing": 0.1},
    {"loss_type": "ipo", "average_log_prob": True},
    {"loss_type": "hinge", "beta": 0.02},
    {"loss_type": "robust", "label_smoothing": 0.2, "shift_labels": True},
]
GROUPS = [{"adjustment": 2.0}, {"floor": 0.2}, {"chi": 0.4}, {"update": "lagged"}, {"step_size": 0.0}]
# Losses and the moves of alpha meet in the group losses alone: every one of each, not every pair of them.
METHODS = [
    pytest.param(loss, {"estimator": estimator, **groups}, id="-".join([loss["loss_type"], estimator, *groups]))
    for estimator in ("importance", "group_mean")
    for loss, groups in [*((loss, {}) for loss in LOSSES), *((LOSSES[0], groups) for groups in GROUPS)]
]


def loss_of(backend: str, loss_options: dict, device: str = "cpu", **group_options) -> gk.GroupRobustLoss:
    weights = gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.3, **group_options})
    return gk.GroupRobustLoss(weights, backend=backend, **loss_options).to(device)


def assert_same_method(
    backend: str,
    loss_options: dict,
    group_options: dict,
    calls: list[tuple[tuple, dict]],
    device: str = "cpu",
    tolerance: float = 1e-11,
) -> None:
    """Fused and unfused give the same outputs, gradients and state in float64, call after call."""
    fused, plain = (loss_of(name, loss_options, device, **group_options) for name in (backend, "torch"))
    for (logits, *rest), options in calls:
        leaves = [logits.detach().to(device).requires_grad_() for _ in range(2)]
        rest = [x if x is None else x.to(device) for x in rest]
        options = {name: x if isinstance(x, float) else x.to(device) for name, x in options.items()}
        results = [m(leaf, *rest, **options) for m, leaf in zip((fused, plain), leaves, strict=True)]
        for name, got, expected in zip(gk.GroupRobustOutput._fields, *results, strict=True):
            assert got.dtype == expected.dtype, name
            torch.testing.assert_close(
                got,
                expected,
                rtol=tolerance,
                atol=tolerance,
                equal_nan=name == "group_means",  # of groups that the batch lacks
                msg=lambda m, n=name: f"{n}: {m}",
            )
        totals = [
            2 * out.loss
            + (out.pair_losses * torch.linspace(1, 2, len(out.pair_losses), device=device)).sum()
            + 3 * out.group_losses.square().sum()
            + out.chosen_logps.sum() * 0.5
            for out in results
        ]
        for wanted in (lambda r, t: -2.5 * r.loss, lambda r, t: t):
            grads = [
                torch.autograd.grad(wanted(r, t), leaf, retain_graph=True)[0]
                for r, t, leaf in zip(results, totals, leaves, strict=True)
            ]
            torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)
        for name, buffer in fused.group_weights.named_buffers():
            expected = dict(plain.group_weights.named_buffers())[name]
            torch.testing.assert_close(
                buffer, expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def two_calls(**options) -> list[tuple[tuple, dict]]:
    calls = []
    for seed in (1, 2):
        logits, labels = batch(num_pairs=4, length=4, vocab=37, seed=seed)
        ref = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        calls.append(((logits, labels, IDS, ref), options))
    return calls


def calls_with_vectors(names: tuple[str, ...] = ("beta", "margin", "weights")) -> list[tuple[tuple, dict]]:
    """A number for each pair."""
    vectors = {
        "beta": torch.tensor([0.1, 0.2, 0.05, 1.0], dtype=torch.float64),
        "margin": torch.tensor([0.0, 1.0, -2.0, 0.5]),
        "weights": torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64),
    }
    return two_calls(**{name: vectors[name] for name in names})


def packed_calls() -> list[tuple[tuple, dict]]:
    """Of sequences that are empty, short and long, over several tiles of the vocabulary."""
    logits, labels = batch(num_pairs=4, length=4, vocab=400)
    ends = torch.tensor([0, 0, 6, 7, 18, 18, 23, 32, 32])
    return 2 * [((logits.detach().flatten(0, 1), labels.flatten(), IDS, torch.zeros(8), ends), {})]


def assert_any_number_of_groups(assert_same: Callable, num_groups: int, estimator: str) -> None:
    sizes = torch.arange(1, num_groups + 1).tolist()
    ids = torch.tensor([0, num_groups - 1, num_groups // 2, num_groups // 2])
    calls = [((x, y, ids, ref), {}) for (x, y, _, ref), _ in two_calls()]
    assert_same({}, {"group_sizes": sizes, "estimator": estimator, "floor": 0.1}, calls)


def assert_rows_of_no_sequence(kernels: Any, splits: int, device: str = "cpu") -> None:
    """``kernels``: a FusedKernelBackend."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 40, generator=generator, dtype=torch.float64)
    logits[7:] = torch.nan
    labels, ids = torch.tensor([3, 39, 0, -100, 7, 1, 8, 3, 3]), torch.tensor([1, 0])

    def run(num_rows: int, ends: list[int]) -> tuple[GroupRobustTables, torch.Tensor]:
        x, y = logits[:num_rows].to(device), labels[:num_rows].to(device)
        weights = gk.GroupWeights(group_sizes=SIZES, step_size=0.3).to(device)
        buffers = (getattr(weights, name) for name in BUFFERS)
        state = GroupState(*buffers, "importance", 0.3, 0.0, 0.0, 1.0, "inline")
        rows, pairs = Rows(y, torch.tensor(ends, device=device)), Pairs(ids.to(device))
        tables = kernels.group_robust_forward(x, rows, pairs, state, splits=splits)
        grad = torch.full_like(x, torch.nan)
        scale = tables.sequences[COEFFICIENTS]
        gradients = SequenceGradients(scale, None, tables.row_sequence)
        kernels.token_logps_backward(gradients, x, y, tables.lse, -100, grad)
        return tables, grad

    expected, expected_grad = run(7, [0, 2, 4, 4, 7])
    got, grad = run(9, [0, 2, 4, 4, 7])
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(grad[:7], expected_grad)
    assert got.row_sequence.tolist() == [0, 0, 1, 1, 3, 3, 3, -1, -1]
    none, grad = run(9, [0, 0, 0, 0, 0])
    assert none.loss.isfinite()
    assert (none.row_sequence == -1).all()
    assert (grad == 0).all()
