"""The loss of docs/trl.md for NeMo-RL, in a stand-in for the worker that calls it."""

from __future__ import annotations

import enum
import pickle
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_docs import run
from torch import Tensor, nn

import grpo_kernels as gk

SIZES, BETA, RATE, WIDTH = [6, 3], 0.05, 4.0, 5
PLACE = "docs_trl"  # of the page's names, where pickle finds them
LossType = enum.Enum("LossType", {"SEQUENCE_LEVEL": "sequence_level"})
LossInputType = enum.Enum("LossInputType", {"LOGPROB": "logprob"})


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    optimizers = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizers, "_global_optimizer_pre_hooks", optimizers._global_optimizer_pre_hooks.copy())
    interfaces = types.ModuleType("nemo_rl.algorithms.loss.interfaces")
    interfaces.LossType, interfaces.LossInputType = LossType, LossInputType  # type: ignore[attr-defined]
    for name in ("nemo_rl", "nemo_rl.algorithms", "nemo_rl.algorithms.loss"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interfaces.__name__, interfaces)
    module = types.ModuleType(PLACE)
    module.__dict__.update(run("trl.md"))
    for name in ("GroupRobustDPOLossFn", "of_this_process"):
        getattr(module, name).__module__ = PLACE
    monkeypatch.setitem(sys.modules, PLACE, module)
    return module


class LikeNeMoRL:
    """Its loss protocol: nemo_rl/algorithms/loss/interfaces.py, LossFunction, and loss_functions.py, DPOLossFn (NeMo-RL
    0.5, commit 002cdc2); and who calls it, models/policy/workers/dtensor_policy_worker.py: train."""

    def __init__(self) -> None:
        self.table = nn.Parameter(-torch.rand(8, WIDTH - 1, dtype=torch.float64))  # next_token_logprobs
        self.optimizer = torch.optim.SGD([self.table], lr=RATE)

    def train(self, data: dict[str, Tensor], loss_fn: Any, eval_mode: bool, mbs: int, dp_size: int = 1) -> float:
        loss_fn = pickle.loads(pickle.dumps(loss_fn))  # as Ray hands it over
        assert (loss_fn.loss_type, loss_fn.input_type) == (LossType.SEQUENCE_LEVEL, LossInputType.LOGPROB)
        valid = data["sample_mask"].sum()
        tokens = (data["token_mask"][:, 1:] * data["sample_mask"][:, None]).sum()
        losses = []
        with torch.set_grad_enabled(not eval_mode):
            for rows in torch.arange(len(self.table)).split(mbs):
                loss, metrics = loss_fn(
                    next_token_logprobs=self.table[rows],
                    data={name: x[rows] for name, x in data.items()},
                    global_valid_seqs=valid,
                    global_valid_toks=tokens,
                )
                assert metrics["num_valid_samples"] == data["sample_mask"][rows].sum() / 2
                assert metrics["loss"] == loss.item()
                losses.append(loss.item())
                if not eval_mode:
                    loss *= dp_size  # in place, as it is there
                    loss.backward()
        if not eval_mode:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return sum(losses)


def batch(seed: int) -> dict[str, Tensor]:
    """Four pairs, interleaved; the third fills up."""
    generator = torch.Generator().manual_seed(seed)
    token_mask = torch.randint(0, 2, (8, WIDTH), generator=generator)
    return {
        "token_mask": token_mask,
        "sample_mask": torch.tensor([1.0, 1, 1, 1, 0, 0, 1, 1]),
        "reference_policy_logprobs": -torch.rand(8, WIDTH, generator=generator, dtype=torch.float64),
        "group_ids": torch.tensor([0, 1, 0, 1]).repeat_interleave(2),
    }


def by_hand(table: Tensor, data: dict[str, Tensor], weights: gk.GroupWeights) -> tuple[Tensor, Tensor]:
    """(the step's loss, their own DPO loss)."""
    ratios = ((table - data["reference_policy_logprobs"][:, :-1]) * data["token_mask"][:, 1:]).sum(-1)
    losses = -F.logsigmoid(BETA * (ratios[::2] - ratios[1::2]))[[0, 1, 3]]
    ids = data["group_ids"][::2][[0, 1, 3]]
    plain = losses.sum() / (data["sample_mask"].sum() / 2)
    loss = gk.GroupRobustLoss(weights).from_pair_losses(losses, ids).loss
    return loss, plain


def test_micro_batches_of_nemo_rl_are_one_step(page: Any) -> None:
    worker, loss_fn = LikeNeMoRL(), page.of_this_process()
    groups = loss_fn.loss_fn.group_weights
    whole = gk.GroupWeights(group_sizes=SIZES, step_size=0.02, update="lagged")
    expected = worker.table.detach().clone().requires_grad_()
    for step in range(3):
        data = batch(step)
        loss, _ = by_hand(expected, data, whole)
        assert worker.train(data, loss_fn, eval_mode=True, mbs=4) == pytest.approx(loss.item(), rel=1e-12)
        assert worker.train(data, loss_fn, eval_mode=False, mbs=4) == pytest.approx(loss.item(), rel=1e-12)
        (grad,) = torch.autograd.grad(loss, expected)
        expected = (expected - RATE * grad).detach().requires_grad_()
        whole.step()
        torch.testing.assert_close(worker.table.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(groups.log_alpha, whole.log_alpha, rtol=1e-12, atol=1e-12)
    assert not torch.equal(groups.alpha, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_one_group_is_nemo_rl_s_own_loss(page: Any) -> None:
    worker, data, loss_fn = LikeNeMoRL(), batch(0), page.of_this_process()
    data["group_ids"].zero_()
    loss_fn.loss_fn.group_weights = one = gk.GroupWeights(group_sizes=[9], step_size=0.02, update="lagged")
    _, plain = by_hand(worker.table, data, one)
    assert worker.train(data, loss_fn, eval_mode=True, mbs=2) == pytest.approx(plain.item(), rel=1e-12)
