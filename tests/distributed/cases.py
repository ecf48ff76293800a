"""What each rank does and asserts, against the same computation in one process. Run by test_ranks.py under gloo."""

from __future__ import annotations

import copy
import itertools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import grpo_kernels as gk
from grpo_kernels.kernels import dispatch
from grpo_kernels.pair_losses import PAIR_LOSSES

SIZES = [60, 35, 5]
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# 3 steps of SGD in float32 at rate 1/2: gradients are below 1 and sums over 48 tokens, in another order on each rank;
# a step lets what is there less than double: 48 * 2**-24 * (1 + 2 + 4) = 2e-5.
THREE_STEPS = {"rtol": 0, "atol": 48 * 2**-24 * 7}
WORLD_SIZES = (1, 2, 4)


class Case(NamedTuple):
    function: Callable[[], None]
    worlds: tuple[int, ...]


CASES: dict[str, Case] = {}


def case(function: Callable[[], None], worlds: tuple[int, ...] = WORLD_SIZES) -> Callable[[], None]:
    CASES[function.__name__] = Case(function, worlds)
    return function


def case_of_two_ranks(function: Callable[[], None]) -> Callable[[], None]:
    return case(function, (2,))


def backends(interpreted: bool | None = None) -> list[str]:
    """Those that run on the CPU here: ranks are processes under gloo, also on a machine with a GPU.

    Triton's interpreter is slow, and its kernels do not know how many ranks there are: it has the cases of two.
    """
    interpreted = dist.get_world_size() == 2 if interpreted is None else interpreted
    request = dispatch.Request("logits", (), torch.float64, torch.device("cpu"))
    usable = [entry.name for entry in dispatch.BACKENDS if not dispatch.reasons_against(entry, request)]
    return [name for name in usable if name != "reference" and (name != "triton" or interpreted)]


def rank_and_world() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def pairs(num_pairs: int, length: int = 4, vocab: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """A batch with one leading dimension for (chosen, rejected), so that pairs can be split."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, num_pairs, length, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (2, num_pairs, length), generator=generator)
    labels[:, ::2, 0] = -100
    ref = torch.randn(2, num_pairs, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, 3, (num_pairs,), generator=generator)
    return {"logits": logits, "labels": labels, "ref": ref, "ids": ids}


def part(batch: dict[str, Tensor], which: Tensor | slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, labels, group_ids, ref_logps) of some pairs, chosen first."""
    logits, labels, ref = (batch[name][:, which].flatten(0, 1).clone() for name in ("logits", "labels", "ref"))
    return logits, labels, batch["ids"][which], ref


def shares(num_pairs: int, world: int) -> list[slice]:
    """Uneven parts; with more than two ranks the second has nothing."""
    weights = [0.0 if world > 2 and r == 1 else 1.0 + r for r in range(world)]
    ends = [round(num_pairs * sum(weights[: r + 1]) / sum(weights)) for r in range(world)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def alone() -> dist.ProcessGroup:
    """A group of this rank only: the reference computation of one process. All ranks must call it."""
    rank, world = rank_and_world()
    return [dist.new_group([r]) for r in range(world)][rank]


def weights(process_group: dist.ProcessGroup | None, **options) -> gk.GroupWeights:
    return gk.GroupWeights(**{"group_sizes": SIZES, "step_size": 0.3, "process_group": process_group, **options})


def assert_equal_on_all_ranks(tensor: Tensor) -> None:
    everyones = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, tensor.contiguous())
    assert all(torch.equal(everyones[0], other) for other in everyones), "ranks differ"


def mean_over_ranks(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


@case
def data_parallel_is_one_process() -> None:
    """Values, alpha and gradients, over uneven and empty ranks, step after step."""
    rank, world = rank_and_world()
    group = alone()
    for backend in backends():
        for loss_type, estimator, reduction in (
            ("sigmoid", "importance", "mean"),
            ("ipo", "group_mean", "mean"),
            ("hinge", "importance", "sum"),
        ):
            options = {"estimator": estimator, "gradient_reduction": reduction}
            ours = gk.GroupRobustLoss(weights(None, **options), loss_type=loss_type, backend=backend)
            whole = gk.GroupRobustLoss(weights(group, **options), loss_type=loss_type, backend="torch")
            for step in range(2):
                batch = pairs(7, length=2, seed=step)
                logits, *rest = part(batch, slice(None))
                logits.requires_grad_()
                expected = whole(logits, *rest)
                (expected_grad,) = torch.autograd.grad(expected.loss, logits)
                mine = shares(7, world)[rank]
                local, *rest = part(batch, mine)
                local.requires_grad_()
                out = ours(local, *rest)
                (grad,) = torch.autograd.grad(out.loss, local)
                for name in ("loss", "group_losses", "group_counts", "alpha"):
                    torch.testing.assert_close(getattr(out, name), getattr(expected, name), **EXACT)
                torch.testing.assert_close(out.pair_losses, expected.pair_losses[mine], **EXACT)
                assert_equal_on_all_ranks(ours.group_weights.log_alpha)
                scale = world if reduction == "mean" else 1  # what the engine's averaging will divide by
                pieces = expected_grad.unflatten(0, (2, 7))[:, mine].flatten(0, 1)
                torch.testing.assert_close(grad / scale, pieces, **EXACT)


@case_of_two_ranks
def compiled_is_eager() -> None:
    """To the bit, in one graph, step after step, for both ways in which statistics travel inside a graph.

    The second step has other shapes; in one of the two the second rank has no pairs.
    """
    rank, _ = rank_and_world()
    uneven, other, all_on_one = ([slice(0, cut), slice(cut, 7)] for cut in (2, 3, 7))
    for backend in (name for name in backends() if name in ("triton", "torch")):
        update = "lagged" if backend == "torch" else "inline"
        torch.compiler.reset()
        eager, ours = (gk.GroupRobustLoss(weights(None, update=update), backend=backend) for _ in range(2))
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for step in range(2):
            results = []
            for loss_fn in (eager, compiled):
                parts = uneven if step == 0 else all_on_one if update == "inline" else other
                logits, *rest = part(pairs(7, length=2, seed=step), parts[rank])
                logits.requires_grad_()
                loss = loss_fn(logits, *rest).loss
                results.append((loss, *torch.autograd.grad(loss, logits)))
            for weights_of in (eager.group_weights, ours.group_weights):
                if update == "lagged":
                    weights_of.step()
            assert all(torch.equal(*both) for both in zip(*results, strict=True))
            assert torch.equal(ours.group_weights.log_alpha, eager.group_weights.log_alpha)
            assert_equal_on_all_ranks(ours.group_weights.log_alpha)


@case
def every_output_is_differentiable() -> None:
    """group_losses and pair_losses of the fused and the composed path agree in value and gradient."""
    rank, world = rank_and_world()
    batch = pairs(5)
    results = []
    for backend in backends():
        loss_fn = gk.GroupRobustLoss(weights(None), backend=backend)
        logits, *rest = part(batch, shares(5, world)[rank])
        logits.requires_grad_()
        out = loss_fn(logits, *rest)
        total = out.loss + out.group_losses.square().sum() + 2 * out.pair_losses.sum() + out.chosen_logps.sum()
        results.append((total.detach(), *torch.autograd.grad(total, logits)))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, **EXACT)


@case
def a_non_finite_loss_on_one_rank_is_skipped_by_all() -> None:
    rank, world = rank_and_world()
    for backend in backends():
        loss_fn = gk.GroupRobustLoss(weights(None), backend=backend)
        before = loss_fn.group_weights.log_alpha.clone()
        batch = pairs(2 * world)
        logits, *rest = part(batch, slice(2 * rank, 2 * rank + 2))
        if rank == world - 1:
            logits[0, 1] = torch.nan
        out = loss_fn(logits.requires_grad_(), *rest)
        assert out.loss.isnan(), "every rank knows"
        assert torch.equal(loss_fn.group_weights.log_alpha, before)
        assert int(loss_fn.group_weights.skipped_updates) == 1
        logits, *rest = part(batch, slice(2 * rank, 2 * rank + 2))
        assert loss_fn(logits, *rest).loss.isfinite(), "and all recover"
        assert_equal_on_all_ranks(loss_fn.group_weights.log_alpha)


@case
def evaluation_communicates_nothing() -> None:
    """And has one process's gradient, for whoever asks."""
    logits, *rest = part(pairs(3), slice(None))
    group = alone()
    collectives = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_into_tensor")}
    for name in collectives:
        setattr(dist, name, None)  # a forward that communicates fails
    try:
        for backend, update, tilt in itertools.product(backends(), ("inline", "lagged"), (None, 0.5)):
            if backend == "triton" and (update == "lagged" or tilt):  # slow, and nothing new
                continue
            grads = []
            for ranks in (None, group):
                loss_fn = gk.GroupRobustLoss(weights(ranks, update=update, inner_tilt=tilt), backend=backend)
                with torch.no_grad():
                    loss_fn(logits, *rest)
                loss = loss_fn.eval()(logits.requires_grad_(), *rest).loss
                grads += torch.autograd.grad(2 * loss, logits)
            torch.testing.assert_close(*grads, **EXACT)
    finally:
        for name, function in collectives.items():
            setattr(dist, name, function)


class Model(nn.Module):
    """Tokens (S, T) to logits (S, T, V)."""

    def __init__(self, vocab: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(tokens))))


def tokens_of(labels: Tensor) -> Tensor:
    return labels.clamp(min=0)


def train_alone(start: Model, loss_fn: gk.GroupRobustLoss, num_pairs: int, steps: int) -> Model:
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(steps):
        _, labels, ids, ref = part(pairs(num_pairs, seed=step), slice(None))
        loss_fn(model(tokens_of(labels)), labels, ids, ref).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_with_engine(wrap: Callable[[Model], nn.Module], fp32: bool = False) -> None:
    """Three steps of SGD under a data-parallel engine end where one process ends, parameters and alpha."""
    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(0)
    dtype, close = (torch.float32, THREE_STEPS) if fp32 else (torch.float64, EXACT)
    start = Model().to(dtype)
    whole = gk.GroupRobustLoss(weights(group), beta=0.5, backend="torch")
    expected = train_alone(start, whole, 6, 3)
    ours = gk.GroupRobustLoss(weights(None), beta=0.5)
    model = wrap(copy.deepcopy(start))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(3):
        _, labels, ids, ref = part(pairs(6, seed=step), shares(6, world)[rank])
        ours(model(tokens_of(labels)), labels, ids, ref).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours.group_weights.log_alpha, whole.group_weights.log_alpha, **close)
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        full = got.full_tensor() if hasattr(got, "full_tensor") else got
        torch.testing.assert_close(full, want, **close, msg=lambda m, n=name: f"{n}: {m}")


@case
def ddp() -> None:
    for fp32 in (False, True):
        train_with_engine(lambda model: nn.parallel.DistributedDataParallel(model), fp32)


@case
def fsdp2() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def wrap(model: Model) -> nn.Module:
        fully_shard(model.mix, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    train_with_engine(wrap)


@case
def gradient_accumulation() -> None:
    """Lagged: micro-batches of any size, on any number of ranks, are one batch."""
    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(0)
    start = Model().double()
    whole = gk.GroupRobustLoss(weights(group, update="lagged"), backend="torch")
    ours = gk.GroupRobustLoss(weights(None, update="lagged"))
    expected_model = copy.deepcopy(start)
    model = nn.parallel.DistributedDataParallel(copy.deepcopy(start))
    micro_batches = [slice(0, 4), slice(4, 5), slice(5, 9)]
    for step in range(2):
        batch = pairs(9, seed=step)
        _, labels, ids, ref = part(batch, slice(None))
        whole(expected_model(tokens_of(labels)), labels, ids, ref).loss.backward()
        whole.group_weights.step()
        for i, micro in enumerate(micro_batches):
            some = torch.arange(9)[micro]
            mine = some[shares(len(some), world)[rank]]
            _, labels, ids, ref = part(batch, mine)
            model.require_backward_grad_sync = i == len(micro_batches) - 1
            ours(model(tokens_of(labels)), labels, ids, ref, total_pairs=9).loss.backward()
        assert ours.group_weights.num_ranks == world
        ours.group_weights.step()
        assert_equal_on_all_ranks(ours.group_weights.log_alpha)
        torch.testing.assert_close(ours.group_weights.log_alpha, whole.group_weights.log_alpha, **EXACT)
        for got, want in zip(model.parameters(), expected_model.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, **EXACT)
            got.grad, want.grad = None, None


@case
def checkpoint_survives_another_world_size() -> None:
    """torch.distributed.checkpoint: what all ranks saved, one alone reads, to the bit."""
    import torch.distributed.checkpoint as dcp

    rank, world = rank_and_world()
    group = alone()
    loss_fn = gk.GroupRobustLoss(weights(None))
    logits, *rest = part(pairs(5), shares(5, world)[rank])
    loss_fn(logits.requires_grad_(), *rest)
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    dcp.save(loss_fn.group_weights.state_dict(), checkpoint_id=Path(folder[0]) / "step1")
    for process_group, participates in ((None, True), (group, rank == 0)):
        if participates:
            other = weights(process_group)
            state = other.state_dict()
            dcp.load(state, checkpoint_id=Path(folder[0]) / "step1", process_group=process_group)
            other.load_state_dict(state)
            assert torch.equal(other.log_alpha, loss_fn.group_weights.log_alpha)
    dist.barrier()


@case_of_two_ranks
def pipeline() -> None:
    """A schedule of torch.distributed.pipelining whose last stage has the loss: micro-batches, lagged."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(0)
    start = Model().double()
    batch = pairs(4)
    _, labels, ids, ref = part(batch, slice(None))
    # A micro-batch is whole pairs: chosen and rejected alternate, so that splitting on dimension 0 keeps them together.
    order = torch.arange(8).view(2, 4).t().flatten()
    whole = gk.GroupRobustLoss(weights(group, update="lagged"), backend="torch")
    reference = copy.deepcopy(start)
    whole(reference(tokens_of(labels)), labels, ids, ref).loss.backward()
    whole.group_weights.step()
    ours = gk.GroupRobustLoss(weights(group, update="lagged"), backend="torch")

    def stage_loss(logits: Tensor, target: Tensor) -> Tensor:
        chosen_first = torch.arange(len(target)).view(-1, 2).t().flatten()
        rows = target[chosen_first]
        some_labels, some_ids = rows[:, :4], rows[: len(rows) // 2, 4]
        return ours(logits[chosen_first], some_labels, some_ids, ref[rows[:, 5]], total_pairs=4).loss

    halves = [nn.Sequential(start.embed, start.mix, nn.Tanh()), start.head]
    stage = PipelineStage(halves[rank], rank, world, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=stage_loss, scale_grads=False)
    target = torch.cat([labels, ids.repeat(2)[:, None], torch.arange(8)[:, None]], dim=1)[order]
    schedule.step(*([tokens_of(labels)[order]] if rank == 0 else []), target=target if rank == 1 else None)
    if rank == 1:
        assert int(ours.group_weights.pending_counts.sum()) == 4, "each pair counts once"
        ours.group_weights.step()
        torch.testing.assert_close(ours.group_weights.log_alpha, whole.group_weights.log_alpha, **EXACT)
    mine = dict(start.named_parameters())
    for name, want in reference.named_parameters():
        if (name.startswith("head")) == (rank == 1):
            torch.testing.assert_close(mine[name].grad, want.grad, **EXACT)


@case
def errors_name_the_way_out() -> None:
    from torch.utils.checkpoint import checkpoint

    _, world = rank_and_world()
    logits, labels, ids, ref = part(pairs(3), slice(None))
    shard = gk.VocabShard(0, 5, dist.group.WORLD)
    for text, call in {
        "vocab_shard must be as wide as logits: 11 columns, got 0:5": lambda: gk.sequence_logps(
            logits, labels, vocab_shard=shard
        ),
        "shift_labels must be False with context_group": lambda: gk.sequence_logps(
            logits, labels, shift_labels=True, context_group=dist.group.WORLD
        ),
        "total_pairs belongs to update='lagged'": lambda: gk.GroupRobustLoss(weights(None))(
            logits, labels, ids, ref, total_pairs=3
        ),
    }.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            call()
    if world > 1:
        loss_fn = gk.GroupRobustLoss(weights(None), backend="torch")
        out = checkpoint(
            lambda x: loss_fn(x * 1.0, labels, ids, ref).loss, logits.requires_grad_(), use_reentrant=False
        )
        with pytest.raises(RuntimeError, match="outside the checkpointed region"):
            out.backward()


@case
def copies_and_pickles() -> None:
    import pickle

    group = alone()
    module = weights(group)
    assert copy.deepcopy(module).process_group is group
    assert torch.equal(pickle.loads(pickle.dumps(module)).log_alpha, module.log_alpha)


@case
def linear_loss_over_ranks() -> None:
    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(1)
    batch = pairs(5)
    hidden = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    weight = torch.randn(11, 6, dtype=torch.float64).requires_grad_()
    _, labels, ids, ref = part(batch, slice(None))
    whole = gk.LinearGroupRobustLoss(weights(group), backend="torch")
    (expected,) = torch.autograd.grad(whole(hidden.flatten(0, 1), weight, labels, ids, ref).loss, weight)
    mine = shares(5, world)[rank]
    _, labels, ids, ref = part(batch, mine)
    for backend in backends():
        ours = gk.LinearGroupRobustLoss(weights(None), backend=backend)
        (grad,) = torch.autograd.grad(ours(hidden[:, mine].flatten(0, 1), weight, labels, ids, ref).loss, weight)
        torch.testing.assert_close(mean_over_ranks(grad), expected, **EXACT)


@case_of_two_ranks
def a_mixture_over_ranks() -> None:
    """Of two slopes, and of means whose counts are each rank's own."""
    two_steps_are_one_process(loss_type=["apo_zero", "sft"], loss_weights=[1.0, 0.5])


@case_of_two_ranks
def every_pair_loss_over_ranks() -> None:
    for name, entry in PAIR_LOSSES.items():
        two_steps_are_one_process(loss_type=name, label_smoothing=0.2 if entry.uses_label_smoothing else 0.0)


def two_steps_are_one_process(**options: Any) -> None:
    """Both paths."""
    names = [options["loss_type"]] if isinstance(options["loss_type"], str) else options["loss_type"]
    uses_reference = any(PAIR_LOSSES[name].uses_reference for name in names)
    rank, world = rank_and_world()
    group = alone()
    batch, mine = pairs(7), shares(7, world)[rank]
    torch.manual_seed(1)
    hidden = torch.randn(2, 7, 4, 6, dtype=torch.float64)
    weight = torch.randn(11, 6, dtype=torch.float64).requires_grad_()
    whole = gk.GroupRobustLoss(weights(group), backend="reference", **options)
    logits = hidden.flatten(0, 1) @ weight.t()
    _, labels, ids, ref = part(batch, slice(None))
    exact = [whole(logits, labels, ids, ref if uses_reference else None) for _ in range(2)][-1]
    (expected,) = torch.autograd.grad(exact.loss, weight)
    _, labels, ids, ref = part(batch, mine)
    rows = hidden[:, mine].flatten(0, 1)
    for backend in backends(interpreted=False):
        of_logits = gk.GroupRobustLoss(weights(None), backend=backend, **options)
        of_hidden = gk.LinearGroupRobustLoss(weights(None), backend=backend, **options)
        for loss_fn, arguments in ((of_logits, (rows @ weight.t(),)), (of_hidden, (rows, weight))):
            out = [loss_fn(*arguments, labels, ids, ref if uses_reference else None) for _ in range(2)][-1]
            (grad,) = torch.autograd.grad(out.loss, weight)
            torch.testing.assert_close(out.loss, exact.loss, **EXACT)
            torch.testing.assert_close(out.alpha, exact.alpha, **EXACT)
            torch.testing.assert_close(mean_over_ranks(grad), expected, **EXACT)


@case_of_two_ranks
def a_mixture_whose_preferences_move_alpha() -> None:
    two_steps_are_one_process(loss_type=["apo_zero", "sft"], alpha_follows="preference")
