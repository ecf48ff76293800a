"""GroupRobustDPOConfig: TRL's options, those of the group weights, and which of TRL's are refused."""

from __future__ import annotations

import inspect
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from grpo_kernels import validation
from grpo_kernels.groups.rules import ALPHA_RULES
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.kernels.linear_plan import PLANS
from grpo_kernels.loss_spec import LossSpec
from grpo_kernels.types import ESTIMATORS, UPDATE_MODES

try:
    import trl
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise ImportError("this needs trl, accelerate and datasets: pip install 'grpo-kernels[trl]'") from error

from grpo_kernels.integrations.trl.data import PAIR_OPTIONS

OLDEST, NEWEST_TESTED = (1, 15), (1, 16)
SEAMS = (  # what is overridden or called of TRL's and Transformers' trainers
    "_get_num_items_in_batch",
    "_get_output_dir",
    "_load_optimizer_and_scheduler",
    "_prepare_dataset",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "compute_ref_log_probs",
    "evaluation_loop",
    "log",
    "loss_is_scaled_for_ga",
    "prediction_step",
    "training_step",
)
READ_BY_TRL = {"tools", "chat_template_kwargs", "image", "images", "ref_chosen_logps", "ref_rejected_logps"}
NOT_YOURS = ("num_groups", "process_group", "gradient_reduction", "of_rule")  # of GroupWeights' options
STEP_SIZE = 0.01  # of the group weights, where neither group_step_size nor group_options says it

# TRL's and Transformers' options that a loss with groups can't honour: the values that are taken, and why no other.
# Those below the line TRL's own DPOTrainer ignores.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": ((False,), "the step that ran out of memory has moved alpha already"),
    # ----
    "padding_free": ((False,), "TRL has given it up for the time being"),
    "label_smoothing_factor": ((0.0,), "it is of cross-entropy: use label_smoothing"),
    "label_names": ((None, ["labels"]), "the collator gives none"),
    "average_tokens_across_devices": ((True,), "pairs are counted over all devices"),
    "use_cache": ((False,), "a training forward fills no cache"),
}
# What has a meaning beside another option only: its default, and the other's name and value.
BESIDE: dict[str, tuple[float, str, str]] = {
    "discopop_tau": (0.05, "loss_type", "discopop"),
    "f_alpha_divergence_coef": (0.5, "f_divergence_type", "alpha_divergence"),
}
DICTS = (
    *("group_options", "group_sizes", "model_init_kwargs", "lr_scheduler_kwargs"),
    *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
)
OF_THE_LOSS = ("loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "discopop_tau")


def check_version(version: str, trainer: type) -> None:
    """
    Raises:
        ImportError: this TRL is too old, of another major version, or lacks something that is overridden here.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2])
    supported = f"{OLDEST[0]}.{OLDEST[1]} <= trl < {OLDEST[0] + 1}"
    if not OLDEST <= numbers < (OLDEST[0] + 1,):
        raise ImportError(f"GroupRobustDPOTrainer needs {supported}, got {version}: pip install 'grpo-kernels[trl]'")
    missing = [name for name in SEAMS if not hasattr(trainer, name)]
    if missing:
        tested = f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}"
        raise ImportError(f"trl {version} has changed: its DPOTrainer lacks {missing}. Tested up to trl {tested}")


check_version(trl.__version__, DPOTrainer)


@dataclass
class GroupRobustDPOConfig(DPOConfig):
    """TRL's DPOConfig, and the options of the group weights.

    TRL's conventions hold: ``loss_type="ipo"`` averages log-probabilities over tokens, so its beta is per token.
    ``label_smoothing`` counts for "sigmoid" too (cDPO), which TRL ignores there; without a meaning it is an error.
    All of TRL's loss types but "aot", one or several with ``loss_weights``, and losses of `grpo_kernels.pair_losses`
    that TRL lacks. With groups each pair has a loss of its own: "sft" is the mean over the pair's tokens, not over the
    batch's, and ``ld_alpha`` weighs its tokens, too. An option of TRL's that can't be honoured is an error (`REFUSED`).
    """

    group_column: str = field(default="group", metadata={"help": "Column with each pair's group, a name or a number."})
    group_step_size: float | str | None = field(
        default=None,
        metadata={
            "help": "eta, the step size of the group weights alpha, or 'auto' to have it chosen; by default 0.01. Of "
            "the default rule.",
            "aliases": ["--step-size"],
        },
    )
    group_baseline: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "What alpha measures a group's loss against: 'running', a dict of losses by group (or JSON), or "
            "the results.json of a run of `train`, of which each group's lowest evaluation loss is taken.",
            "aliases": ["--baseline"],
        },
    )
    group_update: str | None = field(
        default=None,
        metadata={
            "help": "When alpha moves: 'inline' (each batch moves it before it is weighed, as in the paper) or "
            "'lagged' (once beside the optimizer's step). By default inline, lagged with gradient accumulation."
        },
    )
    group_estimator: str = field(default="importance", metadata={"help": "'importance' or 'group_mean'."})
    group_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More options of GroupWeights, a dict (or JSON), such as '{\"floor\": 0.05}' or another rule: "
            '\'{"rule": "soft_maximum", "temperature": 0.2}\'.'
        },
    )
    group_sizes: dict[str, int] | str | None = field(
        default=None,
        metadata={"help": "Pairs of each group, a dict (or JSON). Streamed data need it; others are counted."},
    )
    weight_column: str | None = field(default=None, metadata={"help": "Column with a weight >= 0 of each pair's loss."})
    margin_column: str | None = field(
        default=None, metadata={"help": "Column with each pair's margin: subtracted from the difference of log-ratios."}
    )
    beta_column: str | None = field(default=None, metadata={"help": "Column with a beta > 0 of each pair's own."})
    label_smoothing_column: str | None = field(
        default=None,
        metadata={"help": "Column with each pair's soft label in [0, 1]: 1 - the probability that chosen is better."},
    )
    alpha_follows: str = field(
        default="loss",
        metadata={
            "help": "What moves alpha where loss_type lists 'sft' beside other losses: 'loss', the whole weighted sum, "
            "or 'preference', the sum without it."
        },
    )
    average_log_prob: bool | None = field(
        default=None, metadata={"help": "Average log-probabilities over tokens. By default for 'ipo' only, like TRL."}
    )
    log_token_metrics: bool = field(
        default=False,
        metadata={
            "help": "Log TRL's entropy, logits/chosen, logits/rejected and mean_token_accuracy, from the same pass."
        },
    )
    fused_linear: bool | None = field(
        default=None,
        metadata={"help": "Never hold the logits. By default where the model allows it; True raises elsewhere."},
    )
    linear_plan: str = field(
        default="auto",
        metadata={
            "help": "What the linear path keeps for the backward: 'auto', the fastest that fits, or 'sweep', 'keep' or "
            "'recompute'."
        },
    )
    max_extra_bytes: int | None = field(
        default=None,
        metadata={"help": "Memory for the linear path's logits; by default 1/16 of a GPU's, 1/32 of the machine's."},
    )
    backend: str = field(default="auto", metadata={"help": "Backend of grpo_kernels."})

    _VALID_DICT_FIELDS: ClassVar = [*DPOConfig._VALID_DICT_FIELDS, "group_options", "group_sizes", "group_baseline"]

    def __post_init__(self) -> None:
        self._check_json()
        self._check_types()
        super().__post_init__()
        self.is_of_group_trainer = False  # GroupRobustDPOTrainer sets it; no field, so that no log or file has it
        self._check_dicts()
        self._check_step_size()
        self._check_losses()
        self._check_groups()
        self._check_accumulation()
        validation.check_choice("linear_plan", self.linear_plan, PLANS)
        if self.max_extra_bytes is not None:
            validation.check_whole_number("max_extra_bytes", self.max_extra_bytes, 0)
        if self.average_log_prob is None:
            self.average_log_prob = self.loss_type == ["ipo"]

    @property
    def pair_columns(self) -> dict[str, str]:
        """The columns of per-pair numbers: what they are to the loss, and their names."""
        named = {role: getattr(self, option) for role, option in PAIR_OPTIONS.items()}
        return {role: column for role, column in named.items() if column is not None}

    @property
    def linear_bytes(self) -> int | str:
        return "auto" if self.max_extra_bytes is None else self.max_extra_bytes

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """
        Raises:
            TypeError: another trainer asks, in front of its first step. It would train without groups, and say nothing.
        """
        if not self.is_of_group_trainer:
            raise TypeError(
                "a GroupRobustDPOConfig must be given to a GroupRobustDPOTrainer: another trainer ignores the groups"
            )
        return super().get_warmup_steps(num_training_steps)

    def check_logits_path(self) -> None:
        """
        Raises:
            ValueError: an option of the linear path, where logits are held.
        """
        if self.linear_plan != "auto" or self.max_extra_bytes is not None:
            raise ValueError(
                "linear_plan and max_extra_bytes must be left out on the logits path (fused_linear=False, or a model "
                f"whose head is no plain matrix in memory), got {self.linear_plan!r} and {self.max_extra_bytes}"
            )

    def spec_options(self) -> dict[str, Any]:
        """Of the loss, beside its type: they have TRL's names. WPO's weights the trainer makes itself, like TRL's."""
        return {name: getattr(self, name) for name in OF_THE_LOSS}

    def group_weights_options(self, group_names: list[str]) -> dict[str, Any]:
        """All that GroupWeights takes but the group sizes."""
        options = {**self._given_options(), "estimator": self.group_estimator, "update": self.group_update or "inline"}
        if self.group_baseline is not None:
            options["baseline"] = _baseline(self.group_baseline, group_names)
        if self.group_step_size is not None:
            return {**options, "step_size": self.group_step_size}
        of_default_rule = options.get("rule", "exponentiated_gradient") == "exponentiated_gradient"
        return {"step_size": STEP_SIZE, **options} if of_default_rule else options

    def _given_options(self) -> dict[str, Any]:
        assert not isinstance(self.group_options, str)  # TrainingArguments has parsed it, _check_dicts looked
        return self.group_options or {}

    def _check_json(self) -> None:
        """TrainingArguments reads it and says where it is broken, but not which option's."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{name} must be a dict as JSON, got {value[:100]!r}: {error}") from None

    def _check_types(self) -> None:
        """What a file of options may hold, and TRL's own checks read without a look."""
        for name in ("loss_type", "loss_weights"):
            value = getattr(self, name)
            if not isinstance(value, str | list | tuple | None):
                raise TypeError(f"{name} must be a list, got {value!r}")
        if not isinstance(self.group_column, str):
            raise TypeError(f"group_column must be a column's name, got {self.group_column!r}")
        multiple = getattr(self, "pad_to_multiple_of", None)
        if isinstance(multiple, str) and not multiple.isdecimal() and multiple.lower() not in ("auto", "none", "null"):
            raise ValueError(f"pad_to_multiple_of must be a whole number, auto or none, got {multiple!r}")

    def _check_dicts(self) -> None:
        for name in DICTS:
            value = getattr(self, name, None)  # older versions have fewer
            if not isinstance(value, dict | None):
                raise TypeError(f"{name} must be a dict, or one as JSON, got {value!r}")
        sizes: Any = self.group_sizes or {}
        for name, size in sizes.items():
            if not isinstance(name, str):
                raise TypeError(f"group_sizes must have names, which are strings (of numbers, too), got {name!r}")
            validation.check_whole_number(f"group_sizes[{name!r}]", size, 1)

    def _check_step_size(self) -> None:
        if isinstance(self.group_step_size, str) and self.group_step_size != "auto":  # of a command line
            try:
                self.group_step_size = float(self.group_step_size)
            except ValueError:
                raise ValueError(f"group_step_size must be a number or 'auto', got {self.group_step_size!r}") from None
        if self.group_step_size not in (None, "auto"):
            validation.check_number("group_step_size", self.group_step_size, 0.0)

    def _check_losses(self) -> None:
        for name, (taken, reason) in REFUSED.items():
            value = getattr(self, name, taken[0])  # older versions have fewer
            if value not in taken:
                raise NotImplementedError(f"{name} must be {taken[0]!r} with group weights ({reason}), got {value!r}")
        for name, (default, other, needed) in BESIDE.items():
            if getattr(self, name) != default and needed not in getattr(self, other):
                raise ValueError(f"{name} has a meaning for {other}={needed!r} only, got {getattr(self, name)!r}")
        if self.ld_alpha is not None:
            validation.check_number("ld_alpha", self.ld_alpha, 0.0, 1.0)
        if self.use_weighting and self.ld_alpha is not None:
            raise NotImplementedError(
                f"use_weighting must be False with ld_alpha, got ld_alpha={self.ld_alpha}: WPO's weights are "
                "likelihoods of whole answers"
            )
        spec = LossSpec.of(self.loss_type, **self.spec_options())
        spec.check_label_smoothing(self.label_smoothing)
        for option, has_meaning in (
            ("label_smoothing_column", any(entry.uses_label_smoothing for entry in spec.entries)),
            ("margin_column", spec.of_margin),
        ):
            if getattr(self, option) is not None and not has_meaning:
                raise ValueError(
                    f"{option} has no meaning for loss_type={self.loss_type}, got {getattr(self, option)!r}"
                )
        if "ipo" in self.loss_type and len(self.loss_type) > 1:
            raise NotImplementedError(
                f"loss_type='ipo' must be alone, got {self.loss_type}: TRL averages its log-probabilities over tokens"
            )

    def _check_groups(self) -> None:
        validation.check_choice("group_estimator", self.group_estimator, ESTIMATORS)
        if self.group_update is not None:
            validation.check_choice("group_update", self.group_update, UPDATE_MODES)
        known = {*inspect.signature(GroupWeights).parameters, *(rule.parameter for rule in ALPHA_RULES.values())}
        elsewhere = {name: f"group_{name}" for name in ("estimator", "update", "baseline")}
        elsewhere["group_sizes"] = "group_sizes"
        if self.group_step_size is not None:
            elsewhere["step_size"] = "group_step_size"
        for name in self._given_options():
            if name in elsewhere:
                raise ValueError(f"group_options must not hold {name!r}: it is the option {elsewhere[name]}")
            if name not in known or name in NOT_YOURS:
                raise ValueError(f"group_options must hold options of GroupWeights that are left to you, got {name!r}")
        columns = [self.group_column, *self.pair_columns.values()]
        of_trl = sorted(READ_BY_TRL & set(columns))
        if of_trl:
            raise ValueError(f"group_column and the columns of numbers must be none that TRL reads, got {of_trl}")
        if len(set(columns)) < len(columns):
            raise ValueError(f"{['group_column', *PAIR_OPTIONS.values()]} must be columns apart, got {columns}")

    def _check_accumulation(self) -> None:
        accumulates = self.gradient_accumulation_steps > 1
        if self.group_update is None:
            self.group_update = "lagged" if accumulates else "inline"
        if accumulates and self.group_update == "inline":
            raise ValueError(
                "group_update='inline' needs the whole batch in one forward, got gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: use group_update='lagged' (the default with accumulation), which "
                "moves alpha once an optimizer step from all its pairs"
            )
        if accumulates and self.group_estimator != "importance":
            raise ValueError(
                f"group_estimator must be 'importance' with gradient accumulation, got {self.group_estimator!r}"
            )


def _baseline(given: dict[str, float] | str, group_names: list[str]) -> list[float] | str:
    """What GroupWeights takes, of ``group_baseline``.

    Raises:
        ValueError: it is no file, or lacks a group, or knows another.
    """
    if given == "running":
        return given
    losses: dict[str, float] = {}
    if isinstance(given, str):
        if not os.path.isfile(given):
            raise ValueError(f"group_baseline must be 'running', a dict of losses, or a results.json, got {given!r}")
        try:
            runs = json.loads(Path(given).read_text())["runs"].values()
            for scores in (run[when]["groups"] for run in runs for when in ("best", "last")):
                for name, score in scores.items():
                    losses[name] = min(losses.get(name, math.inf), score["loss"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"group_baseline must be a results.json of `train`, {given!r} is none: {error!r}"
            ) from error
    else:
        losses = given
    if set(losses) != set(group_names):
        raise ValueError(f"group_baseline must have a loss for each of the groups {group_names}, got {sorted(losses)}")
    return [losses[name] for name in group_names]
