"""What all arms of a run start from: the model that was named, or a small Llama warmed up on the chosen answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from grpo_kernels.integrations import callbacks, checkpoints
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.training.options import ModelOptions, TrainerOptions, TrainOptions

SHARED = (  # what the warm-up takes over from the arms' options
    *("per_device_train_batch_size", "max_length", "bf16", "fp16", "use_cpu", "gradient_checkpointing"),
    *("disable_tqdm", "dataloader_pin_memory", "ddp_backend", "logging_steps"),
)


def small_model(folder: Path, rows: Dataset, options: TrainOptions, config: TrainerOptions) -> str:
    """Train and save the small Llama and its tokenizer, unless the folder has them; returns the folder.

    Raises:
        ValueError: the rows are no texts with a prompt.
    """
    if folder.exists():
        return str(folder)
    if not isinstance(rows[0].get("prompt"), str):
        raise ValueError("data must be texts with a prompt where there is no --model: messages need a chat template")
    tokenizer = hf.byte_level_tokenizer((text for name in ("prompt", "chosen") for text in rows[name]), 512)
    torch.manual_seed(config.seed)
    pad_id, length = hf.pad_token_id(tokenizer), config.max_length or 1024
    model = hf.small_llama(len(tokenizer), hidden_size=64, num_layers=2, max_length=length, pad_id=pad_id)
    if options.sft_steps:
        args = SFTConfig(
            str(folder.parent),
            max_steps=options.sft_steps,
            learning_rate=options.sft_learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=options.sft_steps // 10,
            seed=config.seed + 1,  # other batches than the arms'
            save_strategy="no",
            report_to="none",
            **{name: getattr(config, name) for name in SHARED},
        )
        completions = rows.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
        trainer = SFTTrainer(model, args, train_dataset=completions, processing_class=tokenizer)
        callbacks.show_bar(trainer, "warm-up")
        trainer.train()
    ranks = PartialState()
    if ranks.is_main_process:
        with checkpoints.whole(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
    ranks.wait_for_everyone()
    return str(folder)


def tokenizer_of(start: str, config: TrainerOptions, model: ModelOptions) -> Any:
    """
    Raises:
        ValueError: the tokenizer has no end of sequence, or the model too few positions for max_length, or they cannot
            be loaded.
    """
    code = {"trust_remote_code": config.trust_remote_code, "revision": model.model_revision}
    with hf.loading(start):
        tokenizer = AutoTokenizer.from_pretrained(start, **code)
        of_text = AutoConfig.from_pretrained(start, **code).get_text_config()
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {start!r} must have an end-of-sequence token, it has none")
    positions, length = getattr(of_text, "max_position_embeddings", None), config.max_length
    if positions and (length is None or length > positions):
        raise ValueError(f"max_length must be at most {positions}, the positions of {start!r}, got {length}")
    return tokenizer
