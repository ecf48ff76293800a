"""A pytest plugin: TRL's own tests of its DPO trainer, with GroupRobustDPOTrainer in its place.

``make test-trl TRL_TESTS=<a checkout of TRL>/tests`` runs them: `test_trl_own_tests.py`. TRL's tests load models and
data from the hub by names. Here they are directories of those names below the working directory, made small and random,
so that nothing is downloaded; each pair gets a group, as TRL's data have none. ``GRPO_KERNELS_TRL_CLASSES=trl`` leaves
TRL's own classes in place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from small_models import class_of, small_config
from trl import import_utils

from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

HUB = "trl-internal-testing"
MODELS = {  # names below HUB: type of model, options
    "tiny-Cohere2ForCausalLM": ("cohere2", {}),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", {"num_experts_per_tok": 4}),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_experts_per_tok": 4}),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts_per_tok": 4}),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}),
    "tiny-Lfm2ForCausalLM": ("lfm2", {}),
    "tiny-Lfm2ForCausalLM-2.5": ("lfm2", {}),
}
TEMPLATE = (  # with the roles and tools that TRL's data have
    "{%- for message in messages %}{{ '<|' + message.role + '|>' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{%- endfor %}{{ '</s>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)
SENTENCES = [
    ("The sky is", " blue.", " green."),
    ("Two and two make", " four.", " five, I think."),
    ("A cat", "s purr", "s bark"),
]
GROUP_SIZES = {"even": 9, "odd": 8}


def pytest_configure(config: Any) -> None:
    datasets.disable_progress_bars()
    # The tests of another version of TRL ask for other libraries; none of them is there.
    import_utils.__getattr__ = lambda name: _never if name.startswith("is_") else _no_such(name)
    torch.manual_seed(0)
    write_models()
    write_data()
    if os.environ.get("GRPO_KERNELS_TRL_CLASSES", "ours") == "ours":
        trl.DPOConfig, trl.DPOTrainer = Config, Trainer


def _never() -> bool:
    return False


def _no_such(name: str) -> Any:
    raise AttributeError(name)


def write_models() -> None:
    for name, (kind, options) in MODELS.items():
        tokenizer = hf.byte_level_tokenizer([text for triple in SENTENCES for text in triple], 300)
        tokenizer.chat_template = TEMPLATE
        config = small_config(kind)
        tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        for field, value in {**tokens, "pad_token_id": tokenizer.pad_token_id, **options}.items():
            if field != "bos_token_id" or kind not in ("cohere2",):
                setattr(config, field, value)
        folder = Path(HUB, name)
        class_of(kind)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_data() -> None:
    """Folders of Parquet files, whose README says which are which: `datasets` reads them by the hub's name."""
    texts = [dict(zip(("prompt", "chosen", "rejected"), SENTENCES[i % 3], strict=True)) for i in range(17)]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in texts
    ]
    whole = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in texts]
    whole_chats = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in chats]
    write("zen", "standard_preference", texts)
    write("zen", "conversational_preference", chats)
    write("zen", "standard_implicit_prompt_preference", whole)
    write("zen", "conversational_implicit_prompt_preference", whole_chats)
    readme("zen", [name.name for name in sorted(Path(HUB, "zen").iterdir()) if name.is_dir()])
    for name in ("harmony", "toolcall"):
        write(name, "preference", chats)
        readme(name, ["preference"])


def write(name: str, config: str, rows: list[dict[str, Any]]) -> None:
    folder = Path(HUB, name, config)
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list(rows[:2]).to_parquet(folder / "test.parquet")


def readme(name: str, configs: list[str]) -> None:
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    Path(HUB, name, "README.md").write_text("\n".join([*lines, "---", ""]))


class Config(GroupRobustDPOConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.group_sizes = GROUP_SIZES  # which streamed data need


class Trainer(GroupRobustDPOTrainer):
    """Gives each data set a column of groups."""

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        for name in ("train_dataset", "eval_dataset"):
            kwargs[name] = grouped(kwargs.get(name))
        super().__init__(model, ref_model, Config("out") if args is None else args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(grouped(eval_dataset), *args, **kwargs)


def grouped(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: grouped(of_name) for name, of_name in data.items()}
    if data is None or isinstance(data, str) or "group" in (data.column_names or []):
        return data
    if isinstance(data, datasets.Dataset):
        return data.add_column("group", [("even", "odd")[i % 2] for i in range(len(data))])
    return data.map(odd)


def odd(_: dict[str, Any]) -> dict[str, str]:
    return {"group": "odd"}
