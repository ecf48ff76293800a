"""Reading pairs, numbering groups, batches of sequences."""

from __future__ import annotations

import gzip
import json
import warnings
from pathlib import Path

import pytest
import torch

from grpo_kernels.training import data, embedded_task
from grpo_kernels.training.data import PreferencePair

GOOD = {"prompt": "p", "chosen": "yes", "rejected": "no", "group": "a"}


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_jsonl_and_gz_are_read_alike(tmp_path: Path) -> None:
    lines = [json.dumps({**GOOD, "chosen": "ja 是"}, ensure_ascii=False), "", json.dumps({**GOOD, "extra": 1})]
    plain = write(tmp_path / "pairs.jsonl", lines)
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert data.load_pairs(plain) == data.load_pairs(packed)
    assert data.load_pairs(plain)[0] == PreferencePair("p", "ja 是", "no", "a")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not valid JSON"),
        ("[1, 2]", "must be a JSON object, got list"),
        (json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}), "field 'group' is missing"),
        (json.dumps({**GOOD, "group": 3}), "field 'group' must be a string, got int"),
        (json.dumps({**GOOD, "chosen": "  "}), "field 'chosen' must not be empty"),
        (json.dumps({**GOOD, "rejected": "yes"}), "chosen and rejected are equal"),
        (json.dumps({**GOOD, "chosen": "ab\ud800"}), "field 'chosen' is not valid Unicode at character 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "pairs.jsonl", [json.dumps(GOOD), "", line, json.dumps(GOOD)])
    with pytest.raises(data.DataError) as caught:
        data.load_pairs(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert reason in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="holds no preference pairs"):
        data.load_pairs(write(tmp_path / "empty.jsonl", [""]))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GOOD).encode() + b"\n" + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(data.DataError, match=r"latin.jsonl:2: not UTF-8"):
        data.load_pairs(latin)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-12])
    with pytest.raises(data.DataError, match="not a whole gzip file"):
        data.load_pairs(cut)
    damaged = bytearray(gzip.compress(json.dumps(GOOD).encode() * 50, mtime=0))
    damaged[12] ^= 0xFF
    cut.write_bytes(bytes(damaged))
    with pytest.raises(data.DataError, match=r"cut\.jsonl\.gz:1: not a whole gzip file"):
        data.load_pairs(cut)
    with pytest.raises(FileNotFoundError):
        data.load_pairs(tmp_path / "none.jsonl")


def pair(group: str, text: str = "x") -> PreferencePair:
    return PreferencePair("p", text, text + "!", group)


def test_groups() -> None:
    groups = data.Groups([pair("b"), pair("a"), pair("b")])
    assert (groups.names, groups.sizes, len(groups)) == (["a", "b"], [1, 2], 2)
    assert groups.ids([pair("b"), pair("a")]) == [1, 0]
    with pytest.raises(ValueError, match=r"groups that the training data lacks: 'c' \(2 pairs\), 'd' \(1 pairs\)"):
        groups.ids([pair("c"), pair("a"), pair("d"), pair("c")])


def test_split_takes_from_each_group() -> None:
    pairs = [pair("a", str(i)) for i in range(10)] + [pair("b", str(i)) for i in range(2)]
    train, held_out = data.split_by_group(pairs, 0.2, seed=3)
    assert sorted(p.group for p in held_out) == ["a", "a", "b"]
    assert set(train) | set(held_out) == set(pairs)
    assert not set(train) & set(held_out)
    assert data.split_by_group(pairs, 0.2, seed=3) == (train, held_out)
    with pytest.raises(ValueError, match="group 'b' has a single pair"):
        data.split_by_group(pairs[:11], 0.2, seed=0)


def encode(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_tokenize_and_collate() -> None:
    pairs = [PreferencePair("ab", "cde", "f", "g"), PreferencePair("x", "y", "zz", "h")]
    batch = data.collate_pairs(data.tokenize_pairs(pairs, [0, 1], encode, eos_id=1, bos_id=2, max_length=32), pad_id=9)
    a, b, c, d, e, f, x, y, z = map(ord, "abcdefxyz")
    assert batch["input_ids"].tolist() == [
        [2, a, b, c, d, e, 1],
        [2, x, y, 1, 9, 9, 9],
        [2, a, b, f, 1, 9, 9],
        [2, x, z, z, 1, 9, 9],
    ]
    n = -100
    assert batch["labels"].tolist() == [
        [n, n, n, c, d, e, 1],
        [n, n, y, 1, n, n, n],
        [n, n, n, f, 1, n, n],
        [n, n, z, z, 1, n, n],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [7, 4, 5, 5]
    assert batch["group_ids"].tolist() == [0, 1]


def test_truncation_keeps_the_prompts_end_and_the_answers_beginning() -> None:
    pairs = [PreferencePair("0123456789", "abcdefghij", "k", "g")]
    with pytest.warns(UserWarning, match="max_length=8 shortened 1 of 1 pairs$"):
        (long_both,) = data.tokenize_pairs(pairs, [0], encode, eos_id=1, max_length=8)
    assert long_both.prompt == encode("6789")
    assert long_both.chosen == encode("abcd")
    assert long_both.rejected == [*encode("k"), 1]
    with pytest.warns(UserWarning, match="shortened 1 of 1"):
        (long_prompt,) = data.tokenize_pairs(
            [PreferencePair("0123456789", "ab", "k", "g")], [0], encode, eos_id=1, max_length=8
        )
    assert long_prompt.prompt == encode("56789")
    assert long_prompt.chosen == [*encode("ab"), 1]
    with pytest.raises(ValueError, match="max_length must be at least 4, got 3"):
        data.tokenize_pairs(pairs, [0], encode, eos_id=1, max_length=3)


def test_truncation_that_takes_the_difference_is_told() -> None:
    pairs = [PreferencePair("p", "abcdefghi", "abcdefghj", "g"), PreferencePair("p", "a", "b", "g")]
    message = "max_length=6 shortened 1 of 2 pairs, and chosen and rejected of 1 became equal, which teach nothing"
    with pytest.warns(UserWarning, match=message):
        data.tokenize_pairs(pairs, [0, 0], encode, eos_id=1, max_length=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.tokenize_pairs(pairs, [0, 0], encode, eos_id=1, max_length=11)


def test_embedded_task_is_what_it_says() -> None:
    pairs = embedded_task.generate_pairs(3000, seed=1)
    assert pairs == embedded_task.generate_pairs(3000, seed=1)
    assert pairs != embedded_task.generate_pairs(3000, seed=2)
    groups = data.Groups(pairs)
    assert dict(zip(groups.names, groups.sizes, strict=True)) == {"business": 660, "casual": 2100, "editors": 240}
    assert all(p.chosen != p.rejected for p in pairs)

    def friendly(text: str) -> bool:
        return text.startswith("Oh")

    for group, wants_friendly in (("casual", True), ("business", False), ("editors", False)):
        tone_pairs = [p for p in pairs if p.group == group and friendly(p.chosen) != friendly(p.rejected)]
        assert len(tone_pairs) > 50
        assert all(friendly(p.chosen) == wants_friendly for p in tone_pairs)
    longer = [len(p.chosen) > len(p.rejected) + 20 for p in pairs if p.group == "editors"]
    assert not any(longer)
    assert (
        torch.tensor([len(p.chosen) > len(p.rejected) + 20 for p in pairs if p.group == "casual"]).float().mean() > 0.2
    )
