"""Cases of ranks that share a sequence: its vocabulary or its positions are sharded. Run by test_ranks.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import (
    EXACT,
    alone,
    assert_equal_on_all_ranks,
    backends,
    case,
    pairs,
    part,
    rank_and_world,
    weights,
)

import grpo_kernels as gk


def vocab_shard(vocab: int, **options) -> gk.VocabShard:
    """Uneven parts: the first rank has one column."""
    rank, world = rank_and_world()
    ends = [0, *[1 + (vocab - 1) * r // (world - 1) if world > 1 else vocab for r in range(world)]]
    return gk.VocabShard(ends[rank], ends[rank + 1], dist.group.WORLD, **options)


@case
def vocabulary_sharded_logits() -> None:
    vocab = 11
    shard = vocab_shard(vocab)
    columns = slice(shard.start, shard.stop)
    batch = pairs(3, vocab=vocab)
    logits, labels, *_ = part(batch, slice(None))
    labels[2] = -100
    labels[0, 1], labels[0, 2] = 0, vocab - 1
    # All that the first rank has is masked, and all that the others have.
    logits[4, :, 0], labels[4] = -torch.inf, labels[4].clamp(min=1)
    logits[5, :, 1:], labels[5] = -torch.inf, 0
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    for offset, tolerance in ((0.0, EXACT), (1e4, {"rtol": 1e-9, "atol": 1e-9})):
        whole = (logits.detach() + offset).requires_grad_()
        expected = gk.sequence_logps(whole, labels, backend="torch")
        (expected_grad,) = torch.autograd.grad(expected, whole, upstream)
        for backend in backends():
            for inplace in (False, True) if offset == 0 else (False,):
                local = whole.detach()[..., columns].clone().requires_grad_()
                options = {"vocab_shard": shard, "backend": backend, "inplace_backward": inplace}
                got = gk.sequence_logps(local, labels, **options)
                (grad,) = torch.autograd.grad(got, local, upstream)
                torch.testing.assert_close(got, expected, **tolerance)
                torch.testing.assert_close(grad, expected_grad[..., columns], **tolerance)
                assert (grad.data_ptr() == local.data_ptr()) == inplace
                assert_equal_on_all_ranks(got.detach())
    for backend in backends():
        local = logits.detach()[..., columns]
        bad = labels.clone()
        bad[1, 1] = vocab
        logps = gk.sequence_logps(local, bad, vocab_shard=shard, backend=backend)
        assert logps.isnan().tolist() == [False, True, False, False, False, False]


@case
def vocabulary_sharded_bfloat16() -> None:
    """One rounding of the exact gradient, as the whole row would have; and packed rows."""
    shard = vocab_shard(11)
    columns = slice(shard.start, shard.stop)
    logits, labels, *_ = part(pairs(3), slice(None))
    logits = logits.bfloat16()
    whole = logits.double().requires_grad_()
    exact = gk.sequence_logps(whole, labels, backend="torch")
    (exact_grad,) = torch.autograd.grad(exact.sum(), whole)
    for backend in backends():
        local = logits[..., columns].flatten(0, 1).requires_grad_()
        got = gk.sequence_logps(
            local, labels.flatten(), cu_seqlens=torch.arange(0, 25, 4), vocab_shard=shard, backend=backend
        )
        (grad,) = torch.autograd.grad(got.sum(), local)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact.detach(), rtol=1e-6, atol=1e-5)
        error = (grad.double() - exact_grad[..., columns].flatten(0, 1)).abs().max()
        assert error <= 2**-7 * exact_grad.abs().max()


@case
def vocabulary_sharded_weight() -> None:
    rank, world = rank_and_world()
    torch.manual_seed(3)
    length, vocab = 4 * world, 11
    _, labels, *_ = part(pairs(3, length=length, vocab=vocab), slice(None))
    hidden = torch.randn(6, length, 5, dtype=torch.float64).requires_grad_()
    weight = torch.randn(vocab, 5, dtype=torch.float64).requires_grad_()
    bias = torch.randn(vocab, dtype=torch.float64).requires_grad_()
    upstream = torch.linspace(-1, 2, 6, dtype=torch.float64)
    head = {"logit_scale": 0.5, "softcap": 3.0}
    expected = gk.linear_sequence_logps(hidden, weight, labels, bias=bias, backend="torch", **head)
    wanted = torch.autograd.grad(expected, (hidden, weight, bias), upstream)
    for backend in backends():
        for sequence_parallel in (False, True):
            shard = vocab_shard(vocab, sequence_parallel=sequence_parallel)
            rows = slice(shard.start, shard.stop)
            positions = slice(4 * rank, 4 * rank + 4) if sequence_parallel else slice(None)
            local = [hidden.detach()[:, positions], weight.detach()[rows], bias.detach()[rows]]
            local = [x.clone().requires_grad_() for x in local]
            head_of_rank = {**head, "bias": local[2], "vocab_shard": shard}
            got = gk.linear_sequence_logps(*local[:2], labels, backend=backend, **head_of_rank)
            grads = torch.autograd.grad(got, local, upstream)
            torch.testing.assert_close(got, expected, **EXACT)
            for grad, want in zip(grads, (wanted[0][:, positions], wanted[1][rows], wanted[2][rows]), strict=True):
                torch.testing.assert_close(grad, want, **EXACT)


@case
def dtensors_say_how_they_are_sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    _, world = rank_and_world()
    mesh = init_device_mesh("cpu", (world,))
    batch = pairs(3, length=4 * world)
    logits, labels, ids, ref = part(batch, slice(None))
    whole = logits.requires_grad_()
    group = alone()
    expected = gk.GroupRobustLoss(weights(group), backend="torch")(whole, labels, ids, ref)
    (expected_grad,) = torch.autograd.grad(expected.loss, whole)
    sharded = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
    out = gk.GroupRobustLoss(weights(group))(sharded, labels, ids, ref)
    (grad,) = torch.autograd.grad(out.loss, sharded)
    torch.testing.assert_close(out.loss, expected.loss, **EXACT)
    assert isinstance(grad, DTensor)
    torch.testing.assert_close(grad.full_tensor(), expected_grad, **EXACT)
    torch.manual_seed(0)
    hidden = torch.randn(6, 4 * world, 5, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 5, dtype=torch.float64).requires_grad_()
    expected_logps = gk.linear_sequence_logps(hidden, weight, labels, backend="torch")
    wanted = torch.autograd.grad(expected_logps.sum(), (hidden, weight))
    head = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    for placement in (Replicate(), Shard(1)):
        states = distribute_tensor(hidden.detach(), mesh, [placement]).requires_grad_()
        logps = gk.linear_sequence_logps(states, head, labels)
        torch.testing.assert_close(logps, expected_logps, **EXACT)
        for grad, want in zip(torch.autograd.grad(logps.sum(), (states, head)), wanted, strict=True):
            torch.testing.assert_close(grad.full_tensor(), want, **EXACT)
    with pytest.raises(ValueError, match=r"register_fsdp_forward_method, or between head.unshard\(\)"):
        gk.linear_sequence_logps(hidden, head, labels)


@case
def context_parallel() -> None:
    """Contiguous and head-tail layouts, alone and inside the loss with data-parallel size 1."""
    rank, world = rank_and_world()
    group = alone()
    length = 2 * world
    batch = pairs(3, length=length)
    logits, labels, ids, ref = part(batch, slice(None))
    chunks = torch.arange(length).chunk(2 * world)
    layouts = {
        "contiguous": torch.arange(length).chunk(world)[rank],
        "head-tail": torch.cat([chunks[rank], chunks[2 * world - 1 - rank]]),
    }
    whole = logits.requires_grad_()
    for average in (False, True):
        expected_loss = gk.GroupRobustLoss(weights(group), average_log_prob=average, backend="torch")
        expected = expected_loss(whole, labels, ids, ref)
        (expected_grad,) = torch.autograd.grad(expected.loss, whole, retain_graph=True)
        for mine in layouts.values():
            for backend, reduction in [*((name, "mean") for name in backends()), ("torch", "sum")]:
                local = logits.detach()[:, mine].clone().requires_grad_()
                loss_fn = gk.GroupRobustLoss(
                    weights(group, gradient_reduction=reduction),
                    average_log_prob=average,
                    context_group=dist.group.WORLD,
                    backend=backend,
                )
                out = loss_fn(local, labels[:, mine], ids, ref)
                (grad,) = torch.autograd.grad(out.loss, local)
                torch.testing.assert_close(out.loss, expected.loss, **EXACT)
                torch.testing.assert_close(out.alpha, expected.alpha, **EXACT)
                # An engine that averages over the context ranks, too, divides by their number.
                scale = world if reduction == "mean" else 1
                torch.testing.assert_close(grad / scale, expected_grad[:, mine], **EXACT)
