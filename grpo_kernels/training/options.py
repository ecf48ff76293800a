"""The options of `python -m grpo_kernels train`: ours, those of the trainer's config, and TRL's of the model."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from trl import ModelConfig, TrlParser

from grpo_kernels import validation
from grpo_kernels.functional import preference_losses
from grpo_kernels.integrations import datasets as pairs
from grpo_kernels.integrations.trl import GroupRobustDPOConfig


def _option(default: Any, help_text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **more})


@dataclass
class TrainOptions:
    """What `train` adds to the trainer's options."""

    _argument_group_name: ClassVar[str] = "what to train on and what to show"

    data: str = _option(
        pairs.MADE_UP,
        "JSONL, JSON, CSV or Parquet file (.gz too) in one of TRL's preference formats with a group column, a "
        f"directory, {pairs.MADE_UP!r} or {pairs.POLIS!r}, which come with this, or a name on the Hugging Face hub",
    )
    eval_data: str | None = _option(None, "the same, to evaluate on; default: a part of the data, from each group")
    eval_fraction: float = _option(0.2, "that part")
    split_by: str | None = _option(None, "column whose equal values stay on one side (prompt, voter)")
    on_bad_row: str = _option("error", "a tie or an empty answer: stop, or leave it out", choices=["error", "skip"])
    compare: bool = _option(False, "three arms from one start: plain, IS (uniform weights, importance sampled), robust")
    samples: int = _option(0, "answers of each arm to show, to that many held-out prompts")
    sample_tokens: int = _option(48, "tokens of such an answer at most")
    early_stopping_patience: int | None = _option(None, "stop after so many evaluations without a better worst group")
    sft_steps: int = _option(120, "without --model: steps of warm-up on the chosen answers")
    sft_learning_rate: float = _option(1e-3, "of the warm-up")
    resume: bool = _option(False, "go on with the run in --out, with its own options")

    def __post_init__(self) -> None:
        validation.check_number("eval_fraction", self.eval_fraction, 0.0, 1.0, open_low=True, open_high=True)
        validation.check_number("sft_learning_rate", self.sft_learning_rate, 0.0, open_low=True)
        for name, least in (("samples", 0), ("sample_tokens", 1), ("sft_steps", 0), ("early_stopping_patience", 1)):
            if getattr(self, name) is not None:
                validation.check_whole_number(name, getattr(self, name), least)
        for name in ("eval_fraction", "split_by"):
            self.check_idle(name, self.eval_data is None, "data that is split, without eval_data")
        self.check_idle("sample_tokens", self.samples > 0, "samples")

    def check_idle(self, name: str, has_meaning: bool, beside: str) -> None:
        """
        Raises:
            ValueError: an option that is not left at its default would be ignored.
        """
        value = getattr(self, name)
        if value and value != self.__dataclass_fields__[name].default and not has_meaning:
            raise ValueError(f"{name} has a meaning beside {beside} only, got {value!r}")


@dataclass
class TrainerOptions(GroupRobustDPOConfig):
    """The trainer's config, --out for its folder and --loss for its losses."""

    _argument_group_name: ClassVar[str] = "the trainer (group_* and backend are last)"

    output_dir: str | None = _option(None, "folder for checkpoints and results", aliases=["--out"])
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "pair losses by name, added up with --loss_weights; `grpo_kernels doctor --losses` lists them",
            "aliases": ["--loss"],
        },
    )


@dataclass
class ModelOptions(ModelConfig):
    """TRL's options of the model, and --model for its name."""

    _argument_group_name: ClassVar[str] = "the model"

    model_name_or_path: str | None = _option(
        None, "directory, or name on the hub; default: a small Llama with random weights", aliases=["--model"]
    )


DEFAULTS = {  # where this command has a reason to differ from TRL
    "group_step_size": None,  # 0.05 / (loss at margin 0)
    "precompute_ref_log_probs": True,  # once for all arms, and no second model in memory
    "logging_steps": 1,  # alpha of each step is in the picture
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "eval_on_start": True,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "groups/worst_loss",
    "greater_is_better": False,
    "restore_callback_states_from_checkpoint": True,  # the patience of early stopping
    "disable_tqdm": False,
    "log_level": "error",
}
ON_CPU = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False}
SMALL_MODEL = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "max_steps": 120,
    "eval_steps": 0.2,
    "save_steps": 0.2,
    "learning_rate": 1e-3,
    "warmup_steps": 12,
    "max_length": 256,
    "gradient_checkpointing": False,
}


def parse(arguments: list[str]) -> tuple[TrainOptions, TrainerOptions, ModelOptions]:
    """
    Raises:
        ValueError: an option is unknown, or its value breaks a rule; the message names it.
        SystemExit: --help, or a value of another type (argparse).
    """
    parser = TrlParser((TrainOptions, TrainerOptions, ModelOptions), prog="grpo_kernels train", allow_abbrev=False)
    on_cpu = {} if torch.accelerator.is_available() else ON_CPU
    parser.set_defaults_with_config(output_dir=f"runs/{datetime.now():%Y%m%d-%H%M%S}", **DEFAULTS, **on_cpu)
    _check_file_of_options(arguments)
    options, config, model = _parsed(parser, arguments)
    if model.model_name_or_path is None:
        parser.set_defaults_with_config(**SMALL_MODEL)
        options, config, model = _parsed(parser, arguments)
    for name in ("sft_steps", "sft_learning_rate"):
        options.check_idle(name, model.model_name_or_path is None, "the small model, without --model,")
    elsewhere = {"rule", "step_size"} & set(config.group_options or {})
    at_zero = loss_at_zero(config)
    if config.group_step_size is None and not elsewhere and 0 < at_zero < torch.inf:
        config.group_step_size = 0.05 / at_zero  # in its units DPO and IPO move alpha alike
    return options, config, model


def _parsed(parser: TrlParser, arguments: list[str]) -> Any:
    """
    Raises:
        ValueError: a value breaks a rule; where TRL or Transformers names no option, all that were given.
    """
    try:
        return parser.parse_args_and_config(list(arguments))  # which takes --config out
    except Exception as error:
        given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
        said = " ".join(str(error).split())
        if given.isdisjoint(re.findall(r"\w+", said)):
            said = f"{said.rstrip('.')}, with the options {shlex.join(arguments)}"
        raise ValueError(said) from error


def _check_file_of_options(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: nothing comes after --config, or what is no YAML file with options by name.
    """
    if "--config" not in arguments:
        return
    path = next(iter(arguments[arguments.index("--config") + 1 :]), None)
    if path is None:
        raise ValueError("config must be a YAML file, got nothing after --config")
    try:
        options = yaml.safe_load(Path(path).read_text())
    except Exception as error:  # no file, no UTF-8, no YAML, too deep; values that are not what their tags say
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"config must be a YAML file, {path!r} is not: {reason}") from error
    if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
        raise ValueError(f"config must hold options by name, {path!r} holds {options!r}")


def loss_at_zero(config: GroupRobustDPOConfig) -> float:
    """The pair loss of a policy that is its reference: log 2 for "sigmoid", 1 / (4 beta^2) for "ipo".

    Of losses without a reference it is that of log-probabilities of 0, which may be 0 or not finite.
    """
    options = {name: getattr(config, name) for name in ("beta", "loss_type", "label_smoothing")}
    return preference_losses(torch.zeros(2), token_counts=torch.ones(2), **options, **config.spec_options()).item()
