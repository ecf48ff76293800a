"""Cases at the edges: ragged windows, ranks at different steps, DTensors of all kinds. Run by test_ranks.py."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from cases import (
    EXACT,
    Model,
    alone,
    assert_equal_on_all_ranks,
    backends,
    case,
    case_of_two_ranks,
    pairs,
    part,
    rank_and_world,
    shares,
    tokens_of,
    weights,
)
from torch import Tensor, nn

import grpo_kernels as gk


def summed(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


@case
def ragged_windows_communicate_in_step_only() -> None:
    """Rank r has r forwards: outputs add up to the whole step's, and nobody waits for another before step()."""
    rank, world = rank_and_world()
    group = alone()
    num_pairs = 2 * world
    batch = pairs(num_pairs)
    whole = gk.GroupRobustLoss(weights(group, update="lagged"), backend="torch")
    logits, *rest = part(batch, slice(None))
    expected = whole(logits.requires_grad_(), *rest)
    (expected_grad,) = torch.autograd.grad(expected.loss, logits)
    whole.group_weights.step()
    owner = torch.arange(num_pairs) % world
    for backend in backends():
        ours = gk.GroupRobustLoss(weights(None, update="lagged"), backend=backend)
        loss = torch.zeros((), dtype=torch.float64)
        group_losses, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        all_reduce, dist.all_reduce = dist.all_reduce, None  # a forward that communicates fails
        try:
            for which in (owner == rank).nonzero().flatten().chunk(max(1, rank)) if rank else []:
                local, *rest = part(batch, which)
                out = ours(local.requires_grad_(), *rest, total_pairs=num_pairs)
                (grad,) = torch.autograd.grad(out.loss, local)
                pieces = expected_grad.unflatten(0, (2, num_pairs))[:, which].flatten(0, 1)
                torch.testing.assert_close(grad / world, pieces, **EXACT)
                loss, counts = loss + out.loss.detach(), counts + out.group_counts
                group_losses = group_losses + out.group_losses.detach()
            if rank == 0:  # has all of its pairs in one forward
                local, *rest = part(batch, owner == 0)
                out = ours(local.requires_grad_(), *rest, total_pairs=num_pairs)
                loss, group_losses, counts = out.loss, out.group_losses, out.group_counts
        finally:
            dist.all_reduce = all_reduce
        assert torch.equal(out.alpha, expected.alpha)
        torch.testing.assert_close(summed(loss), expected.loss.detach(), **EXACT)
        torch.testing.assert_close(summed(group_losses), expected.group_losses.detach(), **EXACT)
        assert torch.equal(summed(counts), expected.group_counts)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.group_weights.step()
        torch.testing.assert_close(ours.group_weights.log_alpha, whole.group_weights.log_alpha, **EXACT)
        assert_equal_on_all_ranks(ours.group_weights.log_alpha)


@case
def a_wrong_total_is_warned_of_on_every_rank() -> None:
    rank, world = rank_and_world()
    ours = gk.GroupRobustLoss(weights(None, update="lagged"), backend="torch")
    logits, *rest = part(pairs(4), shares(4, world)[rank])
    ours(logits.requires_grad_(), *rest, total_pairs=5)
    with pytest.warns(RuntimeWarning, match="total_pairs=5 in a step of 4 pairs"):
        ours.group_weights.step()


@case
def ranks_at_different_steps_get_an_error() -> None:
    rank, world = rank_and_world()
    if world == 1:
        return
    inputs = part(pairs(2), slice(None))
    for backend in backends():
        ours = gk.GroupRobustLoss(weights(None), backend=backend)
        ours(*inputs)
        if rank == world - 1:  # as after a checkpoint that this rank alone has loaded
            ours.group_weights.update(torch.ones(3), torch.ones(3, dtype=torch.int64), sum_over_ranks=False)
        with pytest.raises(RuntimeError, match=f"got rank 0 after 1 updates, .*; rank {world - 1} after 2 updates"):
            ours(*inputs)
        lagged = gk.GroupRobustLoss(weights(None, update="lagged"), backend=backend)
        lagged(*inputs)
        with pytest.raises(
            RuntimeError, match=r"rank 0 after 0 updates, in step\(\); rank 1 after 0 updates, in forward 2"
        ):
            lagged.group_weights.step() if rank == 0 else lagged(*inputs)


@case
def ranks_of_other_groups_or_options_get_an_error() -> None:
    rank, world = rank_and_world()
    if world == 1:
        return
    others = (
        ({"group_sizes": [5, 3, 1]}, {"group_sizes": [5, 3]}, r"num_groups=3 group_sizes=\[5, 3, 1\] on rank 0"),
        ({"group_sizes": [5, 3, 1]}, {"group_sizes": [5, 2, 1]}, r"\[5, 3, 1\] on rank 0 and group_sizes=\[5, 2, 1\]"),
        ({"num_groups": 3, "baseline": [0.1] * 3}, {"num_groups": 3}, r"got baseline=\[0.1, 0.1, 0.1\] on rank 0 and"),
    )
    for first, last, message in others:
        options = {"estimator": "group_mean"} if "num_groups" in first else {}
        groups = gk.GroupWeights(step_size=0.1, **options, **(last if rank == world - 1 else first))
        loss_fn = gk.GroupRobustLoss(groups, reference_free=True)
        logits, labels = torch.randn(2, 3, 7, requires_grad=True), torch.ones(2, 3, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=message):
            loss_fn(logits, labels, torch.tensor([0]))
    lagged = gk.GroupWeights(group_sizes=[5, 3], step_size=0.1 * (1 + rank), update="lagged")
    with pytest.raises(RuntimeError, match=r"step_size=0\.1 on rank 0 and step_size=0\.2 on rank 1"):
        lagged.step()


@case
def statistics_by_hand_are_summed_or_say_that_they_are_not() -> None:
    rank, world = rank_and_world()
    sums, counts = torch.tensor([1.0 + rank, 2.0, 0.5]), torch.tensor([2, 1, 1])
    everyones = torch.tensor([sum(1.0 + r for r in range(world)), 2.0 * world, 0.5 * world])
    whole = weights(alone())
    whole.update(everyones, world * counts)
    by_step, by_update, local = weights(None, update="lagged"), weights(None), weights(None)
    by_step.accumulate(sums, counts)
    by_step.step()
    by_update.update(sums, counts, sum_over_ranks=True)
    again = weights(None, update="lagged")
    again.accumulate(everyones, world * counts, sum_over_ranks=False)
    again.step()
    for ours in (by_step, by_update, again):
        torch.testing.assert_close(ours.log_alpha, whole.log_alpha, **EXACT)
        assert_equal_on_all_ranks(ours.log_alpha)
    if world > 1:
        with pytest.warns(RuntimeWarning, match=f"of this rank alone.*over {world} ranks pass sum_over_ranks=True"):
            local.update(sums, counts)


@case
def a_checkpoint_before_step_says_what_it_lacks() -> None:
    rank, world = rank_and_world()
    ours = gk.GroupRobustLoss(weights(None, update="lagged"), backend="torch")
    logits, *rest = part(pairs(4), shares(4, world)[rank])
    ours(logits.requires_grad_(), *rest, total_pairs=4)
    mine = logits.shape[0] // 2
    if world == 1:
        state = ours.group_weights.state_dict()
        other = weights(None, update="lagged")
        other.load_state_dict(state)
        other.step()
        ours.group_weights.step()
        assert torch.equal(other.log_alpha, ours.group_weights.log_alpha)
        return
    if mine:
        with pytest.warns(RuntimeWarning, match=f"the {mine} pairs that only this rank has"):
            ours.group_weights.state_dict()
    ours.group_weights.step()


@case
def total_pairs_needs_a_group_without_ranks_that_share_pairs() -> None:
    rank, world = rank_and_world()
    group = alone()
    if world == 1:
        return
    logits, labels, ids, ref = part(pairs(3, length=4 * world), slice(None))
    columns = slice(*(torch.arange(12).tensor_split(world)[rank][[0, -1]] + torch.tensor([0, 1])).tolist())
    logits = nn.functional.pad(logits, (0, 1))
    mine = torch.arange(4 * world).chunk(world)[rank]
    shard = gk.VocabShard(columns.start, columns.stop, dist.group.WORLD)
    for options, x, y in (
        ({"vocab_shard": shard}, logits[..., columns], labels),
        ({"context_group": dist.group.WORLD}, logits[:, mine], labels[:, mine]),
    ):
        for process_group in (None, dist.group.WORLD):
            with pytest.raises(ValueError, match="process_group must be given"):
                gk.GroupRobustLoss(weights(process_group, update="lagged"), **options)(x, y, ids, ref, total_pairs=3)
        gk.GroupRobustLoss(weights(group, update="lagged"), **options)(x, y, ids, ref, total_pairs=3)
        gk.GroupRobustLoss(weights(None, update="lagged"), **options)(x, y, ids, ref)  # exact without it


@case
def batch_tensors_may_be_replicated_dtensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    _, world = rank_and_world()
    mesh = init_device_mesh("cpu", (world,))
    group = alone()
    logits, labels, ids, ref = part(pairs(4, length=4, vocab=12), slice(None))
    named = {"labels": labels, "group_ids": ids, "ref_logps": ref, "beta": torch.full((4,), 0.2).double()}
    named |= {"margin": torch.ones(4).double(), "weights": torch.linspace(0.5, 1, 4).double()}
    torch.manual_seed(1)
    hidden, weight = torch.randn(8, 4, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    for backend in backends():
        loss_fn = gk.GroupRobustLoss(weights(group), backend=backend)
        linear = gk.LinearGroupRobustLoss(weights(group), backend=backend)
        sharded = distribute_tensor(logits, mesh, [Shard(2)])
        start = {name: value.clone() for name, value in loss_fn.group_weights.state_dict().items()}
        for of_loss, *rows in ((loss_fn, logits), (loss_fn, sharded), (linear, hidden, weight)):
            results = []
            for tensors in (named, {name: distribute_tensor(x, mesh) for name, x in named.items()}):
                of_loss.group_weights.load_state_dict(start)
                results.append(of_loss(*rows, **tensors))
            assert torch.equal(results[0].loss, results[1].loss)
            for name, x in named.items():
                with pytest.raises(ValueError, match=f"{name} must be a plain tensor, or a DTensor that is replicated"):
                    of_loss(*rows, **{**named, name: distribute_tensor(x, mesh, [Shard(0)])})
    packed = {"labels": labels.flatten(), "cu_seqlens": distribute_tensor(torch.arange(0, 33, 4), mesh)}
    assert torch.equal(gk.sequence_logps(logits.flatten(0, 1), **packed), gk.sequence_logps(logits, labels))
    assert torch.equal(gk.token_logps(logits, distribute_tensor(labels, mesh)), gk.token_logps(logits, labels))


@case
def meshes_of_two_dimensions() -> None:
    """Pairs over the first, vocabulary over the second (its last shards may be empty) or replicated: one process's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    _, world = rank_and_world()
    group = alone()
    torch.manual_seed(1)
    for shape in {(1, world), (max(1, world // 2), min(2, world)), (world, 1)}:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        dp, tp = mesh.get_local_rank("dp"), mesh.get_local_rank("tp")
        vocab = 2 * shape[1] - 3 if shape[1] > 2 else 5  # 5 over 4: 2, 2, 1 and none
        batch = pairs(4, length=4, vocab=vocab)
        hidden = torch.randn(2, 4, 4, 3, dtype=torch.float64)
        weight = torch.randn(vocab, 3, dtype=torch.float64).requires_grad_()
        bias = torch.randn(vocab, dtype=torch.float64).requires_grad_()
        mine = torch.arange(4).tensor_split(shape[0])[dp]
        columns = torch.arange(vocab).chunk(shape[1])
        columns = columns[tp] if tp < len(columns) else torch.arange(0)
        logits, labels, ids, ref = part(batch, slice(None))
        expected = gk.GroupRobustLoss(weights(group), backend="torch")(logits.requires_grad_(), labels, ids, ref)
        (expected_grad,) = torch.autograd.grad(expected.loss, logits)
        expected_grad = expected_grad.unflatten(0, (2, 4))[:, mine].flatten(0, 1)
        states = hidden.flatten(0, 1).requires_grad_()
        from_states = gk.LinearGroupRobustLoss(weights(group), backend="torch")(states, weight, labels, ids, ref, bias)
        wanted = torch.autograd.grad(from_states.loss, (states, weight, bias))
        local, labels, ids, ref = part(batch, mine)
        options = {"process_group": mesh.get_group("dp"), "gradient_reduction": "sum"}
        # An empty shard, of four, is an edge of the kernels, too.
        for backend in backends(interpreted=shape in ((1, 2), (1, 4))):
            for placement, part_of_rank in ((Shard(2), columns), (Replicate(), slice(None))):
                ours = local[..., part_of_rank].clone()
                size = torch.Size((8, 4, vocab))
                ours = DTensor.from_local(ours, mesh, [Shard(0), placement], shape=size, stride=(4 * vocab, vocab, 1))
                loss_fn = gk.GroupRobustLoss(weights(**options), backend=backend)
                out = loss_fn(ours.requires_grad_(), labels, ids, ref)
                (grad,) = torch.autograd.grad(out.loss, ours)
                torch.testing.assert_close(out.loss, expected.loss, **EXACT)
                torch.testing.assert_close(out.alpha, expected.alpha, **EXACT)
                torch.testing.assert_close(grad.to_local(), expected_grad[..., part_of_rank], **EXACT)
            for placement in (Replicate(), Shard(1)):
                if placement.is_shard() and 4 % shape[1]:
                    continue
                of_rank = hidden[:, mine].flatten(0, 1)
                of_rank = distribute_tensor(of_rank, mesh["tp"], [placement]).to_local()
                size = torch.Size((8, 4, 3))
                of_rank = DTensor.from_local(of_rank, mesh, [Shard(0), placement], shape=size, stride=(12, 3, 1))
                head = [distribute_tensor(x.detach(), mesh, [Replicate(), Shard(0)]) for x in (weight, bias)]
                leaves = [x.requires_grad_() for x in (of_rank, *head)]
                linear = gk.LinearGroupRobustLoss(weights(**options), backend=backend)
                out = linear(leaves[0], leaves[1], labels, ids, ref, leaves[2])
                torch.testing.assert_close(out.loss, from_states.loss, **EXACT)
                grads = torch.autograd.grad(out.loss, leaves)
                for got, want in zip(grads[1:], wanted[1:], strict=True):
                    torch.testing.assert_close(got.full_tensor(), want, **EXACT)
                of_mine = wanted[0].unflatten(0, (2, 4))[:, mine].flatten(0, 1)
                got = DTensor.from_local(grads[0].to_local(), mesh["tp"], [placement]).full_tensor()
                torch.testing.assert_close(got, of_mine, **EXACT)
    mesh = init_device_mesh("cpu", (world,))
    with pytest.raises(ValueError, match="logits as a DTensor must be sharded on the vocabulary, dimension 2"):
        gk.sequence_logps(distribute_tensor(local, mesh, [Shard(1)]), labels)


class States(Model):
    """Tokens to hidden states; the head is for the loss."""

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(tokens)))


@case
def fsdp2_head_unsharded_until_the_backward() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(0)
    expected = States().double()
    model = copy.deepcopy(expected)
    _, labels, ids, ref = part(pairs(4), slice(None))
    whole = gk.LinearGroupRobustLoss(weights(group), backend="torch")
    whole(expected(tokens_of(labels)), expected.head.weight, labels, ids, ref).loss.backward()
    mesh = init_device_mesh("cpu", (world,))
    for module in (model.mix, model.head, model):
        fully_shard(module, mesh=mesh)
    _, labels, ids, ref = part(pairs(4), shares(4, world)[rank])
    ours = gk.LinearGroupRobustLoss(weights(None), backend="torch")
    hidden = model(tokens_of(labels))
    with pytest.raises(ValueError, match=r"with the backward before head.reshard\(\)"):
        ours(hidden, model.head.weight, labels, ids, ref)
    model.head.unshard()
    ours(hidden, model.head.weight, labels, ids, ref).loss.backward()
    model.head.reshard()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, **EXACT)


@case_of_two_ranks
def the_engine_says_how_it_reduces() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    group, mesh, auto = alone(), init_device_mesh("cpu", (2,)), {"gradient_reduction": "auto"}
    wrapped, sharded = nn.parallel.DistributedDataParallel(Model()), fully_shard(Model(), mesh=mesh)
    for model in (wrapped, sharded, nn.Sequential(wrapped)):
        assert weights(None, **auto).find_gradient_reduction(model) == "mean"
        with pytest.raises(ValueError, match="gradient_reduction must be 'mean', for so the model's engine reduces"):
            weights(None, gradient_reduction="sum").find_gradient_reduction(model)
    sharded.set_gradient_divide_factor(1)
    assert weights(None, **auto).find_gradient_reduction(sharded) == "sum"
    with pytest.raises(ValueError, match="gradient_reduction must be 'sum'"):
        weights(None).find_gradient_reduction(sharded)
    sharded.set_gradient_divide_factor(3)
    with pytest.raises(ValueError, match=r"set_gradient_divide_factor\(3\) does neither"):
        weights(None, **auto).find_gradient_reduction(sharded)
    with pytest.raises(ValueError, match="must reduce all gradients alike, its parts say"):
        weights(None, **auto).find_gradient_reduction(nn.Sequential(wrapped, Model(), *_factor_one(mesh)))
    with pytest.raises(RuntimeError, match=r"needs find_gradient_reduction\(model\)"):
        gk.GroupRobustLoss(weights(None, **auto))(*part(pairs(2), slice(None)))
    assert weights(group, **auto).find_gradient_reduction(Model()) == "mean"
    gk.GroupRobustLoss(weights(group, **auto))(*part(pairs(2), slice(None)))  # one rank: nothing to reduce


def _factor_one(mesh: object) -> list[nn.Module]:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Model(), mesh=mesh)
    model.set_gradient_divide_factor(1)
    return [model]


@case_of_two_ranks
def mean_is_refused_where_fsdp2_adds_up() -> None:
    """By the first training forward, unasked. "sum" is believed, for a loop may multiply the loss."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, _ = rank_and_world()
    mesh = init_device_mesh("cpu", (2,))
    _, labels, ids, ref = part(pairs(4), shares(4, 2)[rank])
    for of_parts, refused in (((None, None), False), ((1, 1), True), ((1, None), False), ((3, 3), False)):
        model = Model().double()
        model.mix = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
        for module, factor in zip((*model.mix, model), (*of_parts, None), strict=True):
            fully_shard(module, mesh=mesh)
            if factor:
                module.set_gradient_divide_factor(factor)
        for backend, said in itertools.product(backends(interpreted=False), ("mean", "sum")):
            loss_fn = gk.GroupRobustLoss(weights(None, gradient_reduction=said), backend=backend)
            before = loss_fn.group_weights.alpha
            with torch.no_grad():
                loss_fn(model(tokens_of(labels)), labels, ids, ref)  # an evaluation reduces nothing
            if refused and said == "mean":
                for _ in range(2):
                    with pytest.raises(ValueError, match="must be 'sum', for so the model's engine reduces, got 'm"):
                        loss_fn(model(tokens_of(labels)), labels, ids, ref)
                assert torch.equal(loss_fn.group_weights.alpha, before), "nothing moved"
            else:
                loss_fn(model(tokens_of(labels)), labels, ids, ref)


@case_of_two_ranks
def a_wrong_reduction_raises_before_the_first_step() -> None:
    rank, world = rank_and_world()
    batch = pairs(6)
    for said, divided_by, clipped, error in (
        ("auto", world, False, None),
        ("mean", world, False, None),
        ("sum", 1, False, None),
        ("auto", 1, False, "gradient_reduction must be 'sum'.*2 times as long"),
        ("sum", world, False, "gradient_reduction must be 'mean'.*0.5 times as long"),
        ("mean", world, True, "which is neither. Was it clipped"),
        ("mean", None, False, "or not reduced at all"),
    ):
        torch.manual_seed(0)
        model = Model().double()
        before = copy.deepcopy(model.state_dict())
        groups = weights(None, update="lagged", gradient_reduction=said)
        loss_fn, optimizer = gk.GroupRobustLoss(groups, backend="torch"), torch.optim.SGD(model.parameters(), lr=0.1)
        groups.find_gradient_reduction(model)
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        other.step()  # has no gradient to compare
        for which in torch.arange(6)[rank::world].chunk(2):
            _, labels, ids, ref = part(batch, which)
            loss_fn(model(tokens_of(labels)), labels, ids, ref, total_pairs=6).loss.backward()
        groups.step()
        for parameter in model.parameters() if divided_by else ():
            dist.all_reduce(parameter.grad)
            parameter.grad /= divided_by
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        if error is None:
            optimizer.step()
            optimizer.step()  # looked at no more
            continue
        with pytest.raises(RuntimeError, match=error):
            optimizer.step()
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items()), "nothing moved"
