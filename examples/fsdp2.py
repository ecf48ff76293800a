"""Group-robust DPO from hidden states under FSDP2, whose sharded head the loss must see whole:

    torchrun --nproc-per-node 2 examples/fsdp2.py

The loss is called inside the root module's forward, where FSDP2 has gathered the head's weight.
"""

import torch
import torch.distributed as dist
from common import TinyModel, pairs_of_rank, run_on_ranks, show
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import grpo_kernels as gk


class ModelWithLoss(nn.Module):
    def __init__(self, model: TinyModel, loss_fn: gk.LinearGroupRobustLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, tokens: Tensor, labels: Tensor, group_ids: Tensor, ref_logps: Tensor) -> gk.GroupRobustOutput:
        hidden = self.model.hidden(tokens)
        out = self.loss_fn(hidden, self.model.head.weight, labels, group_ids, ref_logps=ref_logps)
        return gk.GroupRobustOutput(out.loss, *(x.detach() for x in out[1:]))  # FSDP2 warns of views with a gradient


def train() -> None:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1)
    model = ModelWithLoss(TinyModel(), gk.LinearGroupRobustLoss(groups, beta=0.5))
    # With param_dtype=torch.bfloat16, too, inputs must not be cast: -812.3 and -811.9 would be the same ref_logps.
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(20):
        out = model(*pairs_of_rank(step, dist.get_rank(), dist.get_world_size()))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        show(step, out)


if __name__ == "__main__":
    run_on_ranks(train)
