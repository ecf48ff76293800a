"""Group-robust DPO under DeepSpeed's ZeRO-3, from hidden states:

    torchrun --nproc-per-node 2 examples/with_deepspeed.py

The loss is called inside the engine's forward: outside of it the head's weight has shape (0,). On CPUs set
DS_ACCELERATOR=cpu.
"""

import deepspeed
import torch
import torch.distributed as dist
from common import TinyModel, pairs_of_rank, show
from torch import Tensor, nn

import grpo_kernels as gk

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,  # DeepSpeed asks for it; batches are as large as they come
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


class ModelWithLoss(nn.Module):
    def __init__(self, model: TinyModel, loss_fn: gk.LinearGroupRobustLoss) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(self, tokens: Tensor, labels: Tensor, group_ids: Tensor, ref_logps: Tensor) -> gk.GroupRobustOutput:
        hidden = self.model.hidden(tokens)
        return self.loss_fn(hidden, self.model.head.weight, labels, group_ids, ref_logps=ref_logps)


def train() -> None:
    torch.manual_seed(0)
    groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1, gradient_reduction="auto")
    model = ModelWithLoss(TinyModel(), gk.LinearGroupRobustLoss(groups, beta=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    groups.find_gradient_reduction(engine)  # "mean", unless the config's gradient_allreduce_op says "sum"
    for step in range(20):
        batch = pairs_of_rank(step, dist.get_rank(), dist.get_world_size())
        out = engine(*(tensor.to(engine.device) for tensor in batch))
        engine.backward(out.loss)
        engine.step()
        show(step, out)


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", auto_mpi_discovery=False)
    train()
    dist.destroy_process_group()
