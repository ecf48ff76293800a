"""GroupRobustDPOTrainer: where TRL's trainer computes a loss, this one computes the groups'."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from torch import Tensor
from transformers import TrainerCallback
from trl import DPOTrainer

from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl import data as of_data
from grpo_kernels.integrations.trl import models
from grpo_kernels.integrations.trl.config import GroupRobustDPOConfig
from grpo_kernels.integrations.trl.data import GROUP_IDS, GroupCollator, GroupColumn
from grpo_kernels.integrations.trl.metrics import BatchMetrics, GroupTotals
from grpo_kernels.types import IGNORE_INDEX, TokenMetrics

STATE_FILE = "group_weights.pt"


class GroupRobustDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, trained so that the group that does worst does well.

    Arguments are those of TRL's DPOTrainer; ``ref_model`` may be a name, too. The data sets have a column
    ``args.group_column`` with each pair's group; groups and their sizes are those of the training set.

    ``loss`` and ``eval_loss`` are plain means of pair losses, ``objective`` is the weighted loss that is minimised.
    Logged beside TRL's metrics (``entropy``, ``logits/*`` and ``mean_token_accuracy`` with ``log_token_metrics=True``
    only): ``groups/<name>/loss|accuracy|alpha|count`` and ``groups/worst_loss``, in evaluations too, there with the
    standard errors ``loss_se`` and ``accuracy_se`` (of two pairs or more); in training the numbers of
    `GroupWeights.diagnose`, too, whose warnings are given once. A tie is half a hit in ``accuracy``. The
    balancing loss of experts (``router_aux_loss_coef``) is added to the loss outside alpha and logged as ``aux_loss``.

    Attributes:
        group_names: names in sorted order. group_weights: the `GroupWeights`.

    Raises:
        ValueError: no such column, a group that is missing or, at evaluation, unknown to the training set, an
            encoder-decoder model, a reference that shares parameters with the policy or cannot read its tokens.
        NotImplementedError: ``fused_linear=True`` for a model that does not allow it; tensor or context parallelism.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole optimizer step
    _tag_names: ClassVar = ["trl", "dpo", "group-robust"]
    _name = "Group Robust DPO"
    args: GroupRobustDPOConfig
    data_collator: Any
    _signature_columns: Any
    aux_loss_enabled: bool

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
        if args is None:
            args = GroupRobustDPOConfig(f"{models.name_of(model)}-group-robust-DPO")
        if not isinstance(args, GroupRobustDPOConfig):
            raise TypeError(f"args must be a GroupRobustDPOConfig, got {type(args).__name__}")
        args.is_of_group_trainer = True
        if train_dataset is None:
            raise ValueError("`train_dataset` is required: groups and their sizes are its own")
        if not isinstance(model, str):
            hf.check_causal(models.causal_model(model))
            models.check_reference_is_known(model, ref_model, args, kwargs.get("peft_config"))
            if is_peft_model(model) and ref_model is None:
                models.check_adapters(model)
        if isinstance(ref_model, str):
            ref_model = models.model_called(ref_model, model, args)
        self.group_column = GroupColumn(args.group_column)
        train_dataset = of_data.unformatted(train_dataset, "train_dataset")
        self.group_names = self._names_of(train_dataset, args)
        of_data.warn_of_near_equal(self.group_names)
        self._pair_columns = args.pair_columns
        self._head: hf.Head | None = None
        self._heads_known = False
        train_dataset = self._with_groups(train_dataset, "train_dataset")
        eval_dataset = of_data.each(eval_dataset, "eval_dataset", self._with_groups)
        super().__init__(model, ref_model, args, data_collator, train_dataset, eval_dataset, **kwargs)
        self.data_collator = GroupCollator(self.data_collator, self.group_column, self.group_names, self._pair_columns)
        self.group_weights = GroupWeights(
            group_sizes=self._group_sizes(), **args.group_weights_options(self.group_names)
        )
        self.group_weights.to(self.accelerator.device)
        gathers = {"train": None, "eval": self.accelerator.gather_for_metrics}
        self._totals = {
            mode: GroupTotals(len(self.group_names), self.accelerator.device, gather)
            for mode, gather in gathers.items()
        }
        self._num_tokens = 0
        self._said: set[str] = set()  # beginnings of the diagnosis' warnings
        self._plain_loss: Tensor | None = None
        self._add_sequence_logps()
        self.loss_fn = models.loss_for(self._head, self.group_weights, args)
        if args.group_update == "lagged":
            self.add_callback(_StepWithOptimizer(self.group_weights))

    # -- groups ------------------------------------------------------------------------------------------------

    def _names_of(self, dataset: Any, args: GroupRobustDPOConfig) -> list[str]:
        if args.group_sizes is not None:
            return sorted(args.group_sizes)
        if isinstance(dataset, IterableDataset):
            raise ValueError("args.group_sizes must be given, {name: pairs}, for a train_dataset that is streamed")
        return sorted(set(self.group_column.names_in(dataset, "train_dataset")))

    def _with_groups(self, dataset: Any, which: str) -> Any:
        dataset = self.group_column.prepare(dataset, which, known=self.group_names)
        of_data.check_given_reference(dataset, which)
        of_data.check_pair_numbers(dataset, self._pair_columns, which)
        return dataset

    def _group_sizes(self) -> list[int]:
        """Counted after TRL has dropped the pairs whose prompt fills max_length."""
        given: Any = self.args.group_sizes
        is_streamed = isinstance(self.train_dataset, IterableDataset)
        counts = Counter() if is_streamed else Counter(self.train_dataset[self.group_column.prepared])
        if given is not None:
            if not is_streamed:
                of_data.warn_of_other_sizes(given, {name: counts[name] for name in self.group_names})
            return [given[name] for name in self.group_names]
        lost = [name for name in self.group_names if not counts[name]]
        if lost:
            raise ValueError(f"max_length={self.args.max_length} leaves no training pair of the groups {lost}")
        return [counts[name] for name in self.group_names]

    # -- seams of Trainer and DPOTrainer -----------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [self.group_column.prepared, *self._pair_columns.values()]
        self._signature_columns += [name for name in columns if name not in self._signature_columns]

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Tokenised by TRL; which pairs ``max_length`` leaves out is said here."""
        if isinstance(dataset, IterableDataset):
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        unlimited = copy.copy(args)
        unlimited.max_length = None
        prepared = super()._prepare_dataset(dataset, processing_class, unlimited, dataset_name)
        return of_data.within_max_length(prepared, f"{dataset_name} data", self.group_column, args)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset not in sets:
            raise ValueError(f"eval_dataset must be a set, or one of the names {sorted(sets)}, got {eval_dataset!r}")
        eval_dataset = of_data.each(eval_dataset, "eval_dataset", self._with_groups)
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Behind `evaluate` and `predict`: the metrics are of this set's pairs."""
        self._totals["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._evaluation_metrics()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        _, logits, labels = super().prediction_step(*args, **kwargs)
        return self._plain_loss, logits, labels

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what Trainer logs as ``loss``: the plain mean of pair losses, or this micro-batch's share of it."""
        super().training_step(*args, **kwargs)
        assert self._plain_loss is not None
        return self._plain_loss

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
        """The group-robust loss of a batch, for its backward; what is logged as ``loss`` is `training_step`'s."""
        total_pairs = num_items_in_batch if model.training else None
        with models.naming_max_length(self.args.max_length):
            if "ref_chosen_logps" in inputs:
                ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
            else:
                ref_logps = self._reference_logps(self.model if self.ref_model is None else self.ref_model, inputs)
            found = self._loss_in_forward(model, inputs, ref_logps, total_pairs)
        self._take_metrics(found, inputs, ref_logps)
        losses = found.output.pair_losses.detach()
        self._plain_loss = losses.mean()
        if total_pairs is not None:  # Trainer adds up micro-batches and averages over ranks
            self._plain_loss = losses.sum() * self.accelerator.num_processes / total_pairs
        loss = found.loss
        if found.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * found.aux_loss / self._micro_batches()
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**_model_inputs(inputs))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """(chosen, rejected) log-probabilities (B,) of the reference; TRL precomputes with this."""
        self._add_sequence_logps()
        chosen, rejected = self._reference_logps(model, inputs).chunk(2)
        return chosen, rejected

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._training_metrics())
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        num_tokens = self._num_tokens + self._unlogged_tokens()
        if self.args.should_save:  # before the rest, so that no whole checkpoint lacks it
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            state: dict[str, Any] = {"group_names": self.group_names, "group_weights": self.group_weights.state_dict()}
            state["trail"] = self.group_weights.trail.state_dict()
            torch.save({**state, "num_tokens": num_tokens}, folder / STATE_FILE)
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
        if "trail" in saved:  # older ones have none: what is logged of it begins anew
            self.group_weights.trail.load_state_dict(saved["trail"])
        self._num_tokens = saved["num_tokens"]

    # -- the models' forwards -------------------------------------------------------------------------------------

    def _loss_in_forward(
        self, model: Any, inputs: dict[str, Any], ref_logps: Tensor, total_pairs: Any = None
    ) -> hf.LossInForward:
        """The loss of a batch, by the forward of the model as it is wrapped."""
        lengths: Any = models.answer_lengths(_labels(inputs)) if self.args.average_log_prob else 1
        pairs = models.PairsOfTrl(
            self.args,
            self.loss_fn,
            inputs[GROUP_IDS],
            ref_logps / lengths if self.loss_fn.spec.uses_reference else None,
            total_pairs=total_pairs,
            **{role: inputs[role] for role in self._pair_columns},
        )
        experts = {"output_router_logits": True} if self.aux_loss_enabled else {}
        found: hf.LossInForward = model(**_model_inputs(inputs), labels=_labels(inputs), loss_of_pairs=pairs, **experts)
        return found

    def _reference_logps(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        context: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            context = models.without_adapter(self.accelerator.unwrap_model(self.model))
        labels, ld_alpha = _labels(inputs), self.args.ld_alpha
        weights = None if ld_alpha is None else models.ld_weights(labels, ld_alpha)
        asked = {"labels": labels, "token_weights": weights, "sequence_logps": True, "sealed": True}
        with torch.no_grad(), context, self.accelerator.autocast():
            found = model(**_model_inputs(inputs), **asked)
        logps: Tensor = found.value
        return logps

    def _add_sequence_logps(self) -> None:
        """Once, before models are wrapped for training; TRL precomputes reference log-probs in its __init__."""
        if self._heads_known:
            return
        self._check_setup()
        policy = models.causal_model(self.accelerator.unwrap_model(self.model))
        self._head = self._head_of(policy, "model")
        options: dict[str, Any] = {"backend": self.args.backend, "max_extra_bytes": self.args.linear_bytes}
        hf.add_sequence_logps(policy, self._head, **options)
        if self.ref_model is not None:
            reference = models.causal_model(self.accelerator.unwrap_model(self.ref_model))
            head = self._head if models.made_alike(policy, reference) else self._head_of(reference, "ref_model")
            hf.add_sequence_logps(reference, head, **options)
        self._heads_known = True

    def _head_of(self, model: Any, which: str) -> hf.Head | None:
        """None for the logits path: by choice, or where the head is no matrix in memory."""
        if self.args.fused_linear is False:
            return None
        if models.is_sharded(model):
            if self.args.fused_linear:
                raise NotImplementedError(f"{which}: its head is sharded: use the logits path, fused_linear=False")
            return None
        return hf.find_head(model) if self.args.fused_linear else hf.head_or_none(model)

    # -- metrics -----------------------------------------------------------------------------------------------

    def _micro_batches(self) -> int:
        return getattr(self, "current_gradient_accumulation_steps", 1) if self.model.training else 1

    def _take_metrics(self, found: hf.LossInForward, inputs: dict[str, Any], ref_logps: Tensor) -> None:
        """Add the batch to the sums of each group, on the device; `log` and `evaluation_loop` read them."""
        out, aux_loss = found.output, found.aux_loss
        logps = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
        if self.args.average_log_prob:  # TRL's metrics are of sums, whether the loss averages or not
            logps = logps * models.answer_lengths(_labels(inputs))
        beta = inputs["beta"].repeat(2) if "beta" in self._pair_columns else self.args.beta
        aux = (0.0, 0.0) if aux_loss is None else (1.0, aux_loss.detach())
        batch = BatchMetrics(
            inputs[GROUP_IDS],
            out.pair_losses.detach(),
            beta * (logps - ref_logps),
            logps,
            inputs["attention_mask"].sum(1),
            (1 / self._micro_batches(), out.loss.detach(), *aux),
            _token_sums(found.metrics, inputs) if found.metrics is not None and self.args.log_token_metrics else None,
        )
        self._totals["train" if self.model.training else "eval"].add(batch)

    def _unlogged_tokens(self) -> int:
        return int(self.accelerator.reduce(self._totals["train"].tokens()))

    def _training_metrics(self) -> dict[str, float]:
        reading = self._totals["train"].read(self.group_weights.alpha, self.accelerator.reduce, self.group_names)
        if not reading.total("count"):
            return {}
        self._num_tokens += int(reading.total("tokens"))
        objective = reading.scalars["objective"] / reading.scalars["steps"]
        found = self.group_weights.diagnose(self.state.global_step, self.state.max_steps)
        for text in found.warnings:
            if text[:12] not in self._said:
                self._said.add(text[:12])
                warnings.warn(f"{text}. This warns once", stacklevel=2)
        metrics = {**reading.metrics(standard_errors=False), **found.metrics(self.group_names)}
        return {**metrics, "objective": objective, "num_tokens": self._num_tokens}

    def _evaluation_metrics(self) -> dict[str, float]:
        totals, weights = self._totals["eval"], self.group_weights
        losses, counts = totals.groups[:, 1], totals.groups[:, 0]
        objective = (weights.loss_weights() * weights.group_losses(losses, counts)).sum()
        reading = totals.read(weights.alpha, self.accelerator.reduce, self.group_names)
        if not reading.total("count"):
            raise ValueError(
                f"the data set has no pair to evaluate: max_length={self.args.max_length} and "
                f"dataloader_drop_last={self.args.dataloader_drop_last} may leave none"
            )
        num_tokens = self._num_tokens + self._unlogged_tokens()  # training has gone on since its last log
        metrics = reading.metrics(standard_errors=True)
        metrics["loss"] = reading.total("loss") / reading.total("count")  # Trainer's counts what fills up ranks, too
        return {**metrics, "objective": float(objective), "num_tokens": num_tokens}

    # -- pieces ------------------------------------------------------------------------------------------------

    def _check_setup(self) -> None:
        policy = models.causal_model(self.accelerator.unwrap_model(self.model))
        hf.check_causal(policy)
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if parallel is not None and max(parallel.tp_size, parallel.cp_size) > 1:
            raise NotImplementedError("GroupRobustDPOTrainer runs data parallel only, not tensor or context parallel")
        if self.aux_loss_enabled and not models.is_sharded(policy) and not hf.has_balancing_loss(policy):
            if self.args.router_aux_loss_coef:
                raise NotImplementedError(
                    f"router_aux_loss_coef must be 0.0 for {type(policy).__name__}, which computes no balancing loss "
                    f"of its experts, got {self.args.router_aux_loss_coef}"
                )
            self.aux_loss_enabled = False  # as where the model is trained by itself
        if self.ref_model is None and is_peft_model(self.model) and not self.args.precompute_ref_log_probs:
            models.check_base_is_frozen(self.accelerator.unwrap_model(self.model))
        if self.ref_model is not None:
            reference = models.causal_model(self.accelerator.unwrap_model(self.ref_model))
            models.check_reference(policy, reference, self._tokenizer)
            if self.args.sync_ref_model:
                models.check_can_follow(policy, reference)


class _StepWithOptimizer(TrainerCallback):
    def __init__(self, group_weights: GroupWeights) -> None:
        self.group_weights = group_weights

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.group_weights.step()


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    others = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", GROUP_IDS, *of_data.PAIR_OPTIONS}
    return {name: value for name, value in inputs.items() if name not in others}


def _labels(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)


def _token_sums(metrics: TokenMetrics, inputs: dict[str, Any]) -> Tensor:
    """(4, 2B), as TOKEN_TOTALS."""
    found = (models.counted(_labels(inputs)), metrics.entropy, metrics.mean_logits, metrics.is_top1)
    return torch.stack([of_tokens.sum(1).double() for of_tokens in found])
