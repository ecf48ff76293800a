"""Group-robust DPO under DistributedDataParallel, a plain loop:

    torchrun --nproc-per-node 2 examples/ddp.py

Each rank draws its own part of every batch; alpha is the same on all of them. On a GPU machine use the nccl backend.
"""

import torch
import torch.distributed as dist
from common import TinyModel, pairs_of_rank, run_on_ranks, show
from torch.nn.parallel import DistributedDataParallel

import grpo_kernels as gk


def train() -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(TinyModel())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1)
    loss_fn = gk.GroupRobustLoss(groups, beta=0.5)
    for step in range(20):
        tokens, labels, group_ids, ref_logps = pairs_of_rank(step, dist.get_rank(), dist.get_world_size())
        out = loss_fn(model(tokens), labels, group_ids, ref_logps=ref_logps)
        out.loss.backward()  # out.loss is the whole batch's on every rank
        optimizer.step()
        optimizer.zero_grad()
        show(step, out)


if __name__ == "__main__":
    run_on_ranks(train)
