"""Activation checkpointing: a forward that runs again moves alpha no second time, or is refused."""

from __future__ import annotations

import pytest
import torch
from loss_cases import ids, inputs, make
from torch.utils.checkpoint import checkpoint

import grpo_kernels as gk


@pytest.mark.parametrize("update", ["inline", "lagged"])
def test_a_recomputed_forward_counts_once(update: str) -> None:
    logits, labels, ref = inputs()
    plain, recomputed = make(update=update), make(update=update)
    loss = plain(logits, labels, ids(), ref_logps=ref).loss
    (grad,) = torch.autograd.grad(loss, logits)
    checkpointed = checkpoint(
        lambda x: recomputed(x * 1.0, labels, ids(), ref_logps=ref).loss, logits, use_reentrant=False
    )
    (again,) = torch.autograd.grad(checkpointed, logits)
    assert torch.equal(again, grad)
    for name, value in plain.group_weights.state_dict().items():
        assert torch.equal(recomputed.group_weights.state_dict()[name], value), name


def test_recomputing_an_older_batch_is_refused() -> None:
    """Its weights would be those of an alpha that has moved on."""
    logits, labels, ref = inputs()
    loss_fn = make()
    first = checkpoint(lambda x: loss_fn(x, labels, ids(), ref_logps=ref).loss, logits, use_reentrant=False)
    loss_fn(logits * 2, labels, ids(), ref_logps=ref)
    with pytest.raises(RuntimeError, match="not the last one that moved alpha"):
        first.backward()


def test_recomputing_is_refused_though_the_losses_are_the_same() -> None:
    """At the start of training the policy is the reference: every pair's loss is log 2, in every batch."""
    logits, labels, _ = inputs()
    loss_fn, batches = make(), (logits, logits.detach().flip(1).requires_grad_())
    losses = []
    for batch_logits in batches:
        ref = gk.sequence_logps(batch_logits, labels).detach()
        losses.append(
            checkpoint(lambda x, r=ref: loss_fn(x, labels, ids(), ref_logps=r).loss, batch_logits, use_reentrant=False)
        )
    with pytest.raises(RuntimeError, match="not the last one that moved alpha"):
        sum(losses).backward()


def test_lagged_checkpointing() -> None:
    """Micro-batches of a step may be run again, in any order; after step(), or uncounted by reentrant ones, no more."""
    logits, labels, ref = inputs()
    plain, loss_fn = make(update="lagged"), make(update="lagged")
    batches = (logits, (logits.detach() * 2).requires_grad_())

    def call(module, x: torch.Tensor) -> torch.Tensor:
        return module(x, labels, ids(), ref_logps=ref, total_pairs=12).loss

    expected = torch.autograd.grad(sum(call(plain, x) for x in batches), batches)
    total = sum(checkpoint(lambda x: call(loss_fn, x), x, use_reentrant=False) for x in batches)
    for got, want in zip(torch.autograd.grad(total, batches), expected, strict=True):
        assert torch.equal(got, want)
    late = checkpoint(lambda x: call(loss_fn, x), logits, use_reentrant=False)
    loss_fn.group_weights.step()
    with pytest.raises(RuntimeError, match="since the last step"):
        late.backward()
    reentrant = checkpoint(lambda x: call(loss_fn, x), logits, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        reentrant.backward()


def test_reentrant_checkpointing_is_refused() -> None:
    logits, labels, ref = inputs()
    loss_fn = make()
    out = checkpoint(lambda x: loss_fn(x, labels, ids(), ref_logps=ref).loss, logits, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.backward()
