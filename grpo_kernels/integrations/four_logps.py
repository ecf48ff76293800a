"""The group-robust loss for trainers whose own loss takes four (B,) log-probabilities.

Those are LLaMA-Factory's ``compute_preference_loss``, ``dpo_loss`` of TRL before 0.25, on which ms-swift and unsloth
build, and OpenRLHF's ``loss_fn``. `group_robust` makes a subclass of the first two, `FourLogpsLoss` stands in for the
third. None of them knows groups: their ids travel beside the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.losses import GroupRobustLoss

STATE_FILE = "group_weights.pt"
METHODS = ("compute_preference_loss", "dpo_loss")  # the first is LLaMA-Factory's, which calls the second
# What a trainer must say alike, where it says it at all: it would be ignored.
SHARED_OPTIONS = ("beta", "label_smoothing", "reference_free")
REFUSED_OPTIONS = ("use_weighting", "bco_gemma")


class FourLogpsLoss:
    """(chosen, rejected, ref_chosen, ref_rejected), (B,) each, to (loss, chosen_rewards, rejected_rewards).

    Args:
        loss_fn: the `GroupRobustLoss`, with ``update="lagged"`` where a step has several micro-batches.
        accumulation_steps: micro-batches of an optimizer step, by which the trainer's engine divides each loss. After
            so many forwards in training alpha moves: nobody need call `GroupWeights.step`.

    Attributes:
        group_ids: (B,) of the batch that comes next: set it, or read batches through `reading`.
        total_pairs: pairs of the optimizer step over micro-batches and ranks; None: all have as many as the first.

    Example (OpenRLHF; ``dataset`` and ``collate`` are its own, ``ids`` has a group for each row of the first):

        >>> from grpo_kernels import GroupWeights
        >>> loss_fn = GroupRobustLoss(GroupWeights(group_sizes=[3, 1], step_size=0.1))
        >>> rows, ids = WithGroups(["a", "b", "c", "d"], [0, 0, 1, 0]), None
        >>> loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=rows.collate(list))
        >>> four = FourLogpsLoss(loss_fn)  # trainer.loss_fn = four; trainer.train_dataloader = four.reading(loader)
        >>> [(batch, four.group_ids.tolist()) for batch in four.reading(loader)]
        [(['a', 'b'], [0, 0]), (['c', 'd'], [1, 0])]
    """

    def __init__(self, loss_fn: GroupRobustLoss, accumulation_steps: int = 1) -> None:
        if not isinstance(loss_fn, GroupRobustLoss):
            raise TypeError(f"loss_fn must be a GroupRobustLoss, got {type(loss_fn).__name__}")
        if loss_fn.interleaved or loss_fn.spec.uses_counts:
            raise ValueError(
                "loss_fn must have layout='chosen_first' and a loss_type that needs no numbers of tokens, got "
                f"{loss_fn.extra_repr()}"
            )
        validation.check_whole_number("accumulation_steps", accumulation_steps, 1)
        self.loss_fn, self.group_ids = loss_fn, None
        self.accumulation_steps, self.total_pairs = accumulation_steps, None
        self._forwards = 0

    group_ids: Tensor | None
    total_pairs: int | Tensor | None

    def __call__(
        self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None = None, ref_rejected: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss is 0-d; the mean of what ranks and micro-batches get is the whole step's loss, and so is the
        gradient, of what the engine averages over both.

        Raises:
            RuntimeError: no group_ids, or those of an earlier batch. ValueError: as `GroupRobustLoss.from_logps`.
        """
        groups = self.loss_fn.group_weights
        if self.group_ids is None:
            raise RuntimeError("group_ids must be set for each batch before its loss: see FourLogpsLoss.reading")
        ids, self.group_ids = self.group_ids.to(chosen.device), None  # of one batch only
        ref_logps = None
        if ref_chosen is not None and ref_rejected is not None and not self.loss_fn.reference_free:
            ref_logps = torch.cat([ref_chosen, ref_rejected]).to(chosen.device)
        training = groups.update_of_forward(self.loss_fn.training) != "none"
        several = training and (self.accumulation_steps > 1 or self.total_pairs is not None)
        total_pairs = self._total_pairs(len(ids)) if several else None
        out = self.loss_fn.from_logps(torch.cat([chosen, rejected]), ids, ref_logps, total_pairs=total_pairs)
        loss = out.loss
        if several:
            loss = self.accumulation_steps * (loss + (groups.num_ranks - 1) * loss.detach())  # a share, in value
        if training and groups.update_mode == "lagged":
            self._forwards += 1
            if self._forwards >= self.accumulation_steps:
                self._forwards = 0
                groups.step()
        return loss, out.chosen_rewards, out.rejected_rewards

    def _total_pairs(self, num_pairs: int) -> int | Tensor:
        if self.total_pairs is not None:
            return self.total_pairs
        return num_pairs * self.accumulation_steps * self.loss_fn.group_weights.num_ranks

    def reading(self, loader: Iterable[Any]) -> _Reading:
        """The batches of a loader of `WithGroups`, whose group ids are taken off and kept for the loss."""
        return _Reading(loader, self)


class _Reading:
    """Also gives what else the loader has, such as its sampler and its length."""

    def __init__(self, loader: Any, loss: FourLogpsLoss) -> None:
        self._loader, self._loss = loader, loss

    def __iter__(self) -> Iterator[Any]:
        for batch, group_ids in self._loader:
            self._loss.group_ids = group_ids
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_loader"], name)


class Grouped(NamedTuple):
    item: Any
    group_ids: Any  # an int, or (B,) of a batch


class WithGroups(torch.utils.data.Dataset[Grouped]):
    """A map-style data set and the group of each of its rows; `collate` makes the loader's collate function.

    Raises:
        ValueError: not one id for each row. (OpenRLHF's data sets leave rows out: count theirs, not the file's.)
    """

    def __init__(self, dataset: Any, group_ids: Sequence[int]) -> None:
        if len(group_ids) != len(dataset):
            raise ValueError(f"group_ids must have one id for each of {len(dataset)} rows, got {len(group_ids)}")
        self.dataset, self.group_ids = dataset, group_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Grouped:
        return Grouped(self.dataset[index], self.group_ids[index])

    @staticmethod
    def collate(of_items: Callable[[list[Any]], Any]) -> Callable[[list[Grouped]], Grouped]:
        """Of what ``of_items`` makes of a list of the data set's own items."""
        return _Collate(of_items)


class _Collate:
    """An object, for workers that are not forks must pickle it."""

    def __init__(self, of_items: Callable[[list[Any]], Any]) -> None:
        self.of_items = of_items

    def __call__(self, rows: list[Grouped]) -> Grouped:
        ids = torch.tensor([row.group_ids for row in rows], dtype=torch.int64)
        return Grouped(self.of_items([row.item for row in rows]), ids)


# -- subclasses of Trainer -----------------------------------------------------------------------------------------


def group_robust(trainer_class: type) -> Any:
    """A subclass of a trainer of LLaMA-Factory, of TRL before 0.25, or of one that builds on it.

    Its constructor takes two arguments more:

        group_loss: the `GroupRobustLoss`, with the trainer's beta, loss_type and label_smoothing, and
            ``update="lagged"`` under gradient accumulation.
        group_key: the rows' column of group ids, whole numbers in [0, K), "group_ids". It must still be there when
            rows are collated: add it to the data set that the trainer has tokenised, where tokenising drops it.

    Alpha is in the trainer's checkpoints, and among its metrics as ``groups/<id>/alpha``.

    Raises:
        TypeError: the class has neither method. The constructor, ValueError: options that differ or would be ignored.
    """
    method = next((name for name in METHODS if hasattr(trainer_class, name)), None)
    if method is None or not hasattr(trainer_class, "get_batch_loss_metrics"):
        raise TypeError(
            f"trainer_class must have get_batch_loss_metrics and one of {', '.join(METHODS)}, "
            f"{trainer_class.__name__} has not. For TRL from 1.15 on there is GroupRobustDPOTrainer"
        )
    return type(f"GroupRobust{trainer_class.__name__}", (_GroupRobust, trainer_class), {method: _GroupRobust._losses})


class _GroupRobust:
    accelerator: Any
    args: Any
    data_collator: Any
    loss_type: Any
    state: Any
    _get_output_dir: Any
    _signature_columns: Any

    def __init__(self, *args: Any, group_loss: GroupRobustLoss, group_key: str = "group_ids", **kwargs: Any) -> None:
        self.group_key, self._four = group_key, FourLogpsLoss(group_loss)
        self.group_weights = group_loss.group_weights
        super().__init__(*args, **kwargs)
        _check_options(self, group_loss)
        if self.args.gradient_accumulation_steps > 1 and self.group_weights.update_mode != "lagged":
            raise ValueError(
                "group_loss must have GroupWeights(update='lagged') with gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps}, got {self.group_weights.update_mode!r}"
            )
        self.group_weights.to(self.accelerator.device)
        self.data_collator = _CollateGroups(self.data_collator, group_key)

    def _losses(
        self, chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) losses whose mean, which the trainer takes, is the group-robust loss."""
        loss, chosen_rewards, rejected_rewards = self._four(chosen, rejected, ref_chosen, ref_rejected)
        return loss.repeat(len(chosen)), chosen_rewards, rejected_rewards

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Any]]:
        self._four.group_ids = batch[self.group_key]
        batch = {name: value for name, value in batch.items() if name != self.group_key}  # no input of the model's
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)  # type: ignore[misc]
        if train_eval == "train":
            alpha = self.group_weights.alpha.tolist()
            metrics.update({f"groups/{group}/alpha": value for group, value in enumerate(alpha)})
        return loss, metrics

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """Of one optimizer step: its micro-batches, the last of which may be smaller, and fewer."""
        samples, num_items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if self.args.gradient_accumulation_steps > 1:
            pairs = sum(len(batch[self.group_key]) for batch in samples)
            of_ranks = self.accelerator.reduce(torch.tensor(pairs, device=self.accelerator.device))
            self._four.total_pairs, self._four.accumulation_steps = of_ranks, max(1, len(samples))
        return samples, num_items

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self.group_key not in self._signature_columns:
            self._signature_columns.append(self.group_key)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.args.should_save:  # before the rest, so that no whole checkpoint lacks it
            folder = Path(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(self.group_weights.state_dict(), folder / STATE_FILE)
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / STATE_FILE, weights_only=True, map_location="cpu")
            self.group_weights.load_state_dict(state)


class _CollateGroups:
    """The trainer's own collator, without the ids, which it does not know."""

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], key: str) -> None:
        self.collator, self.key = collator, key

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        missing = next((row for row in rows if self.key not in row), None)
        if missing is not None:
            raise ValueError(f"rows must have a column {self.key!r} with the pair's group id, got {sorted(missing)}")
        ids = torch.tensor([row[self.key] for row in rows], dtype=torch.int64)
        of_others = self.collator([{name: x for name, x in row.items() if name != self.key} for row in rows])
        return {**of_others, self.key: ids}


def _check_options(trainer: Any, loss_fn: GroupRobustLoss) -> None:
    """The loss replaces the trainer's own: what that was told must be what it does."""
    for name in SHARED_OPTIONS:
        theirs, ours = getattr(trainer, name, None), getattr(loss_fn, name)
        if theirs is not None and theirs != ours:
            raise ValueError(f"group_loss must have {name}={theirs!r} as the trainer has, got {ours!r}")
    theirs = trainer.loss_type if isinstance(trainer.loss_type, list) else [trainer.loss_type]
    if theirs != [loss_fn.loss_type]:
        raise ValueError(f"group_loss must have the trainer's one loss_type, {theirs}, got {loss_fn.loss_type!r}")
    refused = [name for name in REFUSED_OPTIONS if getattr(trainer, name, None)]
    if refused or getattr(trainer, "model_accepts_loss_kwargs", False):
        raise NotImplementedError(
            f"trainer must leave {', '.join(refused) or 'model_accepts_loss_kwargs'} off: it would change the pairs' "
            "losses behind the groups"
        )
