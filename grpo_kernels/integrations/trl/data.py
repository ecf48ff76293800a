"""The groups of a data set: read, checked, and carried beside TRL's batch."""

from __future__ import annotations

import difflib
import math
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset

GROUP_IDS = "group_ids"  # the batch's entry
PREPARED = " (name)"  # ends the name of the column that is made
PAIR_OPTIONS = {  # what is a number a pair
    "weights": "weight_column",
    "margin": "margin_column",
    "beta": "beta_column",
    "label_smoothing": "label_smoothing_column",
}


@dataclass(frozen=True)
class GroupColumn:
    """A data set's column of groups, which may hold anything scalar, and the prepared one, which holds names.

    The prepared column travels with the pairs through TRL's tokenising, so that a set that one trainer has prepared
    means the same to the next.
    """

    name: str

    @property
    def prepared(self) -> str:
        return f"{self.name}{PREPARED}"

    def names_in(self, dataset: Dataset, which: str) -> list[str]:
        """Each pair's group."""
        check_columns(dataset, {"group_column": self.name}, which)
        feature, rows = dataset.features[self.name], enumerate(dataset[self.name])
        return [_name(value, feature, f"row {row} of column {self.name!r}") for row, value in rows]

    def prepare(self, dataset: Any, which: str, *, known: list[str] | None = None) -> Any:
        """The data set with the prepared column, without a tensor format. Nothing of the trainer is in its fingerprint.

        Raises:
            ValueError: it is empty or has no such column, a group is missing, nested or, where ``known`` groups are
                given, not among them. TypeError: it is no data set.
        """
        dataset = unformatted(dataset, which)
        if isinstance(dataset, IterableDataset):
            if self.prepared in _column_names(dataset):
                return dataset
            check_columns(dataset, {"group_column": self.name}, which)
            feature = (dataset.features or {}).get(self.name)
            options = {"column": self, "feature": feature, "known": known, "source": _source(which)}
            return dataset.map(_with_name, fn_kwargs=options)
        names = self.names_in(dataset, which)
        unseen = Counter(name for name in names if known is not None and name not in known)
        if unseen:
            listed = ", ".join(f"{name!r} ({count} pairs)" for name, count in sorted(unseen.items()))
            raise ValueError(f"{which} has groups that {_source(which)} lacks: {listed}; known are {known}")
        if self.prepared in dataset.column_names:
            dataset = dataset.remove_columns(self.prepared)
        return dataset.add_column(self.prepared, names)


def _source(which: str) -> str:
    """Where the known groups are from. Those of a training set come from itself, unless group_sizes says them."""
    return "args.group_sizes" if which == "train_dataset" else "the training data"


def _with_name(
    pair: dict[str, Any], column: GroupColumn, feature: Any, known: list[str] | None, source: str
) -> dict[str, str]:
    name = _name(pair[column.name], feature, f"a pair's {column.name!r}")
    if known is not None and name not in known:
        raise ValueError(f"group {name!r} is not in {source}, which has {known}")
    return {column.prepared: name}


def unformatted(dataset: Any, which: str) -> Any:
    """A data set whose rows are Python's: in tensors TRL's collator would add token ids where it means to join them.

    Raises:
        TypeError: it is no data set. ValueError: it is empty.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"{which} must be a Dataset or an IterableDataset, got {type(dataset).__name__}")
    formatting = getattr(dataset, "_formatting", None)  # of a streamed one
    kind = dataset.format["type"] if isinstance(dataset, Dataset) else getattr(formatting, "format_type", None)
    if kind == "custom":  # a transform of the user's: once, of whole rows, since it may read and make any columns
        dataset = dataset.map(_as_it_is)
    if kind is not None:
        dataset = dataset.with_format(None)
    if next(iter(dataset), None) is None:
        raise ValueError(f"{which} must have at least one pair, it is empty")
    return dataset


def _as_it_is(pair: dict[str, Any]) -> dict[str, Any]:
    return pair


def check_columns(dataset: Any, wanted: dict[str, str], which: str) -> None:
    """
    Args:
        wanted: {option of the config: column}.

    Raises:
        ValueError: a column is not there.
    """
    columns = _column_names(dataset)
    for option, name in wanted.items():
        if name not in columns:
            own = sorted(column for column in columns if not column.endswith(PREPARED))
            close = difflib.get_close_matches(name, own, n=1)
            hint = f"is it {close[0]!r}? Pass {option}={close[0]!r}" if close else f"pass its name as {option}="
            raise ValueError(f"{which} must have a column {name!r}, it has {own}; {hint} to the config")


def check_given_reference(dataset: Any, which: str) -> None:
    """TRL takes the reference's log-probabilities from columns of these names, where a set has them.

    Raises:
        ValueError: it has one of them alone.
    """
    given = sorted({"ref_chosen_logps", "ref_rejected_logps"}.intersection(_column_names(dataset)))
    if len(given) == 1:
        raise ValueError(
            f"{which} must have the columns ref_chosen_logps and ref_rejected_logps, the reference's "
            f"log-probabilities, or neither, got {given[0]} alone"
        )


def check_pair_numbers(dataset: Any, columns: dict[str, str], which: str) -> None:
    """The columns of `GroupRobustDPOConfig.pair_columns`; of streamed data the collator checks the values.

    Raises:
        ValueError: a column is not there, or holds something else than numbers of its range.
    """
    check_columns(dataset, {PAIR_OPTIONS[role]: column for role, column in columns.items()}, which)
    if isinstance(dataset, Dataset):
        for role, column in columns.items():
            for row, value in enumerate(dataset[column]):
                _pair_number(role, value, f"row {row} of column {column!r}")


def _column_names(dataset: Any) -> list[str]:
    return dataset.column_names or list(next(iter(dataset)))


def _name(value: Any, feature: Any, where: str) -> str:
    """A group's name.

    Raises:
        ValueError: there is none (null, NaN, a class label of -1, blank), or it is nested.
    """
    is_label = hasattr(feature, "int2str")
    missing = value is None or (isinstance(value, float) and math.isnan(value)) or (is_label and value == -1)
    if missing or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where} must be a group, got {value!r}: leave such pairs out, or name their group")
    if isinstance(value, list | dict | tuple):
        raise ValueError(f"{where} must be one name or number, got a {type(value).__name__}: {value!r}")
    return feature.int2str(value) if is_label and not isinstance(value, str) else str(value)


def warn_of_near_equal(names: Iterable[str]) -> None:
    """Names that look alike, but for spaces and case, are groups apart, and seldom meant to be."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        seen = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
        alike[" ".join(seen.split()).casefold()].append(name)
    pairs = [near for near in alike.values() if len(near) > 1]
    if pairs:
        warnings.warn(
            f"groups whose names differ in spaces, case or invisible signs only are groups apart: {pairs}", stacklevel=2
        )


def warn_of_other_sizes(given: dict[str, int], counted: dict[str, int]) -> None:
    """``group_sizes`` beside data that can be counted: only its proportions matter to the estimator."""
    total, pairs = sum(given.values()), sum(counted.values())
    off = [name for name in counted if abs(counted[name] * total - given[name] * pairs) > 0.1 * given[name] * pairs]
    if off:
        warnings.warn(
            f"group_sizes {given} are not in proportion to the training data's {counted}: the share of {off} "
            "is off by more than a tenth. Pairs are weighed by the sizes given; without group_sizes they are counted",
            stacklevel=2,
        )


LEFT_OUT, ALIKE, UNSCORED = 1, 2, 3  # what may be wrong with a pair's tokens; 0: nothing


def _flaw(pair: dict[str, Any], longest: int | None, keeps_start: bool) -> dict[str, int]:
    """A row of the one column that `within_max_length` looks at."""
    prompt, cut = pair["prompt_ids"], slice(None)
    if longest is not None:
        cut = slice(longest) if keeps_start else slice(-longest, None)
    if longest is not None and keeps_start and len(prompt) >= longest:
        return {"flaw": LEFT_OUT}
    if (prompt + pair["chosen_ids"])[cut] == (prompt + pair["rejected_ids"])[cut]:
        return {"flaw": ALIKE}
    return {"flaw": 0 if prompt else UNSCORED}


def within_max_length(dataset: Dataset, which: str, column: GroupColumn, config: Any) -> Dataset:
    """A tokenised set without the pairs of whose answers ``config.max_length`` leaves nothing, as in TRL's trainer.

    Warns of these, and of others that teach nothing or less than they seem to: how many, of which groups, the first.

    Raises:
        ValueError: no pair is left.
    """
    longest = config.max_length
    found = dataset.map(  # of one column, in the cache of `datasets`
        _flaw,
        fn_kwargs={"longest": longest, "keeps_start": config.truncation_mode == "keep_start"},
        remove_columns=dataset.column_names,
        num_proc=config.dataset_num_proc,
        desc=f"Comparing the answers of {which}",
    )
    flaws = np.asarray(found["flaw"])
    if (flaws == LEFT_OUT).all():
        raise ValueError(f"max_length={longest} leaves no pair of the {which}: all prompts fill it")
    within = "" if longest is None else f" within max_length={longest}"
    for flaw, what in (
        (LEFT_OUT, f"have a prompt that fills max_length={longest}: they are left out"),
        (ALIKE, f"have the same tokens chosen and rejected{within}: they move nothing"),
        (UNSCORED, "begin with their answer's tokens: nothing predicts the first one, which is not trained"),
    ):
        rows = np.flatnonzero(flaws == flaw)
        if len(rows):
            first, groups = dataset[int(rows[0])], Counter(dataset.select(rows)[column.prepared])
            listed = ", ".join(f"{name!r} {count}" for name, count in sorted(groups.items()))
            warnings.warn(
                f"{which}: {len(rows)} of {len(dataset)} pairs {what} ({listed}); the first is row {rows[0]}, whose "
                f"chosen answer is {str(first['chosen'])[:60]!r}",
                stacklevel=2,
            )
    return dataset.select(np.flatnonzero(flaws != LEFT_OUT)) if (flaws == LEFT_OUT).any() else dataset


def each(datasets: Any, which: str, prepare: Callable[[Any, str], Any]) -> Any:
    """``prepare`` of a data set, or of every one of a dict of them."""
    if datasets is None or isinstance(datasets, str):
        return datasets
    if isinstance(datasets, dict):
        return {name: prepare(value, f"{which}[{name!r}]") for name, value in datasets.items()}
    return prepare(datasets, which)


class GroupCollator:
    """A collator's batch with the group ids of its pairs, and their numbers of `pair_columns`."""

    def __init__(
        self,
        collator: Callable[..., dict[str, Any]],
        column: GroupColumn,
        names: list[str],
        pair_columns: dict[str, str],
    ) -> None:
        self.collator, self.column, self.names, self.pair_columns = collator, column.prepared, names, pair_columns
        self.ids = {name: number for number, name in enumerate(names)}

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        for pair in pairs:
            if pair.get(self.column) not in self.ids:
                raise ValueError(
                    f"a pair must come with its group in the column {self.column!r}, one of {self.names}, got "
                    f"{pair.get(self.column)!r}: give evaluate() the data as it is, predict() a set that this trainer "
                    "has prepared, such as trainer.eval_dataset"
                )
        numbers = {
            role: torch.tensor([_pair_number(role, pair.get(column), f"a pair's {column!r}") for pair in pairs])
            for role, column in self.pair_columns.items()
        }
        group_ids = torch.tensor([self.ids[pair[self.column]] for pair in pairs])
        return {**self.collator(pairs), **numbers, GROUP_IDS: group_ids}


def _pair_number(role: str, value: Any, where: str) -> float:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    rule, holds = {
        "weights": ("at least 0", lambda x: x >= 0),
        "beta": ("above 0", lambda x: x > 0),
        "margin": ("finite", lambda x: True),
        "label_smoothing": ("in [0, 1]", lambda x: 0 <= x <= 1),
    }[role]
    if not usable or not holds(value):
        raise ValueError(f"{where} must be a number, {rule}, got {value!r}")
    return float(value)
