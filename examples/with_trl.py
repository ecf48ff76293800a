"""Group-robust DPO with TRL's trainer, on JSONL files of {"prompt", "chosen", "rejected", "group"}:

    python examples/with_trl.py train.jsonl eval.jsonl --steps 100

Against TRL's own example two lines differ: the config's class and the trainer's. The model is small and random and its
tokenizer learned on the spot, so that it runs in minutes on a CPU without a download.
"""

import argparse

import torch
from datasets import load_dataset

from grpo_kernels.integrations.transformers import byte_level_tokenizer, small_llama
from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--out", default="runs/trl")
    options = parser.parse_args()
    data = load_dataset("json", data_files=dict(zip(("train", "eval"), options.files, strict=True)))
    tokenizer = byte_level_tokenizer((text for column in ("prompt", "chosen") for text in data["train"][column]), 2000)
    torch.manual_seed(0)
    model = small_llama(2000, hidden_size=64, num_layers=2, max_length=options.max_length, pad_id=0)
    args = GroupRobustDPOConfig(
        output_dir=options.out,
        group_step_size=0.05,
        max_length=options.max_length,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,  # exact: pairs of both micro-batches make one step
        learning_rate=1e-3,
        precompute_ref_log_probs=True,  # the reference is the model as it is now
        gradient_checkpointing=False,
        bf16=False,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=max(1, options.steps // 4),
        logging_steps=5,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = GroupRobustDPOTrainer(
        model, args=args, train_dataset=data["train"], eval_dataset=data["eval"], processing_class=tokenizer
    )
    trainer.train()
    records = [record for record in trainer.state.log_history if "eval_groups/worst_loss" in record]
    print("| group | step | loss | accuracy | alpha | pairs |\n| --- | --- | --- | --- | --- | --- |")
    for name in trainer.group_names:
        for record in records:
            loss, accuracy, alpha, count = (
                record.get(f"eval_groups/{name}/{value}", float("nan"))
                for value in ("loss", "accuracy", "alpha", "count")
            )
            print(f"| {name} | {record['step']} | {loss:.4f} | {accuracy:.2f} | {alpha:.3f} | {count:.0f} |")


if __name__ == "__main__":
    main()
