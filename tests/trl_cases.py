"""Tiny models, data and trainers for the tests of GroupRobustDPOTrainer."""

from __future__ import annotations

import tempfile
from typing import Any

import datasets
import torch
from torch.utils._python_dispatch import TorchDispatchMode
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


def policy_logps(of: Any, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(2B,) log-probabilities, by the forward that computes the loss."""
    out = of._loss_in_forward(model, batch, torch.zeros(2 * len(batch["group_ids"]))).output
    return torch.cat([out.chosen_logps, out.rejected_logps]).double()


PRODUCTS = [torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.matmul]


class HeadProducts(TorchDispatchMode):
    """Counts the rows of matrix products with a head of ``vocab_size`` while it is on, inside our operators, too.

    ``rows`` holds those of the policy, ``of_reference`` those whose operand is the reference's head.
    """

    def __init__(self, vocab_size: int, reference: torch.Tensor | None = None) -> None:
        super().__init__()
        self.vocab_size, self.rows, self.of_reference = vocab_size, 0, 0
        self.reference = None if reference is None else reference.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "grpo_kernels":
            with self:  # the operator's body, past the dispatch that has come here
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if left.dim() == right.dim() == 2:
                self._count(left, right)
        return function(*args, **(kwargs or {}))

    def _count(self, left: torch.Tensor, right: torch.Tensor) -> None:
        sizes = [*left.shape, right.shape[1]]
        if self.vocab_size not in sizes:
            return
        rows = sizes[1] if sizes[0] == self.vocab_size else sizes[0]  # of dweight they are what is summed over
        if self.reference in {x.untyped_storage().data_ptr() for x in (left, right)}:
            self.of_reference += rows
        else:
            self.rows += rows
