"""Every block of README.md is run, and its commands are the Makefile's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from makefile import make_would

from grpo_kernels.__main__ import main

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import tables  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)
[TRL_BLOCK] = [code for _, code in BLOCKS if "integrations.trl" in code]  # it needs a model on the disk
SOURCES = (".py", ".pyi", ".md", ".h", ".cpp", ".cuh", ".cu")
SHELL = [line.split("  #")[0] for language, code in BLOCKS if language == "sh" for line in code.splitlines()]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def test_python_blocks_run_in_order() -> None:
    namespace: dict = {}
    blocks = [code for language, code in BLOCKS if language == "python" and code != TRL_BLOCK]
    assert len(blocks) >= 3
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)
    assert namespace["logits"].grad.abs().sum() > 0
    assert namespace["head"].weight.grad.abs().sum() > 0
    ours = namespace["gk"].GroupRobustLoss(namespace["gk"].GroupWeights(group_sizes=[1], step_size=0.0))
    arguments = [namespace[name] for name in ("logits", "labels", "ref_logps")]
    out = ours(arguments[0], arguments[1], namespace["group_ids"] * 0, ref_logps=arguments[2])
    assert out.loss.item() == pytest.approx(namespace["dpo_loss"](*arguments).item(), rel=1e-5)


@pytest.mark.usefixtures("my_model")
def test_trl_block() -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
    namespace: dict = {}
    exec(compile(TRL_BLOCK, "README.md", "exec"), namespace)
    history = namespace["trainer"].state.log_history
    assert namespace["trainer"].state.global_step == 2
    assert "groups/a/loss" in str(history)


def test_no_block_is_left_out() -> None:
    assert len(TEXT.splitlines()) <= 150, "long tables are in docs/"
    assert {language for language, _ in BLOCKS} == {"python", "sh"}
    known = {
        "make train",
        "make test",
        "pip install -c constraints.txt -e .",
    }
    assert known <= set(SHELL)
    assert [command for command in SHELL if command not in known] == [training_command()]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("train", "-m grpo_kernels train --compare"),
        ("test", "-m pytest"),
        ("bench", "grpo_kernels bench"),
        ("docs", "-m mkdocs build --strict"),
    ],
)
def test_make_targets_run_what_the_readme_says(target: str, runs: str) -> None:
    shown = make_would(target, "VENV=unused")
    assert "-m venv unused" in shown
    assert runs in shown
    bare = make_would(target, "VENV=", "PYTHON=mine")
    assert "venv" not in bare
    assert f"mine {runs}" in bare or "mine -m" in bare


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_the_tests_as_on_older_processors() -> None:
    """CONTRIBUTING.md's `make test-cpus`: all tests, or the files of FEW, with the instructions of two older ones."""
    for few in ([], ["FEW=1"]):
        shown = make_would("test-cpus", "VENV=", "PYTHON=mine", "PARALLEL=-n 1", *few)
        sse, avx2 = (shlex.split(line) for line in shown.splitlines())
        assert sse[:3] == ["ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=SSE41", "OMP_NUM_THREADS=1"]
        assert avx2[:2] == ["ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2"]
        assert sse[3:] == avx2[2:]
        assert sse[3:8] == ["mine", "-m", "pytest", "-n", "1"]
        files = [word for word in sse if word.startswith("tests/")]
        assert bool(files) == bool(few)
        assert all((ROOT / file).exists() for file in files)


def test_ci_calls_the_test_command() -> None:
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands.index("make test") < commands.index("make test-cpus FEW=1")


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"torch +usable: chunked plain PyTorch", shown)
    command = [sys.executable, "-m", "grpo_kernels", "doctor", "--json"]
    as_json = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(as_json)["backends"]["reference"]["not_usable_because"] == []
    if json.loads(as_json)["backends"]["cpp"]["not_usable_because"]:
        assert "extension: not built" in shown
    else:
        assert re.search(
            r"extension: (g\+\+|Clang) [\d.]+.*, -std=c\+\+17.*\n +instruction sets .*baseline; here \w+ is used", shown
        )
    for name in json.loads(as_json)["backends"]:
        assert f"| `{name}` |" in page("kernels.md"), "the table of backends is that of the code"


def training_command() -> str:
    return next(command for command in SHELL if "--data" in command)


def test_training_on_your_own_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        {"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}", "group": "north" if i % 3 else "south"}
        for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(training_command())
    assert words[:3] == ["python", "-m", "grpo_kernels"]
    assert main(words[3:]) == 0
    results = json.loads((tmp_path / "runs" / "mine" / "results.json").read_text())
    assert set(results["runs"]["plain"]["best"]["groups"]) == {"north", "south"}


def headings(text: str) -> set[str]:
    """What a link's #part may be: GitHub's and MkDocs' names of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_pictures_and_links_exist() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        text = path.read_text()
        for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            file, _, part = target.partition("#")
            assert (path.parent / file).exists(), f"{path.name}: {target}"
            if part:
                assert part in headings((path.parent / file).read_text() if file else text), f"{path.name}: {target}"


def test_formulas_are_in_the_files_that_the_table_names() -> None:
    """docs/method.md: what stands behind a link, `in code marks`, is defined in that file."""
    table = page("method.md").split("## Where each formula is")[1]
    named = re.findall(r"\]\(\.\./([^)]+)\),? `(\w+)`|`(\w+)` of \[[^]]+\]\(\.\./([^)]+)\)", table)
    assert len(named) >= 4
    for file, name, other_name, other_file in named:
        assert f"def {name or other_name}(" in (ROOT / (file or other_file)).read_text()


def test_no_pointer_leads_outside_the_repository() -> None:
    """Text names no document that is not here: docs/..., or one in capitals."""
    folders = ("grpo_kernels", "tests", "docs", "csrc", "benchmarks", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SOURCES]
    for path in [*files, *ROOT.glob("*.md"), ROOT / "Makefile"]:
        for named in re.findall(r"\b(?:[a-z_]+/)+[\w-]+\.md\b|\b[A-Z]{3,}\.md\b", path.read_text()):
            assert (ROOT / named).exists() or (path.parent / named).exists(), f"{path.relative_to(ROOT)}: {named}"


def test_benchmark_tables_are_those_of_the_records() -> None:
    """Every record is a row of docs/benchmarks.md, number by number; the README has six of them."""
    made = tables.tables()
    for name, text in (
        ("benchmarks", TEXT),
        ("logits benchmarks", page("benchmarks.md")),
        ("linear benchmarks", page("benchmarks.md")),
    ):
        assert f"<!-- {name} -->\n{made[name]}\n<!-- /{name} -->" in text, f"{name}: make plots writes the tables anew"
    rows = {name: [line for line in text.splitlines() if "`" in line] for name, text in made.items()}
    assert len(rows["benchmarks"]) == 6
    records = [
        record
        for path in tables.RECORDS.glob("*.json")
        for record in json.loads(path.read_text())["records"]
        if "median_ms" in record
    ]
    assert len(records) == len(rows["logits benchmarks"]) + len(rows["linear benchmarks"])
    for record in records:
        cells = f"| `{record['contender']}` | {record['median_ms']} ({record['iqr_ms'][0]} to {record['iqr_ms'][1]}) |"
        assert any(cells in row for row in rows["linear benchmarks"] + rows["logits benchmarks"])
