"""DeepSpeed's ZeRO-3, through its engine, ends where one process ends. Run by torchrun from test_zero3.py."""

from __future__ import annotations

import copy

import deepspeed
import torch
import torch.distributed as dist
from cases import THREE_STEPS, Model, alone, pairs, part, rank_and_world, shares, tokens_of, train_alone, weights

import grpo_kernels as gk

# Its clipping is on by default, and would hide a wrong scale of the gradients.
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def main() -> None:
    dist.init_process_group("gloo")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank, world = rank_and_world()
    group = alone()
    torch.manual_seed(0)
    start = Model()
    whole = gk.GroupRobustLoss(weights(group), beta=0.5, backend="torch")
    expected = train_alone(start, whole, 6, 3)
    model = copy.deepcopy(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    ours = gk.GroupRobustLoss(weights(None), beta=0.5)
    for step in range(3):
        _, labels, ids, ref = part(pairs(6, seed=step), shares(6, world)[rank])
        engine.backward(ours(engine(tokens_of(labels)), labels, ids, ref).loss)
        engine.step()
    torch.testing.assert_close(ours.group_weights.log_alpha, whole.group_weights.log_alpha, **THREE_STEPS)
    for got, want in zip(engine.module.parameters(), expected.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters(got):
            torch.testing.assert_close(got.data, want.data, **THREE_STEPS)
    print(f"rank {rank} agrees")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
