"""Whatever is in a file of pairs or on the command line: it works, or one line says what is wrong and where.

GRPO_KERNELS_FUZZ=<examples of each> looks longer, and each time elsewhere.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1"}
pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[train]'")

import datasets
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grpo_kernels.__main__ import main
from grpo_kernels.integrations import checkpoints
from grpo_kernels.integrations import datasets as pairs
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl.data import GroupColumn
from grpo_kernels.paper import command as of_paper
from grpo_kernels.training import command
from grpo_kernels.training.options import TrainOptions, parse

ASKED = int(os.environ.get("GRPO_KERNELS_FUZZ", "0"))


def settled(few: int) -> settings:
    return settings(
        max_examples=ASKED or few,
        deadline=None,
        derandomize=not ASKED,
        database=None,
        phases=[Phase.generate, Phase.shrink] if ASKED else [Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


# -- files -------------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.sampled_from(
        ["yes", "no", "", " ", "</s>", "\x00", "\u2028", "nan", "1e400", "2020-01-01", "true", 'a\r\n"b,\t']
    ),
    st.text(max_size=4),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), TEXTS, st.sampled_from([0, -1, 2**63, 2**64, 10**400, 0.5, math.inf, math.nan])
)
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}),
    st.fixed_dictionaries({}, optional={"role": SCALARS, "content": st.one_of(SCALARS, st.lists(SCALARS, max_size=2))}),
    SCALARS,
)
VALUES = st.one_of(SCALARS, st.lists(MESSAGES, max_size=2), st.dictionaries(TEXTS, SCALARS, max_size=2))
GOOD = st.fixed_dictionaries(
    {"prompt": TEXTS, "chosen": st.just("yes"), "rejected": st.just("no"), "group": st.sampled_from(["a", "b"])}
)
NEARLY = st.builds(
    lambda row, name, value: {**row, name: value},
    GOOD,
    st.sampled_from(["prompt", "chosen", "rejected", "group", "more"]),
    VALUES,
)
DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "none": lambda raw, at: raw,
    "cut": lambda raw, at: raw[:at],
    "a byte": lambda raw, at: raw[:at] + b"\xff" + raw[at + 1 :],
    "deep": lambda raw, at: raw[:at] + b"[" * 3000 + raw[at:],
    "long number": lambda raw, at: raw[:at] + b"9" * 5000 + raw[at:],
    "twice": lambda raw, at: raw + raw,
    "blank": lambda raw, at: b"\xef\xbb\xbf \r\n",
    "UTF-16": lambda raw, at: raw.decode("utf-8", "replace").encode("utf-16"),
}


def as_file(rows: list[dict[str, Any]], kind: str) -> bytes:
    def line(row: dict[str, Any]) -> bytes:
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")

    if kind == "json":
        return b"[" + b",".join(map(line, rows)) + b"]"
    if kind in ("csv", "tsv"):
        names, separator = ["prompt", "chosen", "rejected", "group"], "," if kind == "csv" else "\t"
        lines = [names, *([str(row[name]) for name in names] for row in rows)]
        return "\n".join(separator.join(cells) for cells in lines).encode("utf-8", "surrogatepass")
    return b"\n".join(map(line, rows))


def test_any_file_of_pairs_is_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    tokenizer = hf.byte_level_tokenizer([], 300)

    @settled(25)
    @given(
        st.one_of(st.lists(st.one_of(GOOD, NEARLY), max_size=5), st.lists(GOOD, min_size=4, max_size=6)),
        st.sampled_from(["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet"]),
        st.sampled_from(["none"] * 8 + list(DAMAGE)),
        st.floats(0, 1),
        st.sampled_from([None, "prompt", "more"]),
        st.booleans(),
    )
    def check(
        rows: list[dict[str, Any]], kind: str, damage: str, place: float, split_by: str | None, skip: bool
    ) -> None:
        path = tmp_path / f"pairs.{kind}"
        raw = as_file(rows, kind)
        raw = DAMAGE[damage](raw, int(place * len(raw)))
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
        try:
            for part in pairs.load_pairs(str(path), None, pairs.Reading(skip_bad_rows=skip, split_by=split_by)):
                pairs.check_tokens(part, tokenizer, str(path))
                assert GroupColumn("group").names_in(part, "the part") == [str(name) for name in part["group"]]
                assert len(checkpoints.digest_of_rows(part)) == 64
        except ValueError as error:
            said = str(error)
            assert f"data {path}: " in said or "split_by" in said or "give --eval-data" in said, said
            assert "\n" not in said

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check()


# -- the command line --------------------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from(["", "0", "-1", "1", "0.5", "nan", "inf", "1e400", "9" * 400, "true", "none", "auto", "{", "[1]"]),
    st.sampled_from(['{"a": 1}', '{"rule": 5}', '{"floor": "x"}', '{"rule": "cvar", "level": 2}', "ipo", "dpo", "٣"]),
    st.text(max_size=4),
)
OURS = [field.name for field in dataclasses.fields(TrainOptions)]
OURS += ["step-size", "baseline", "loss", "loss_weights", "beta", "label_smoothing", "max_length", "group_options"]
OURS += ["group_floor", "group_rule", "linear_plan", "backend", "max_steps", "seed", "model", "config", "out"]
ALIASES = {"loss": "loss_type", "model": "model_name_or_path", "out": "output_dir"}
TRAIN = st.lists(st.tuples(st.sampled_from(OURS).map(lambda name: f"--{name}"), WORDS), min_size=1, max_size=2)
NUMBERS = st.one_of(st.integers(-1, 2**70).map(str), st.sampled_from(["", "x", "1e3", "9" * 400, "8B", "70B"]))
SIZES = st.one_of(st.lists(NUMBERS, max_size=5).map("x".join), st.sampled_from(["8x512x512x32000", "2x64x8B"]))
MESHES = st.lists(st.tuples(st.sampled_from(["dp", "tp", "cp", "pp", "ep", "x"]), NUMBERS), min_size=1, max_size=3)
DOCTOR = st.tuples(SIZES, st.none() | MESHES.map(lambda parts: ",".join(map("=".join, parts))))
PAPER = st.lists(
    st.tuples(st.sampled_from(["--seeds", "--iterations", "--ipo-iterations", "--max-horizon"]), WORDS), min_size=1
)
OPTIONS = {
    "train": TRAIN.map(lambda options: [word for option in options for word in option]),
    "doctor": DOCTOR.map(lambda given: [f"--linear={given[0]}", *([] if given[1] is None else [f"--mesh={given[1]}"])]),
    "reproduce": PAPER.map(lambda options: [word for option in options for word in option]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_any_option_is_taken_or_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(of_paper, "run", lambda config, out: None)
    monkeypatch.setattr(command, "train", lambda words: parse(words) and 0)

    @settled(40)
    @given(OPTIONS[name])
    def check(words: list[str]) -> None:
        capsys.readouterr()
        try:
            status = main([name, *words])
        except SystemExit as stopped:  # argparse
            status = stopped.code
        if not status:
            return
        said = capsys.readouterr().err.splitlines()[-1].replace("-", "_")
        given_names = {word.split("=")[0].lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
        names = (
            given_names | {f"group_{option}" for option in given_names} | {f"{option}_type" for option in given_names}
        )
        assert status == 2
        assert any(option and option in said for option in names), (words, said)

    check()
