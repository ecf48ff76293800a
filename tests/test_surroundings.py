"""In the places where people put a loss: threads, data loaders, copies, transforms, DataParallel."""

from __future__ import annotations

import copy
import importlib
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import batch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import grpo_kernels as gk
from grpo_kernels.groups.sampling import GroupBatchSampler

IDS = torch.tensor([0, 1, 0])


def loss_module(kind: type = gk.GroupRobustLoss, **options: Any) -> Any:
    weights = gk.GroupWeights(group_sizes=[30, 10], step_size=0.3)
    return kind(weights, reference_free=True, **options)


def steps(loss_fn: gk.GroupRobustLoss, seed: int) -> tuple[list[Tensor], Tensor]:
    gradients = []
    for step in range(3):
        logits, labels = batch(seed=10 * seed + step)
        loss_fn(logits, labels, IDS).loss.backward()
        gradients.append(logits.grad)
    return gradients, loss_fn.group_weights.alpha


def test_threads_with_a_loss_each(backend: str) -> None:
    if backend in ("triton", "cuda-simulated") and not torch.cuda.is_available():
        pytest.skip("what stands in for a GPU here keeps its state in one place")
    alone = [steps(loss_module(backend=backend), seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: steps(loss_module(backend=backend), seed), range(4)))
    for (gradients, alpha), (others, other_alpha) in zip(alone, together, strict=True):
        assert torch.equal(alpha, other_alpha)
        assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


@pytest.mark.parametrize("kind", [gk.GroupRobustLoss, gk.LinearGroupRobustLoss])
def test_copies_and_pickles(kind: type) -> None:
    options = {"plan": "keep", "softcap": 3.0} if kind is gk.LinearGroupRobustLoss else {}
    loss_fn = loss_module(kind, beta=0.25, loss_type="ipo", **options)
    loss_fn.group_weights.update(torch.tensor([1.0, 3.0]), torch.tensor([2, 1]))
    for copied in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert repr(copied) == repr(loss_fn)
        assert torch.equal(copied.group_weights.log_alpha, loss_fn.group_weights.log_alpha)
        copied.group_weights.reset_parameters()
        assert not torch.equal(copied.group_weights.log_alpha, loss_fn.group_weights.log_alpha), "they share nothing"


class Pairs(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        import grpo_kernels  # a worker may use it, too

        return index if grpo_kernels.backends()["torch"] == [] else -1


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])  # which imports PyTorch once more each
def test_data_loader_workers(start: str, workers: int) -> None:
    groups = [index % 3 for index in range(12)]
    expected = [GroupBatchSampler(groups, 4, "balanced", seed=3).batch(step) for step in range(3)]
    batches = [GroupBatchSampler(groups, 4, "balanced", seed=3).batch(step) for step in range(3)]
    loader = DataLoader(Pairs(), batch_sampler=batches, num_workers=workers, multiprocessing_context=start)
    assert [batch.tolist() for batch in loader] == expected


def test_data_parallel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    replicate = importlib.import_module("torch.nn.parallel.replicate")  # torch.nn.parallel has a function of this name
    model = torch.nn.Module()
    model.loss = loss_module()
    # Only the copy to a GPU is left out.
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors])
    with pytest.raises(RuntimeError, match="DataParallel must not hold GroupWeights"):
        replicate.replicate(model, [0])


def test_function_transforms(backend: str) -> None:
    """torch.func has plain PyTorch's gradient from the reference; of an opaque operator it says that it has none."""
    logits, labels = batch()
    logits = logits.detach()

    def total(logits: Tensor) -> Tensor:
        return gk.sequence_logps(logits, labels, backend=backend).sum()

    if backend == "reference":
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(total(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(total)(logits), expected)
    else:
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(total)(logits)


def test_functional_call() -> None:
    """A model with the loss inside, its parameters and alpha handed in."""
    logits, labels = batch()
    loss_fn = loss_module()
    state = {"group_weights.log_alpha": torch.tensor([0.9, 0.1], dtype=torch.float64).log()}
    out = torch.func.functional_call(loss_fn.eval(), state, (logits, labels, IDS))
    torch.testing.assert_close(out.alpha, torch.tensor([0.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(loss_fn.group_weights.alpha, torch.tensor([0.5, 0.5], dtype=torch.float64))
