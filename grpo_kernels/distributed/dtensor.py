"""DTensors that say themselves how they are sharded: tensor-parallel logits and heads; FSDP2's are refused."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.types import VocabShard


def is_dtensor(x: Any) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where nobody imported it, there are none
    return module is not None and isinstance(x, module.DTensor)


def unwrapped(**named: Any) -> tuple[Any, ...]:
    """The arguments as they are, but for replicated DTensors: those are plain tensors.

    Raises:
        ValueError: a DTensor that is sharded or partial; every rank raises alike, for placements are the same on all.
    """
    return tuple(_whole(name, x) if is_dtensor(x) else x for name, x in named.items())


def local_logits(logits: Tensor, vocab_shard: VocabShard | None) -> tuple[Tensor, VocabShard | None]:
    """A rank's part of logits, and the shard of the vocabulary that it is (None: the whole vocabulary).

    A dimension of the mesh may shard the vocabulary (one at most), replicate, or shard dimension 0: then the local rows
    are the rank's own pairs, chosen first, as its labels are.

    Raises:
        ValueError: a DTensor that is sharded otherwise, or a ``vocab_shard`` besides.
    """
    if not is_dtensor(logits):
        return logits, vocab_shard
    if vocab_shard is not None:
        raise ValueError("vocab_shard must be None for logits that are a DTensor: they say themselves what they are")
    shard = _vocab_shard_of("logits", logits, logits.dim() - 1, others=(0,))
    return logits.to_local(), shard  # type: ignore[attr-defined]


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Plain tensors of this rank for the linear path, and the shard of the vocabulary that weight and bias are.

    A weight (V, D) that is a DTensor sharded on V may be tensor-parallel, or a parameter that FSDP2 keeps sharded over
    the data-parallel ranks: their hidden states differ, and taking one for the other trains silently wrong. Hidden
    states that are a DTensor on the same mesh, or a ``vocab_shard``, say that it is the first. Over a further dimension
    of the mesh the weight is replicated, and hidden may be sharded on dimension 0: the rank's own sequences.

    Raises:
        ValueError: nothing says so.
    """
    if is_dtensor(weight) and not is_dtensor(hidden) and vocab_shard is None:
        raise ValueError(
            "weight is a DTensor, and hidden does not say that it is tensor-parallel. If FSDP2 shards it, call the "
            "loss where the weight is whole: inside the root module's forward, in a method registered with "
            "torch.distributed.fsdp.register_fsdp_forward_method, or between head.unshard() and head.reshard(), with "
            "the backward before head.reshard(). If it is tensor-parallel, pass hidden as a DTensor on the same mesh, "
            "or vocab_shard"
        )
    if not is_dtensor(hidden):
        return hidden, _plain(weight), None if bias is None else _plain(bias), vocab_shard
    mesh = hidden.device_mesh  # type: ignore[attr-defined]
    if not is_dtensor(weight) or weight.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError("weight must be a DTensor on hidden's mesh where hidden is a DTensor")
    if vocab_shard is not None:
        raise ValueError("vocab_shard must be None for a hidden and a weight that are DTensors")
    shard = _vocab_shard_of("weight", weight, 0)
    own_sequences = []
    for dim, (of_hidden, of_weight) in enumerate(zip(hidden.placements, weight.placements, strict=True)):  # type: ignore[attr-defined]
        if of_weight.is_shard() and of_hidden.is_shard(hidden.dim() - 2):
            assert shard is not None
            shard = VocabShard(shard.start, shard.stop, shard.process_group, sequence_parallel=True)
        elif not of_weight.is_shard() and of_hidden.is_shard(0):
            own_sequences.append(dim)
        elif not of_hidden.is_replicate():
            raise ValueError(
                "hidden must be replicated or sharded on its positions where weight is sharded, and replicated or "
                f"sharded on dimension 0 elsewhere, got {hidden.placements} for weight {weight.placements}"  # type: ignore[attr-defined]
            )
    head = [None if x is None else _local_parameter(x, own_sequences) for x in (weight, bias)]
    assert head[0] is not None
    return _plain(hidden), head[0], head[1], shard


def own_rows(rows: Any) -> Any:
    """Logits or hidden states of a rank's own sequences: their local part, where they are a DTensor of dimension 3."""
    return rows.to_local() if is_dtensor(rows) and rows.dim() == 3 else rows


def sharing_groups(rows: Tensor, weight: Tensor | None = None) -> list[Any]:
    """Process groups whose ranks have the same pairs, as logits, or hidden and weight, that are DTensors say."""
    if not is_dtensor(rows):
        return []
    mesh, of_rows = rows.device_mesh, rows.placements  # type: ignore[attr-defined]
    of_weight = weight.placements if weight is not None and is_dtensor(weight) else of_rows  # type: ignore[attr-defined]
    both = enumerate(zip(of_rows, of_weight, strict=False))
    return [mesh.get_group(dim) for dim, (x, w) in both if not x.is_shard(0) or (weight is not None and w.is_shard())]


def _whole(name: str, x: Any) -> Tensor:
    if not all(placement.is_replicate() for placement in x.placements):
        raise ValueError(
            f"{name} must be a plain tensor, or a DTensor that is replicated, got {x.placements} over {x.device_mesh}. "
            f"Pass {name}.to_local() if the rank's part is that of its own pairs, else {name}.full_tensor()"
        )
    return x.to_local()


def _plain(x: Tensor) -> Tensor:
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _local_parameter(x: Any, own_sequences: list[int]) -> Tensor:
    """Over the mesh's dimensions ``own_sequences`` each rank has a part of the gradient, which is their sum."""
    if not is_dtensor(x) or not own_sequences:
        return _plain(x)
    from torch.distributed.tensor import Partial

    placements = [Partial() if dim in own_sequences else placement for dim, placement in enumerate(x.placements)]
    return x.redistribute(placements=x.placements).to_local(grad_placements=placements)


def _vocab_shard_of(name: str, x: Any, dim: int, others: tuple[int, ...] = ()) -> VocabShard | None:
    """The rank's part of dimension ``dim``; None where no dimension of the mesh shards it."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharding = [i for i, placement in enumerate(x.placements) if placement.is_shard(dim)]
    rest = [placement for i, placement in enumerate(x.placements) if i not in sharding]
    if len(sharding) > 1 or not all(p.is_replicate() or any(p.is_shard(other) for other in others) for p in rest):
        also = "".join(f" or sharded on dimension {other}" for other in others)
        raise ValueError(
            f"{name} as a DTensor must be sharded on the vocabulary, dimension {dim}, over one dimension of the mesh "
            f"at most, and replicated{also} over the others, got {x.placements} over {x.device_mesh}"
        )
    if not sharding:
        return None
    shape, offset = compute_local_shape_and_global_offset(torch.Size(x.shape), x.device_mesh, x.placements)
    start = offset[dim] if shape[dim] else x.shape[dim]
    return VocabShard(start, start + shape[dim], x.device_mesh.get_group(sharding[0]))
