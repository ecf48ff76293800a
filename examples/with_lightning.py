"""Group-robust DPO in Lightning, with DDP and two micro-batches a step:

    torchrun --nproc-per-node 2 examples/with_lightning.py

Alpha is in Lightning's checkpoints, for the loss is a part of the module. Without accumulation leave out what is marked
[1], and take update="inline".
"""

import logging
import os
import sys

import lightning
import torch
from common import TinyModel, pairs_of_rank
from lightning.pytorch.callbacks import ModelCheckpoint

import grpo_kernels as gk

RANK, NUM_RANKS, PARTS, STEPS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), 2, 10


class GroupRobustModule(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = TinyModel()
        groups = gk.GroupWeights(group_sizes=[600, 350, 50], step_size=0.1, update="lagged")
        self.loss_fn = gk.GroupRobustLoss(groups, beta=0.5)

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        tokens, labels, group_ids, ref_logps = batch
        total = self.trainer.world_size * self.trainer.accumulate_grad_batches * len(group_ids)
        out = self.loss_fn(self.model(tokens), labels, group_ids, ref_logps=ref_logps, total_pairs=total)  # [1]
        return self.trainer.accumulate_grad_batches * out.loss  # [1] by which Lightning divides it

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.loss_fn.group_weights.step()  # [1]
        if self.global_step % 5 == 4 and self.global_rank == 0:
            alpha = [round(a, 6) for a in self.loss_fn.group_weights.alpha.tolist()]
            print(f"step {self.global_step + 1}: alpha {alpha}")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)


class Pairs(torch.utils.data.Dataset):
    """Micro-batch i of this rank: 12 pairs a step, over all parts and ranks. (Lightning goes on between two epochs.)"""

    def __len__(self) -> int:
        return STEPS * PARTS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return pairs_of_rank(index // PARTS, RANK * PARTS + index % PARTS, NUM_RANKS * PARTS)


def main(folder: str, checkpoint: str | None = None) -> None:
    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        accelerator="cpu" if not torch.cuda.is_available() else "auto",
        devices=NUM_RANKS,
        strategy="ddp" if NUM_RANKS > 1 else "auto",
        precision="64-true" if torch.get_default_dtype() == torch.float64 else "32-true",
        max_epochs=2,
        accumulate_grad_batches=PARTS,
        use_distributed_sampler=False,  # Pairs knows the ranks
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STEPS, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(Pairs(), batch_size=None)
    trainer.fit(GroupRobustModule(), loader, ckpt_path=checkpoint)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main(*sys.argv[1:] or ["runs/lightning"])
