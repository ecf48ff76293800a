"""Group-robust DPO of torchtitan's Llama under FSDP2 and tensor parallelism, whose logits stay sharded:

    torchrun --nproc-per-node 4 examples/with_torchtitan.py

Four ranks are two data-parallel by two tensor-parallel ones. torchtitan sets FSDP's divide factor to 1: gradients are
added up, which gradient_reduction="auto" finds.
"""

import tempfile

import torch
import torch.distributed as dist
import torchtitan.tools.utils
from common import pairs_of_rank, run_on_ranks, show
from torch.distributed.fsdp import FSDPModule

import grpo_kernels as gk

if not torch.cuda.is_available():  # torchtitan knows GPUs only, and looks when it is imported
    torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", torch.cpu

import torchtitan.models.llama3 as llama3
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3.sharding import set_llama3_sharding_config

BACKEND = "partial_dtensor"
llama3.get_attention_config = lambda _: ScaledDotProductAttention.Config()  # the others are for GPUs


def parallel_model(dims: ParallelDims, parallelism: ParallelismConfig) -> torch.nn.Module:
    config = llama3._debugmodel("sdpa")
    config.layers = config.layers[:1]
    set_llama3_sharding_config(config, enable_sp=True)
    torch.manual_seed(0)
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))
    training = TrainingConfig(mixed_precision_param="float32", mixed_precision_reduce="float32")
    options = {"training": training, "compile_config": CompileConfig(enable=False), "ac_config": None}
    options |= {"parallel_dims": dims, "parallelism": parallelism, "dump_folder": tempfile.mkdtemp()}
    model = llama3.parallelize_llama(model, **options) or model
    for module in model.modules():
        if isinstance(module, FSDPModule) and dist.get_backend() == "gloo":  # which cannot divide while it sums
            module.set_force_sum_reduction_for_comms(True)
    return model


def train() -> None:
    world = dist.get_world_size()
    tensor_ranks = 2 if world > 1 else 1
    parallelism = ParallelismConfig(
        data_parallel_shard_degree=world // tensor_ranks, tensor_parallel_degree=tensor_ranks, spmd_backend=BACKEND
    )
    dims = ParallelDims.from_config(parallelism, world)
    dims.build_mesh()
    set_spmd_backend(BACKEND)
    model = parallel_model(dims, parallelism)
    data_ranks = dims.get_optional_mesh("fsdp")
    rank, num_ranks = (0, 1) if data_ranks is None else (data_ranks.get_local_rank(), data_ranks.size())
    group = dist.new_subgroups(1)[0] if data_ranks is None else data_ranks.get_group()
    groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1, process_group=group, gradient_reduction="auto")
    groups.find_gradient_reduction(model)
    loss_fn = gk.GroupRobustLoss(groups, beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(10):
        tokens, labels, group_ids, ref_logps = pairs_of_rank(step, rank, num_ranks)
        logits = model(tokens)  # a DTensor, sharded on the vocabulary, which the loss takes as it is
        out = loss_fn(logits, labels, group_ids, ref_logps=2.2 * ref_logps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        show(step, out)


if __name__ == "__main__":
    run_on_ranks(train)
