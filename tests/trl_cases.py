"""Tiny models, data and trainers for the tests of GroupRobustDPOTrainer."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
from trl import DPOConfig, DPOTrainer

from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

datasets.disable_progress_bars()
FIXED = {
    "per_device_train_batch_size": 4,
    "learning_rate": 0.05,
    "max_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "optim": "sgd",
}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 300, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def rows(groups: list[Any], column: str = "group") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i}?", "chosen": f" yes {i * i}", "rejected": f" no {i}", column: group}
        for i, group in enumerate(groups)
    ]


def pairs(groups: list[Any], column: str = "group") -> Any:
    return datasets.Dataset.from_list(rows(groups, column))


def tokenizer() -> Any:
    return hf.byte_level_tokenizer([], 300)


def llama(seed: int = 0) -> Any:
    return model_of("Llama", seed, tie_word_embeddings=True)


def model_of(family: str, seed: int = 0, **options: Any) -> Any:
    """With weights as large as a trained model's, so that two models' log-probabilities are far apart."""
    import transformers

    torch.manual_seed(seed)
    known = getattr(transformers, f"{family}Config")(**(SIZES | options))
    model = transformers.AutoModelForCausalLM.from_config(known)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model.eval()


def options_of(**options: Any) -> dict[str, Any]:
    return {"output_dir": tempfile.mkdtemp(), **FIXED, **options}


def trainer(
    model: Any = None,
    reference: Any = "another",
    data: Any = None,
    eval_data: Any = None,
    peft_config: Any = None,
    **options: Any,
) -> GroupRobustDPOTrainer:
    """``reference`` "another": a Llama of its own, else what the trainer is to get."""
    return GroupRobustDPOTrainer(
        llama() if model is None else model,
        llama(1) if isinstance(reference, str) and reference == "another" else reference,
        GroupRobustDPOConfig(**options_of(**options)),
        train_dataset=pairs(["a", "b"] * 4) if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def trl_trainer(
    model: Any = None, reference: Any = "another", data: Any = None, eval_data: Any = None, **options: Any
) -> DPOTrainer:
    return DPOTrainer(
        llama() if model is None else model,
        llama(1) if isinstance(reference, str) and reference == "another" else reference,
        DPOConfig(**options_of(**options)),
        train_dataset=pairs(["all"] * 8) if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer(),
    )


def logged(of: Any, name: str) -> list[float]:
    return [record[name] for record in of.state.log_history if name in record]


def logps_of_logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(2B,) log-probabilities of the completions, from the model's own logits."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    token_logps = logits[:, :-1].double().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (token_logps * batch["completion_mask"][:, 1:]).sum(1)


def first_batch(of: Any, count: int = 3) -> dict[str, Any]:
    return of._prepare_inputs(of.data_collator([of.train_dataset[i] for i in range(count)]))
