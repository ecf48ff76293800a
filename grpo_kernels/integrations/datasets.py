"""Preference pairs with groups through `datasets`: reading them, the rules on a row, and the split for evaluation."""

from __future__ import annotations

import codecs
import gzip
import json
import random
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict
from pyarrow import parquet

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
NO_PAIRS = "holds no preference pairs"
EVALUATION_SPLITS = ("test", "validation", "eval")
PACKAGED = Path(__file__).parent.parent / "training" / "pairs"
MADE_UP, POLIS = "made-up-colours", "polis-housing-mini"  # the first is of examples/made_up_pairs.py
POLIS_SOURCE = (
    f"{POLIS}: Data was gathered using the Polis software (compdemocracy.org/polis) and is sub-licensed under CC BY "
    "4.0 with Attribution to The Computational Democracy Project."
)


@dataclass(frozen=True)
class Reading:
    """How pairs are read: the groups' column, what to do with bad rows, and the split where no evaluation set is given.

    ``split_by``: a column whose equal values stay on one side of the split.
    """

    group_column: str = "group"
    skip_bad_rows: bool = False
    eval_fraction: float = 0.2
    split_by: str | None = None
    seed: int = 0


def load_pairs(source: str, eval_source: str | None, how: Reading) -> tuple[Dataset, Dataset]:
    """(training, evaluation) pairs in one of TRL's preference formats, checked, with texts as they are.

    Args:
        source: JSONL, JSON, CSV, TSV or Parquet file (``.gz`` too), a folder, the name of packaged pairs, or a name on
            the hub; a split "test", "validation" or "eval" is its evaluation set.
        eval_source: the same for evaluation; None: that split, else a part of each group.

    Raises:
        ValueError: a source that cannot be read, lacks a column, or has a bad row; names source and row.
    """
    train, rest = _read(source)
    train = check_rows(train, source, how)
    if eval_source is not None:
        return train, check_rows(_read(eval_source)[0], eval_source, how)
    if rest is not None:
        if how.split_by is not None or how.eval_fraction != Reading.eval_fraction:
            raise ValueError(
                f"data {source}: has an evaluation split of its own: split_by and eval_fraction must be left out, got "
                f"{how.split_by!r} and {how.eval_fraction}"
            )
        return train, check_rows(rest, source, how)
    return split(train, how)


def _read(source: str) -> tuple[Dataset, Dataset | None]:
    """The training split of a source, and its evaluation split if it names one."""
    path = Path(source)
    try:
        if source in (MADE_UP, POLIS):
            files = {name: str(PACKAGED / f"{source}.{name}.jsonl.gz") for name in ("train", "test")}
            found = datasets.load_dataset("json", data_files=files)
        elif path.is_dir():
            saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
            found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
        elif path.is_file():
            found = _read_file(path)
        elif path.exists():
            raise ValueError("must be a file that can be read twice, it is a pipe or a device")
        elif _kind(path) or source.startswith((".", "/", "~")):
            raise ValueError("there is no such file")
        else:
            found = datasets.load_dataset(source)
    except Exception as error:  # of datasets, pyarrow, pandas, the hub, the file system
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"data {source}: {_fault_in_text(path) or reason}") from error
    if isinstance(found, DatasetDict):
        if "train" not in found:
            raise ValueError(f"data {source}: must have a split 'train', it has {sorted(found)}")
        return found["train"], next((found[name] for name in EVALUATION_SPLITS if name in found), None)
    return found, None


def _kind(path: Path) -> str | None:
    return READERS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def _read_file(path: Path) -> Dataset:
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"must end with one of {', '.join(READERS)} (and .gz), got {path.name!r}")
    if not path.stat().st_size or (kind == "parquet" and not parquet.read_metadata(path).num_rows):
        raise ValueError(NO_PAIRS)
    more = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    return datasets.load_dataset(kind, data_files=str(path), split="train", **more)


def _fault_in_text(path: Path) -> str | None:
    """What is wrong with a file of text, by its line: readers name a block and a column of it, or a byte."""
    kind, name = _kind(path), path.name.removesuffix(".gz")
    if kind in (None, "parquet") or not path.is_file():
        return None
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:  # no gzip, or cut off
        return str(error)
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        return NO_PAIRS
    of_each_line = name.endswith(".jsonl")
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            text = line.decode("utf-8-sig")
            if of_each_line and text.strip() and not isinstance(json.loads(text), dict):
                return f"line {number}: must be a JSON object"
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON
            return f"line {number}: {error}"
    return None


def check_rows(rows: Dataset, source: str, how: Reading) -> Dataset:
    """The rows without bad ones, which are counted and named.

    Raises:
        ValueError: a column or a row's group is missing; any bad row that is not to be skipped; no row is left.
    """
    for name in ("chosen", "rejected", how.group_column):
        if name not in rows.column_names:
            raise ValueError(f"data {source}: must have a column {name!r}, it has {sorted(rows.column_names)}")
    bad: dict[int, str] = {}
    for number, row in enumerate(_decoded(rows, source)):
        group = row[how.group_column]
        if group is None or group != group or isinstance(group, list | dict) or not str(group).strip():
            raise ValueError(
                f"data {source}: row {number + 1}: {how.group_column!r} must be a name or a number, got {group!r}"
            )
        reason = _fault(row)
        if reason:
            bad[number] = reason
    if bad:
        first = next(iter(bad))
        listed = f"{len(bad)} of {len(rows)} rows are bad, the first is row {first + 1}: {bad[first]}"
        if not how.skip_bad_rows:
            raise ValueError(f"data {source}: {listed}; --on-bad-row skip leaves them out")
        warnings.warn(f"data {source}: {listed}; left out", UserWarning, stacklevel=2)
        rows = rows.select([number for number in range(len(rows)) if number not in bad])
    if not len(rows):
        raise ValueError(f"data {source}: {NO_PAIRS}")
    return rows


def _decoded(rows: Dataset, source: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for number, row in enumerate(rows, start=1):  # noqa: B007  (the row that was decoded last)
            yield row
    except Exception as error:  # Arrow takes what it is given: texts that are no UTF-8, years that Python does not know
        reason = _fault_in_text(Path(source)) or f"row {number + 1} cannot be read: {error}"
        raise ValueError(f"data {source}: {reason}") from error


def _fault(row: dict[str, Any]) -> str | None:
    parts = [name for name in ("prompt", "chosen", "rejected") if name in row]
    for name in parts:
        value = row[name]
        if not isinstance(value, str) and not _are_messages(value):
            return f"{name} must be a text or messages, got {value!r}"
        if name != "prompt" and _is_empty(value):
            return f"{name} is empty"
    if len({type(row[name]) for name in parts}) > 1:
        return f"{', '.join(parts)} must be all texts or all messages"
    return "chosen and rejected are equal: a tie" if row["chosen"] == row["rejected"] else None


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
        and all(isinstance(message.get("content"), str | list | None) for message in value)
    )


def _is_empty(answer: str | list[dict[str, Any]]) -> bool:
    """A text, or messages whose last says nothing and calls no tool."""
    if isinstance(answer, str):
        return not answer.strip()
    content = answer[-1].get("content")  # a text, or its parts
    says = content.strip() if isinstance(content, str) else content
    return not says and not answer[-1].get("tool_calls")


def check_tokens(rows: Dataset, tokenizer: Any, source: str) -> None:
    """Text that a tokenizer would take for its own marks. (Answers may end with its end of sequence.)

    Raises:
        ValueError: an answer has such a mark inside, or a prompt begins with the one that the tokenizer adds.
    """
    marks = [mark for mark in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) if mark]
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    for number, row in enumerate(rows):
        if not isinstance(row.get("prompt"), str):
            return  # messages: the chat template writes the marks; an implicit prompt holds them
        for name in ("chosen", "rejected"):
            inside = [mark for mark in marks if mark in row[name].removesuffix(tokenizer.eos_token)]
            if inside:
                raise ValueError(f"data {source}: row {number + 1}: {name} has the tokenizer's {inside[0]!r} inside")
        if adds_bos and row["prompt"].startswith(tokenizer.bos_token):
            raise ValueError(f"data {source}: row {number + 1}: the tokenizer adds {tokenizer.bos_token!r} itself")


def split(rows: Dataset, how: Reading) -> tuple[Dataset, Dataset]:
    """(training, evaluation): about ``how.eval_fraction`` of each group for the second, at least one pair in either.

    Raises:
        ValueError: there is no such column, or a group cannot be split.
    """
    split_by = how.split_by
    if split_by is not None and split_by not in rows.column_names:
        raise ValueError(f"split_by must be a column, got {split_by!r}; there are {sorted(rows.column_names)}")
    groups = rows[how.group_column]
    together: dict[Any, list[int]] = {}
    for number, value in enumerate(range(len(rows)) if split_by is None else map(_key, rows[split_by])):
        together.setdefault(value, []).append(number)
    sizes, held_out, chosen = Counter(groups), Counter[Any](), set[int]()
    wanted = {group: min(size - 1, max(1, round(size * how.eval_fraction))) for group, size in sizes.items()}
    parts = list(together.values())
    random.Random(how.seed).shuffle(parts)
    for part in parts:
        of_part = Counter(groups[number] for number in part)
        lacks = any(held_out[group] < wanted[group] for group in of_part)
        if lacks and all(held_out[group] + count < sizes[group] for group, count in of_part.items()):
            held_out += of_part
            chosen.update(part)
    lost = sorted(str(group) for group in sizes if not held_out[group])
    if lost:
        raise ValueError(f"groups that cannot be split by {split_by or 'row'}: {lost}; give --eval-data")
    train = rows.select([number for number in range(len(rows)) if number not in chosen])
    evaluation = rows.select(sorted(chosen))
    if "prompt" in rows.column_names and split_by is None:
        seen = set(map(_key, train["prompt"]))
        repeated = sum(_key(prompt) in seen for prompt in evaluation["prompt"])
        if repeated:
            warnings.warn(
                f"prompts of {repeated} of {len(evaluation)} evaluation pairs are in the training pairs, too: "
                "--split-by prompt keeps them apart",
                UserWarning,
                stacklevel=2,
            )
    return train, evaluation


_key: Callable[[Any], str] = partial(json.dumps, default=str)  # a prompt may be messages, a column dates
