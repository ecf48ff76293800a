"""Preference pairs with groups: reading them, numbering the groups, and making batches of sequences."""

from __future__ import annotations

import gzip
import json
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from grpo_kernels.types import IGNORE_INDEX

FIELDS = ("prompt", "chosen", "rejected", "group")


class DataError(ValueError):
    """A data file that cannot be used; the message starts with ``file:line:``."""


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: ``chosen`` was preferred to ``rejected`` as the answer to ``prompt`` by someone of ``group``."""

    prompt: str
    chosen: str
    rejected: str
    group: str


def load_pairs(path: str | Path) -> list[PreferencePair]:
    """Read a JSONL file (``.gz`` too) with one {prompt, chosen, rejected, group} object a line.

    Raises:
        DataError: a line is not such an object, or the file holds no pairs; names file, line and reason.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    pairs = []
    for number, line in _numbered_lines(path):
        try:
            pairs.append(_pair_from(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from None
    if not pairs:
        raise DataError(f"{path}:1: the file holds no preference pairs")
    return pairs


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers; a broken encoding or archive is a DataError at its line."""
    number = 0
    with _opened(path) as file:
        try:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if line.strip():
                    yield number, line
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _pair_from(line: str) -> PreferencePair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object, got {type(record).__name__}")
    for name in FIELDS:
        if name not in record:
            raise ValueError(f"field {name!r} is missing; the line has {sorted(record)}")
        if not isinstance(record[name], str):
            raise ValueError(f"field {name!r} must be a string, got {type(record[name]).__name__}")
        if name != "prompt" and not record[name].strip():
            raise ValueError(f"field {name!r} must not be empty")
        try:
            record[name].encode()
        except UnicodeEncodeError as error:  # an escape such as \\ud800 without its other half: no tokenizer takes it
            raise ValueError(f"field {name!r} is not valid Unicode at character {error.start}") from None
    if record["chosen"] == record["rejected"]:
        raise ValueError("chosen and rejected are equal: the pair says nothing")
    return PreferencePair(*(record[name] for name in FIELDS))


class Groups:
    """The groups of a training set: names in sorted order, ids 0..K-1, sizes N_g.

    Example:
        >>> pair = PreferencePair("p", "a", "b", "north")
        >>> Groups([pair, pair]).sizes
        [2]
    """

    def __init__(self, train_pairs: Sequence[PreferencePair]) -> None:
        counts = Counter(pair.group for pair in train_pairs)
        self.names: list[str] = sorted(counts)
        self.sizes: list[int] = [counts[name] for name in self.names]
        self._ids = {name: i for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def ids(self, pairs: Sequence[PreferencePair]) -> list[int]:
        """The group id of each pair.

        Raises:
            ValueError: some pairs' groups are not in the training set; names them.
        """
        unseen = Counter(pair.group for pair in pairs if pair.group not in self._ids)
        if unseen:
            listed = ", ".join(f"{name!r} ({count} pairs)" for name, count in sorted(unseen.items()))
            raise ValueError(f"groups that the training data lacks: {listed}; it has {self.names}")
        return [self._ids[pair.group] for pair in pairs]


def split_by_group(
    pairs: Sequence[PreferencePair], eval_fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, evaluation), the fraction taken from each group, at least one pair on either side.

    Raises:
        ValueError: a group has a single pair, so it cannot be split.
    """
    groups = Groups(pairs)
    ids = torch.tensor(groups.ids(pairs))
    generator = torch.Generator().manual_seed(seed)
    held_out: set[int] = set()
    for group, size in enumerate(groups.sizes):
        if size < 2:
            raise ValueError(f"group {groups.names[group]!r} has a single pair: give an evaluation file instead")
        members = (ids == group).nonzero().squeeze(1)
        count = min(size - 1, max(1, round(size * eval_fraction)))
        held_out.update(members[torch.randperm(size, generator=generator)[:count]].tolist())
    train = [pair for i, pair in enumerate(pairs) if i not in held_out]
    return train, [pairs[i] for i in sorted(held_out)]


@dataclass(frozen=True)
class TokenizedPair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    group_id: int


def tokenize_pairs(
    pairs: Sequence[PreferencePair],
    group_ids: Sequence[int],
    encode: Callable[[str], list[int]],
    *,
    eos_id: int,
    bos_id: int | None = None,
    max_length: int,
) -> list[TokenizedPair]:
    """Token ids, at most ``max_length`` a sequence: first the prompt loses its beginning, down to half, then answers
    lose their end. An answer that is kept whole ends with ``eos_id``. Warns of what was cut."""
    if max_length < 4:
        raise ValueError(f"max_length must be at least 4, got {max_length}")
    start = [] if bos_id is None else [bos_id]
    tokenized, shortened, equal = [], 0, 0
    for pair, group_id in zip(pairs, group_ids, strict=True):
        prompt = encode(pair.prompt)
        answers = [[*encode(text), eos_id] for text in (pair.chosen, pair.rejected)]
        room = max(max_length // 2, max_length - max(map(len, answers)))
        kept = start + prompt[max(0, len(prompt) - (room - len(start))) :]
        chosen, rejected = (answer[: max_length - len(kept)] for answer in answers)
        shortened += [kept, chosen, rejected] != [start + prompt, *answers]
        equal += chosen == rejected
        tokenized.append(TokenizedPair(kept, chosen, rejected, group_id))
    if shortened:
        lost = f", and chosen and rejected of {equal} became equal, which teach nothing" if equal else ""
        warnings.warn(
            f"max_length={max_length} shortened {shortened} of {len(tokenized)} pairs{lost}", UserWarning, stacklevel=2
        )
    return tokenized


def collate_pairs(
    pairs: Sequence[TokenizedPair], *, pad_id: int, ignore_index: int = IGNORE_INDEX
) -> dict[str, Tensor]:
    """A concatenated batch: B chosen sequences, then the B rejected, padded on the right.

    Returns:
        input_ids, attention_mask, labels (2B, T) int64, labels being input_ids with ``ignore_index`` on prompt and
        padding (Hugging Face's convention: use ``shift_labels=True``); group_ids (B,) int64.

    Example:
        >>> collate_pairs([TokenizedPair([5], [6, 7], [8], 0)], pad_id=0)["labels"]
        tensor([[-100,    6,    7],
                [-100,    8, -100]])
    """
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    shape = (len(rows), max(len(prompt) + len(answer) for prompt, answer in rows))
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, ignore_index)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        length = len(prompt) + len(answer)
        input_ids[i, :length] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : length] = torch.tensor(answer)
        attention_mask[i, :length] = 1
    group_ids = torch.tensor([pair.group_id for pair in pairs])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "group_ids": group_ids}
