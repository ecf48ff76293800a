"""Group-robust DPO and IPO in TRL: `GroupRobustDPOTrainer` is TRL's DPOTrainer for data with a ``group`` column.

    from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer

TRL is imported with this module, and with no other of the package. Where TRL 1.15 to 1.16 computes its loss from
log-probabilities, this trainer computes them by `add_sequence_logps` and the loss by `GroupRobustLoss`; the rest, from
tokenising to checkpoints, stays TRL's.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.losses import GroupRobustLoss
from grpo_kernels.pair_losses import PAIR_LOSSES
from grpo_kernels.segments import segment_sum
from grpo_kernels.types import IGNORE_INDEX, GroupRobustOutput

try:
    import trl
    from accelerate.utils import is_peft_model
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
except ImportError as error:
    raise ImportError("this needs trl, accelerate and datasets: pip install 'grpo-kernels[trl]'") from error

OLDEST, NEWEST_TESTED = (1, 15), (1, 16)
SEAMS = (  # what is overridden or called of TRL's and Transformers' trainers
    "_get_num_items_in_batch",
    "_get_output_dir",
    "_load_optimizer_and_scheduler",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
    "compute_loss",
    "compute_ref_log_probs",
    "log",
    "loss_is_scaled_for_ga",
)
GROUP_ID, GROUP_IDS = "group_id", "group_ids"  # the column of the prepared data, and the batch's entry
STATE_FILE = "group_weights.pt"
TOTALS = ("count", "loss", "accuracy", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "tokens")
SQUARED = ("loss", "accuracy")  # their squares are added up, too, for standard errors


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
    ``label_smoothing`` counts for "sigmoid" too (cDPO), which TRL ignores there. One loss type at a time.
    """

    group_column: str = field(default="group", metadata={"help": "Column with each pair's group, a name or a number."})
    group_step_size: float = field(default=0.01, metadata={"help": "eta, the step size of the group weights alpha."})
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
        metadata={"help": """More options of GroupWeights: a dict (or JSON), such as '{"floor": 0.05}'."""},
    )
    group_sizes: dict[str, int] | str | None = field(
        default=None, metadata={"help": "Pairs of each group, a dict (or JSON); needed for streamed data only."}
    )
    average_log_prob: bool | None = field(
        default=None, metadata={"help": "Average log-probabilities over tokens. By default for 'ipo' only, like TRL."}
    )
    fused_linear: bool | None = field(
        default=None,
        metadata={"help": "Never hold the logits. By default where the model allows it; True raises elsewhere."},
    )
    backend: str = field(default="auto", metadata={"help": "Backend of grpo_kernels."})

    _VALID_DICT_FIELDS: ClassVar = [*DPOConfig._VALID_DICT_FIELDS, "group_options", "group_sizes"]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_options", "group_sizes"):
            if not isinstance(getattr(self, name), dict | None):
                raise TypeError(f"{name} must be a dict, or one as JSON, got {getattr(self, name)!r}")
        if len(self.loss_type) != 1 or self.loss_type[0] not in PAIR_LOSSES:
            raise ValueError(f"loss_type must be one of {list(PAIR_LOSSES)}, got {self.loss_type}")
        others = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
        for name, default in others.items():
            if getattr(self, name) != default:
                raise NotImplementedError(f"{name} must be {default!r} with group weights, got {getattr(self, name)!r}")
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
        if self.average_log_prob is None:
            self.average_log_prob = self.loss_type == ["ipo"]


class GroupRobustDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, trained so that the group that does worst does well.

    Arguments are those of TRL's DPOTrainer. The data sets have a column ``args.group_column`` with each pair's group;
    groups and their sizes are those of the training set.

    Logged beside TRL's metrics (without ``entropy``, ``logits/*`` and ``mean_token_accuracy``, which nothing here
    computes): ``groups/<name>/loss|accuracy|alpha|count`` and ``groups/worst_loss``, in evaluations too, there with the
    standard errors ``loss_se`` and ``accuracy_se`` (of two pairs or more). A tie is half a hit in ``accuracy``.

    Attributes:
        group_names: names in sorted order. group_weights: the `GroupWeights`.

    Raises:
        ValueError: no such column, a group at evaluation that the training set lacks, an encoder-decoder model.
        NotImplementedError: ``fused_linear=True`` for a model that does not allow it; images; tensor parallelism.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole optimizer step
    _tag_names: ClassVar = ["trl", "dpo", "group-robust"]
    _name = "Group Robust DPO"
    args: GroupRobustDPOConfig
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: GroupRobustDPOConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, GroupRobustDPOConfig):
            raise TypeError(f"args must be a GroupRobustDPOConfig, got {type(args).__name__}")
        if not isinstance(model, str):
            hf.check_causal(_causal_model(model))
        if train_dataset is None:
            raise ValueError("train_dataset must be given: groups and their sizes are its own")
        self.group_column = args.group_column
        self.group_names = self._names_of(train_dataset, args)
        prepared = self._each(eval_dataset, self._with_group_ids)
        self._head: hf.Head | None = None
        self._head_known = False
        super().__init__(model, ref_model, args, data_collator, self._with_group_ids(train_dataset), prepared, **kwargs)
        self._check_setup()
        self.data_collator = _WithGroupIds(self.data_collator)
        more: Any = args.group_options or {}
        self.group_weights = GroupWeights(
            group_sizes=self._group_sizes(),
            step_size=args.group_step_size,
            estimator=args.group_estimator,
            update=args.group_update or "inline",
            **more,
        ).to(self.accelerator.device)
        self.loss_fn = GroupRobustLoss(
            self.group_weights, beta=args.beta, loss_type=args.loss_type[0], label_smoothing=args.label_smoothing
        )
        self._totals = {mode: self._no_totals() for mode in ("train", "eval")}
        self._num_tokens = 0
        self._add_sequence_logps()
        if args.group_update == "lagged":
            self.add_callback(_StepWithOptimizer(self.group_weights))

    # -- groups ------------------------------------------------------------------------------------------------

    def _names_of(self, dataset: Any, args: GroupRobustDPOConfig) -> list[str]:
        if args.group_sizes is not None:
            return sorted(args.group_sizes)
        if not hasattr(dataset, "__len__"):
            raise ValueError("args.group_sizes must be given, {name: pairs}, for a train_dataset that is streamed")
        return sorted(set(self._groups_of(dataset)))

    def _groups_of(self, dataset: Any) -> list[str]:
        self._check_column(dataset)
        feature = dataset.features[self.group_column]
        return [_name(group, feature) for group in dataset[self.group_column]]

    def _check_column(self, dataset: Any) -> None:
        columns = dataset.column_names or list(next(iter(dataset)))
        if self.group_column not in columns:
            close = difflib.get_close_matches(self.group_column, columns, n=1)
            hint = f"; is it {close[0]!r}? Pass group_column={close[0]!r} to the config" if close else ""
            raise ValueError(f"the data set must have a column {self.group_column!r}, it has {sorted(columns)}{hint}")
        if {"image", "images"} & set(columns):
            raise NotImplementedError("GroupRobustDPOTrainer takes text only, the data set has images")

    def _with_group_ids(self, dataset: Any) -> Any:
        """The data set with a column of group ids; a new group is an error that names it."""
        self._check_column(dataset)
        feature = (dataset.features or {}).get(self.group_column)
        ids = {name: number for number, name in enumerate(self.group_names)}

        def group_id(pair: dict[str, Any]) -> dict[str, int]:
            name = _name(pair[self.group_column], feature)
            if name not in ids:
                raise ValueError(f"group {name!r} is not in the training data, which has {self.group_names}")
            return {GROUP_ID: ids[name]}

        if hasattr(dataset, "__len__"):
            unseen = Counter(name for name in self._groups_of(dataset) if name not in ids)
            if unseen:
                listed = ", ".join(f"{name!r} ({count} pairs)" for name, count in sorted(unseen.items()))
                raise ValueError(f"groups that the training data lacks: {listed}; it has {self.group_names}")
        return dataset.map(group_id)

    @staticmethod
    def _each(datasets: Any, prepare: Callable[[Any], Any]) -> Any:
        if datasets is None or isinstance(datasets, str):
            return datasets
        return {k: prepare(v) for k, v in datasets.items()} if isinstance(datasets, dict) else prepare(datasets)

    def _group_sizes(self) -> list[int]:
        """Counted after TRL has dropped the pairs whose prompt fills max_length."""
        given: Any = self.args.group_sizes
        if given is not None:
            return [given[name] for name in self.group_names]
        counts = Counter(self.train_dataset[GROUP_ID])
        lost = [name for number, name in enumerate(self.group_names) if not counts[number]]
        if lost:
            raise ValueError(f"max_length={self.args.max_length} leaves no training pair of the groups {lost}")
        return [counts[number] for number in range(len(self.group_names))]

    # -- seams of Trainer and DPOTrainer -----------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if GROUP_ID not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, GROUP_ID]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(self._each(eval_dataset, self._with_group_ids), *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Pairs of the whole optimizer step, over micro-batches and ranks."""
        if self.args.gradient_accumulation_steps == 1:
            return None
        pairs = sum(len(batch[GROUP_IDS]) for batch in batch_samples)
        if self.accelerator.num_processes == 1:
            return pairs
        return self.accelerator.reduce(torch.tensor(pairs, device=self.accelerator.device))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        group_ids, model_inputs = inputs[GROUP_IDS], _model_inputs(inputs)
        labels = _labels(inputs)
        logps = model(**model_inputs, labels=labels, sequence_logps=True)
        if "ref_chosen_logps" in inputs:
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]).to(logps.dtype)
        else:
            ref_model = self.model if self.ref_model is None else self.ref_model
            ref_logps = self._reference_logps(ref_model, inputs)
        lengths = (labels[:, 1:] != IGNORE_INDEX).sum(1).clamp(min=1) if self.args.average_log_prob else 1
        out = self.loss_fn.from_logps(
            logps / lengths,
            group_ids,
            ref_logps / lengths,
            total_pairs=num_items_in_batch if model.training else None,
        )
        self._take_metrics(out, group_ids, logps.detach(), ref_logps, inputs["attention_mask"])
        if not return_outputs:
            return out.loss
        with torch.no_grad():
            return out.loss, model(**model_inputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) log-probabilities (B,) of the reference; TRL precomputes with this."""
        self._add_sequence_logps()
        chosen, rejected = self._reference_logps(model, inputs).chunk(2)
        return chosen, rejected

    def _reference_logps(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            context = _without_adapter(self.accelerator.unwrap_model(self.model))
        with torch.no_grad(), context, self.accelerator.autocast():
            return model(**_model_inputs(inputs), labels=_labels(inputs), sequence_logps=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        named = [name.removesuffix("_runtime") for name in logs if name.endswith("_runtime")]
        prefix = "" if mode == "train" else f"{(named or ['eval'])[0]}_"
        logs.update({f"{prefix}{name}": value for name, value in self._metrics_since_last_log(mode).items()})
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:  # before the rest, so that no whole checkpoint lacks it
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            state = {"group_names": self.group_names, "group_weights": self.group_weights.state_dict()}
            torch.save(state, folder / STATE_FILE)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"the checkpoint must hold {STATE_FILE}, {checkpoint!r} does not: TRL's own trainer wrote it"
            )
        saved = torch.load(path, weights_only=True, map_location="cpu")  # torch has no "cpu:0" of several processes
        if saved["group_names"] != self.group_names:
            raise ValueError(f"the checkpoint's groups {saved['group_names']} are not the data's {self.group_names}")
        self.group_weights.load_state_dict(saved["group_weights"])

    # -- pieces ------------------------------------------------------------------------------------------------

    def _check_setup(self) -> None:
        hf.check_causal(_causal_model(self.accelerator.unwrap_model(self.model)))
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and max(parallel.tp_size, parallel.cp_size) > 1:
            raise NotImplementedError("GroupRobustDPOTrainer runs data parallel only, not tensor or context parallel")
        if getattr(self, "aux_loss_enabled", False):
            raise NotImplementedError("the load-balancing loss of experts is not added: set router_aux_loss_coef=0.0")

    def _add_sequence_logps(self) -> None:
        """Once, before models are wrapped for training; TRL precomputes reference log-probs in its __init__."""
        if self._head_known:
            return
        policy = _causal_model(self.accelerator.unwrap_model(self.model))
        sharded = any(hasattr(parameter, "ds_id") for parameter in policy.parameters())
        if self.args.fused_linear and sharded:
            raise NotImplementedError("ZeRO-3 shards the head: use the logits path, fused_linear=False")
        if self.args.fused_linear:
            self._head = hf.find_head(policy)
        elif self.args.fused_linear is None and not sharded:
            self._head = hf.head_or_none(policy)
        models = [policy]
        if self.ref_model is not None:
            models.append(_causal_model(self.accelerator.unwrap_model(self.ref_model)))
        for model in models:
            hf.add_sequence_logps(model, self._head, backend=self.args.backend)
        self._head_known = True

    def _no_totals(self) -> Tensor:
        columns = len(TOTALS) + len(SQUARED)
        return torch.zeros(len(self.group_names), columns, dtype=torch.float64, device=self.accelerator.device)

    @torch.no_grad()
    def _take_metrics(
        self, out: GroupRobustOutput, group_ids: Tensor, logps: Tensor, ref_logps: Tensor, attention_mask: Tensor
    ) -> None:
        """Add the batch to the sums of each group, on the device; `log` reads them."""
        mode = "train" if self.model.training else "eval"
        rewards = self.args.beta * (logps - ref_logps)  # TRL's: of sums, whether the loss averages or not
        chosen, rejected = rewards.chunk(2)
        losses, tokens = out.pair_losses.detach(), attention_mask.sum(1).view(2, -1).sum(0)
        hits = 0.5 * ((chosen > rejected).double() + (chosen >= rejected).double())  # a tie is half a hit
        columns = (torch.ones_like(losses), losses, hits, chosen, rejected, *logps.chunk(2), tokens)
        columns += tuple(columns[TOTALS.index(name)].double().square() for name in SQUARED)
        rows = torch.stack([column.double() for column in columns], 1)
        if mode == "eval":  # without the pairs that fill up the last batch of several ranks
            rows, group_ids = self.accelerator.gather_for_metrics((rows, group_ids))
        for column, total in zip(rows.unbind(1), self._totals[mode].unbind(1), strict=True):
            total += segment_sum(column, group_ids, len(self.group_names))

    def _metrics_since_last_log(self, mode: str) -> dict[str, float]:
        """Means since the last log, by one copy to the host (in training after one sum over ranks)."""
        totals, self._totals[mode] = self._totals[mode], self._no_totals()
        if mode == "train":
            totals = self.accelerator.reduce(totals)
        else:  # training has gone on since its last log
            unlogged_tokens = self.accelerator.reduce(self._totals["train"][:, TOTALS.index("tokens")].sum())
        table = torch.cat([totals, self.group_weights.alpha.unsqueeze(1)], 1).tolist()
        everything = dict(zip(TOTALS, map(sum, zip(*table, strict=True)), strict=False))
        pairs = everything["count"]
        if not pairs:
            return {}
        metrics: dict[str, float] = {name: everything[name] / pairs for name in TOTALS[3:7]}
        metrics["rewards/accuracies"] = everything["accuracy"] / pairs
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        num_tokens = self._num_tokens + int(everything["tokens"] if mode == "train" else unlogged_tokens)
        if mode == "train":
            self._num_tokens = num_tokens
        metrics["num_tokens"] = num_tokens
        for name, (count, loss, accuracy, *_, loss_squares, accuracy_squares, alpha) in zip(
            self.group_names, table, strict=True
        ):
            metrics |= {f"groups/{name}/alpha": alpha, f"groups/{name}/count": count}
            if count:
                metrics |= {f"groups/{name}/loss": loss / count, f"groups/{name}/accuracy": accuracy / count}
            if count > 1 and mode == "eval":
                metrics[f"groups/{name}/loss_se"] = _standard_error(count, loss, loss_squares)
                metrics[f"groups/{name}/accuracy_se"] = _standard_error(count, accuracy, accuracy_squares)
        metrics["groups/worst_loss"] = max(loss / count for count, loss, *_ in table if count)
        return metrics


class _WithGroupIds:
    """A collator's batch, and the group ids of its pairs."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        group_ids = torch.tensor([pair[GROUP_ID] for pair in pairs])
        return {**self.collator(pairs), GROUP_IDS: group_ids}


class _StepWithOptimizer(TrainerCallback):
    def __init__(self, group_weights: GroupWeights) -> None:
        self.group_weights = group_weights

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.group_weights.step()


def _standard_error(count: float, total: float, squares: float) -> float:
    """Of the mean of ``count`` > 1 numbers with this sum and sum of squares."""
    return math.sqrt(max(0.0, squares - total * total / count) / (count * (count - 1)))


def _name(group: Any, feature: Any) -> str:
    return feature.int2str(group) if hasattr(feature, "int2str") else str(group)


def _causal_model(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    others = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", GROUP_IDS}
    return {name: value for name, value in inputs.items() if name not in others}


def _labels(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """A PEFT model as its reference: the adapter "ref" where TRL has put a copy, else none."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)
