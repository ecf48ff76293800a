"""Group-robust DPO of a Transformers model with Accelerate: `accelerate launch examples/with_accelerate.py`."""

import torch
from accelerate import Accelerator
from common import VOCAB, pairs_of_rank

import grpo_kernels as gk
from grpo_kernels.integrations.transformers import LossOfPairs, add_sequence_logps, find_head, small_llama


def main() -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank, num_ranks, parts = accelerator.process_index, accelerator.num_processes, 2
    torch.manual_seed(0)
    model = small_llama(VOCAB, hidden_size=32, num_layers=1, max_length=16, pad_id=0)
    head = find_head(model)
    add_sequence_logps(model, head)  # its forward can now return the loss, without logits
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1, update="lagged").to(accelerator.device)
    accelerator.register_for_checkpointing(groups)  # save_state and load_state take alpha with them
    # These labels say what each position is to predict; shift_labels=True is for a copy of the tokens.
    loss_fn = gk.LinearGroupRobustLoss(groups, beta=0.5, logit_scale=head.scale, softcap=head.softcap)
    for step in range(20):
        for part in range(parts):  # 12 pairs a step, over all parts and ranks
            batch = pairs_of_rank(step, rank * parts + part, num_ranks * parts)
            tokens, labels, group_ids, ref_logps = (tensor.to(accelerator.device) for tensor in batch)
            pairs = LossOfPairs(loss_fn, group_ids, ref_logps, total_pairs=12)
            found = model(input_ids=tokens, labels=labels, loss_of_pairs=pairs)
            accelerator.backward(found.loss)
        optimizer.step()
        groups.step()
        optimizer.zero_grad()
        if step % 5 == 4:
            accelerator.print(f"step {step + 1}: alpha {[round(a, 6) for a in groups.alpha.tolist()]}")
    accelerator.free_memory()  # it holds the model, and the model the process group
    accelerator.end_training()


if __name__ == "__main__":
    main()
