"""Group-robust DPO in PyTorch alone, with the reference beside the trained model: `python examples/plain.py`."""

import copy

import torch
from common import TinyModel, pairs_of_rank, show

import grpo_kernels as gk


def main() -> None:
    torch.manual_seed(0)
    model = TinyModel()
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1)
    loss_fn = gk.GroupRobustLoss(groups, beta=0.5)
    for step in range(20):
        tokens, labels, group_ids, _ = pairs_of_rank(step, rank=0, num_ranks=1)
        with torch.no_grad():
            ref_logps = gk.sequence_logps(reference(tokens), labels)
        out = loss_fn(model(tokens), labels, group_ids, ref_logps=ref_logps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        show(step, out)


if __name__ == "__main__":
    main()
