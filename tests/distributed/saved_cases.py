"""Cases of what is saved and taken up again: sharded, while training goes on, by fewer ranks. Run by test_ranks.py."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import (
    EXACT,
    Model,
    alone,
    assert_equal_on_all_ranks,
    case,
    pairs,
    part,
    rank_and_world,
    shares,
    tokens_of,
    train_alone,
    weights,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import grpo_kernels as gk


class WithLoss(nn.Module):
    """The loss inside the model, so that one state dict has both."""

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.model = Model().double()
        self.loss_fn = gk.GroupRobustLoss(weights(process_group), beta=0.5, backend="torch")


def sharded(shape: tuple[int, ...]) -> tuple[WithLoss, torch.optim.Optimizer]:
    """FSDP2 over a mesh of one dimension, HSDP over two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = WithLoss(None)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for module in (whole.model.mix, whole.model):
        fully_shard(module, mesh=mesh)
    return whole, torch.optim.SGD(whole.model.parameters(), lr=0.5, momentum=0.5)


def train(module: WithLoss, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rank, world = rank_and_world()
    for step in steps:
        _, labels, ids, ref = part(pairs(6, seed=step), shares(6, world)[rank])
        module.loss_fn(module.model(tokens_of(labels)), labels, ids, ref).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shared_folder() -> Path:
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    return Path(folder[0])


def state_of(module: WithLoss, optimizer: torch.optim.Optimizer) -> dict:
    of_model, of_optimizer = get_state_dict(module, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def load(module: WithLoss, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state = state_of(module, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def full(module: WithLoss) -> list[torch.Tensor]:
    return [p.full_tensor().detach() for p in module.model.parameters()]


def sharded_checkpoints_go_on_to_the_bit() -> None:
    """FSDP2, and HSDP where ranks are enough; the checkpoint is written in the background while training goes on."""
    _, world = rank_and_world()
    group = alone()
    background = dist.new_group(backend="gloo")  # its collectives would mix with those of training
    for shape in {(world,), (max(1, world // 2), min(2, world))}:
        module, optimizer = sharded(shape)
        train(module, optimizer, range(2))
        folder = shared_folder()
        saving = dcp.async_save(state_of(module, optimizer), checkpoint_id=folder, process_group=background)
        train(module, optimizer, range(2, 4))  # moves what is being saved
        saving.result()
        again, its_optimizer = sharded(shape)
        load(again, its_optimizer, folder)
        assert int(again.loss_fn.group_weights.shared_updates) == (2 if world > 1 else 0)
        train(again, its_optimizer, range(2, 4))
        assert torch.equal(again.loss_fn.group_weights.log_alpha, module.loss_fn.group_weights.log_alpha)
        assert_equal_on_all_ranks(again.loss_fn.group_weights.log_alpha)
        assert all(torch.equal(*both) for both in zip(full(again), full(module), strict=True))
    torch.manual_seed(0)
    whole = WithLoss(group)
    its_optimizer = torch.optim.SGD(whole.model.parameters(), lr=0.5, momentum=0.5)
    for step in range(4):
        _, labels, ids, ref = part(pairs(6, seed=step), slice(None))
        whole.loss_fn(whole.model(tokens_of(labels)), labels, ids, ref).loss.backward()
        its_optimizer.step()
        its_optimizer.zero_grad()
    for got, want in zip(full(module), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, want.detach(), **EXACT)


def fewer_ranks_go_on_where_more_stopped() -> None:
    """As after an elastic restart: half of the ranks load what all have saved, and end where one process ends."""
    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(0)
    start = Model().double()
    whole = gk.GroupRobustLoss(weights(group), beta=0.5, backend="torch")
    expected = train_alone(start, whole, 6, 4)
    survivors = dist.new_group(list(range(max(1, world // 2))))
    model, loss_fn = copy.deepcopy(start), gk.GroupRobustLoss(weights(None), beta=0.5, backend="torch")
    folder = shared_folder()
    for ranks, steps in ((dist.group.WORLD, range(2)), (survivors, range(2, 4))):
        if rank >= dist.get_world_size(ranks):
            break
        if steps[0]:
            model, loss_fn = Model().double(), gk.GroupRobustLoss(weights(ranks), beta=0.5, backend="torch")
            state = {"model": model.state_dict(), "groups": loss_fn.group_weights.state_dict()}
            dcp.load(state, checkpoint_id=folder, process_group=ranks)
            model.load_state_dict(state["model"])
            loss_fn.group_weights.load_state_dict(state["groups"])
        engine = nn.parallel.DistributedDataParallel(model, process_group=ranks)
        optimizer = torch.optim.SGD(engine.parameters(), lr=0.5)
        for step in steps:
            _, labels, ids, ref = part(pairs(6, seed=step), shares(6, dist.get_world_size(ranks))[rank])
            loss_fn(engine(tokens_of(labels)), labels, ids, ref).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not steps[0]:
            state = {"model": model.state_dict(), "groups": loss_fn.group_weights.state_dict()}
            dcp.save(state, checkpoint_id=folder)
    if rank < max(1, world // 2):
        torch.testing.assert_close(loss_fn.group_weights.log_alpha, whole.group_weights.log_alpha, **EXACT)
        for got, want in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(got, want, **EXACT)
    dist.barrier()


case(sharded_checkpoints_go_on_to_the_bit, (4,))
case(fewer_ranks_go_on_where_more_stopped, (2, 4))
