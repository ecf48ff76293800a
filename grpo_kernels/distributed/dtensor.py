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


def local_logits(logits: Tensor, vocab_shard: VocabShard | None) -> tuple[Tensor, VocabShard | None]:
    """A rank's columns of logits that are sharded on the vocabulary, and the shard that they are.

    Raises:
        ValueError: a DTensor that is sharded otherwise, or a ``vocab_shard`` besides.
    """
    if not is_dtensor(logits):
        return logits, vocab_shard
    if vocab_shard is not None:
        raise ValueError("vocab_shard must be None for logits that are a DTensor: they say themselves what they are")
    shard = _vocab_shard_of("logits", logits, logits.dim() - 1)
    return logits.to_local(), shard  # type: ignore[attr-defined]


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_shard: VocabShard | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Plain tensors of this rank for the linear path, and the shard of the vocabulary that weight and bias are.

    A weight (V, D) that is a DTensor sharded on V may be tensor-parallel, or a parameter that FSDP2 keeps sharded over
    the data-parallel ranks: their hidden states differ, and taking one for the other trains silently wrong. Hidden
    states that are a DTensor on the same mesh, or a ``vocab_shard``, say that it is the first.

    Raises:
        ValueError: nothing says so.
    """
    if is_dtensor(weight) and not is_dtensor(hidden) and vocab_shard is None:
        raise ValueError(
            "weight is a DTensor, and hidden does not say that it is tensor-parallel. If FSDP2 shards it, call the "
            "loss where the weight is whole: inside the root module's forward, in a method registered with "
            "torch.distributed.fsdp.register_fsdp_forward_method, or between head.unshard() and head.reshard(). If it "
            "is tensor-parallel, pass hidden as a DTensor on the same mesh, or vocab_shard"
        )
    if not is_dtensor(hidden):
        return hidden, _plain(weight), None if bias is None else _plain(bias), vocab_shard
    mesh = hidden.device_mesh  # type: ignore[attr-defined]
    if not is_dtensor(weight) or weight.device_mesh != mesh:  # type: ignore[attr-defined]
        raise ValueError("weight must be a DTensor on hidden's mesh where hidden is a DTensor")
    if vocab_shard is not None:
        raise ValueError("vocab_shard must be None for a hidden and a weight that are DTensors")
    shard = _vocab_shard_of("weight", weight, 0)
    (placement,) = hidden.placements  # type: ignore[attr-defined]
    if placement.is_shard(hidden.dim() - 2):
        shard = VocabShard(shard.start, shard.stop, shard.process_group, sequence_parallel=True)
    elif not placement.is_replicate():
        raise ValueError(f"hidden must be replicated or sharded on its positions, got {placement}")
    return _plain(hidden), _plain(weight), None if bias is None else _plain(bias), shard


def _plain(x: Tensor) -> Tensor:
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _vocab_shard_of(name: str, x: Any, dim: int) -> VocabShard:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if x.device_mesh.ndim != 1 or not x.placements[0].is_shard(dim):
        raise ValueError(
            f"{name} as a DTensor must be sharded on the vocabulary, dimension {dim}, over a mesh of one dimension, "
            f"got {x.placements} over {x.device_mesh}"
        )
    shape, offset = compute_local_shape_and_global_offset(torch.Size(x.shape), x.device_mesh, x.placements)
    return VocabShard(offset[dim], offset[dim] + shape[dim], x.device_mesh.get_group())
