"""Trainers of a tiny model in float64, for tests that compare two runs, and by how much those may differ.

test_trl.py and test_trl_ranks.py import it where TRL and PEFT are installed.
"""

from __future__ import annotations

import copy
from typing import Any

import datasets
import peft
import torch
import transformers
import trl_cases

from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

GROUPS = ["rare", "usual", "usual", "other"]  # the group of pair i is GROUPS[i % 4]

# Two runs that differ in nothing but the order of their sums. In float64 a sum of n terms is off by at most n eps
# of the sum of their magnitudes, and none here has more than 4096 (9 pairs of 64 positions, 300 logits). A step of
# SGD adds rate times that, of a gradient clipped to 1, and lets what is there grow by 1 + rate * curvature, less
# than 1.5 by far: after 8 steps 1e-2 * 4096 * 2**-52 * (1.5**8 - 1) / 0.5 < 1e-12. Log-probabilities are about -60,
# hence 100 times that.
EXACT = 1e-10
# Trainer adds up its losses in float32, whatever their dtype: a few roundings of 2**-24.
LOGGED = 4 * 2**-24
# TRL's log-probabilities are float32: sums of at most 14 tokens, near -60, off by 14 * 2**-19 < 3e-5 each, four of
# them in a margin. The slopes of the losses below are then off by less than 4e-5 of themselves, and so are the
# steps, which move parameters by less than 0.02 together.
AS_TRL, AS_TRL_LOGS = 1e-6, 4e-5


def pairs(count: int = 24, first: int = 0) -> Any:
    rows = [
        {
            "prompt": f"{i}?",
            "chosen": f" yes {i * i}" + "!" * (i % 3),
            "rejected": f" no {i}",
            "group": GROUPS[i % 4],
        }
        for i in range(first, first + count)
    ]
    return datasets.Dataset.from_list(rows)


def llama() -> Any:
    torch.manual_seed(0)
    return hf.small_llama(300, hidden_size=32, num_layers=1, max_length=64, pad_id=0)


def gpt2() -> Any:
    """In float64 from end to end, where Llama's norms and rotary angles are float32 whatever its dtype is."""
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none, pad_token_id=0)).double()


def config(folder: Any, cls: type = GroupRobustDPOConfig, **options: Any) -> Any:
    if cls is GroupRobustDPOConfig:
        options = {"group_step_size": 0.5, **options}
    fixed = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "max_steps": 6,
    }
    return cls(**(trl_cases.FIXED | fixed | options))


def trainer(folder: Any, *, model: Any = None, data: Any = None, eval_data: Any = None, **options: Any) -> Any:
    """Of a tiny model and its copy as the reference, which differ a little, so that no margin is 0."""
    model = gpt2() if model is None else model
    reference = None
    if not isinstance(model, peft.PeftModel) and not options.get("precompute_ref_log_probs"):
        reference = shaken(copy.deepcopy(model))
    return GroupRobustDPOTrainer(
        model=model,
        ref_model=reference,
        args=config(folder, **options),
        train_dataset=pairs() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer(),
    )


def tokenizer() -> Any:
    return hf.byte_level_tokenizer([], 300)


def shaken(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def parameters(of: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in of.model.named_parameters() if value.requires_grad}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = EXACT) -> None:
    assert a.keys() == b.keys()
    start = dict(gpt2().named_parameters())
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")
    moved = max((value - start[name]).abs().max() for name, value in a.items())
    assert moved > 1000 * tolerance, "training moves parameters far more than the tolerance"


def steps(of: Any, name: str) -> list[float]:
    return [record[name] for record in of.state.log_history if name in record]
