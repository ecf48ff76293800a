"""Group-robust DPO as Megatron lays a model out: the head's vocabulary over tensor-parallel ranks, the loss on the last
pipeline stage, micro-batches of whole pairs:

    torchrun --nproc-per-node 4 examples/tensor_parallel.py

Four ranks are two stages of two, two ranks one stage of two.
"""

import torch
import torch.distributed as dist
from common import PAIRS, VOCAB, TinyModel, pairs_of_rank, run_on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

import grpo_kernels as gk

INTERLEAVED = torch.arange(2 * PAIRS).view(2, PAIRS).t().flatten()  # chosen, rejected, chosen, ...: a split keeps pairs


def train() -> None:
    torch.manual_seed(0)
    world = dist.get_world_size()
    tensor_ranks, stages = min(world, 2), max(1, world // 2)
    # The data-parallel ranks are those that have other pairs: here none, so a group of one.
    mesh = init_device_mesh("cpu", (1, stages, tensor_ranks), mesh_dim_names=("dp", "pp", "tp"))
    stage_index, tensor_rank = mesh.get_local_rank("pp"), mesh.get_local_rank("tp")
    model, size = TinyModel(), VOCAB // tensor_ranks
    shard = gk.VocabShard(size * tensor_rank, size * (tensor_rank + 1), mesh.get_group("tp"))
    head = nn.Parameter(model.head.weight[shard.start : shard.stop].detach().clone())
    layers = [model.embed, nn.Sequential(model.mix, nn.Tanh())]
    module = layers[stage_index] if stages > 1 else nn.Sequential(*layers)
    is_last = stage_index == stages - 1
    groups = gk.GroupWeights(
        group_sizes=[600, 350, 50], step_size=0.1, update="lagged", process_group=mesh.get_group("dp")
    )
    loss_fn = gk.LinearGroupRobustLoss(groups, beta=0.5, vocab_shard=shard, layout="interleaved")

    def loss_of(hidden: Tensor, target: Tensor) -> Tensor:
        """Of a micro-batch; with total_pairs the shares add up to the step's loss."""
        labels, group_ids = target[:, :-1], target[::2, -1]
        ref_logps = torch.full((len(labels),), -14.0)
        return loss_fn(hidden, head, labels, group_ids, ref_logps=ref_logps, total_pairs=PAIRS).loss

    stage = PipelineStage(module, stage_index, stages, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = ScheduleGPipe(stage, n_microbatches=3, loss_fn=loss_of, scale_grads=False)
    optimizer = torch.optim.AdamW([*module.parameters(), *([head] if is_last else [])], lr=1e-2)
    for step in range(20):
        tokens, labels, group_ids, _ = pairs_of_rank(step, rank=0, num_ranks=1)
        target = torch.cat([labels[INTERLEAVED], group_ids.repeat_interleave(2)[:, None]], dim=1)
        losses: list[Tensor] = []
        inputs = [tokens[INTERLEAVED]] if stage_index == 0 else []
        schedule.step(*inputs, target=target if is_last else None, losses=losses)
        if is_last:
            groups.step()
        optimizer.step()
        optimizer.zero_grad()
        if is_last and tensor_rank == 0 and step % 5 == 4:
            alpha = [round(a, 6) for a in groups.alpha.tolist()]
            print(f"step {step + 1}: loss {sum(losses).item():.6f}, alpha {alpha}")


if __name__ == "__main__":
    run_on_ranks(train)
