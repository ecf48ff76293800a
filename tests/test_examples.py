"""The scripts of examples/, as their docstrings say, on one rank and where they can on two: the same numbers."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from once import once

import grpo_kernels as gk

ROOT = Path(__file__).parent.parent
RUN_ON = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
FORKED = ROOT / "tests" / "ranks_of_examples.py"
# In float64 runs that are the same method agree in all digits that are printed, but for the last one's rounding.
PRINTED = 1.5e-6


def output_of(*command: str, **environment: str) -> str:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **fixed, **environment}
    for _ in range(2):
        ran = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        # Seen once in some fifty starts: a thread of PyTorch, at the end of a process that runs no C++ of ours.
        if "terminate called without an active exception" not in ran.stderr:
            break
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture
def printed_by(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a script prints, as the program of this process: a new one would import for longer than it runs."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def printed(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
        return capsys.readouterr().out

    return printed


def numbers(output: str) -> list[list[float]]:
    """Those of each line that shows alpha."""
    return [[float(x) for x in re.findall(r"\d+\.?\d*", line)] for line in output.splitlines() if "alpha" in line]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[list[float]]]:
    """The numbers that a script prints on one rank or on two."""
    scripts = ["ddp.py", "fsdp2.py", *(["with_accelerate.py"] if importlib.util.find_spec("accelerate") else [])]
    runs = [(script, ranks) for script in scripts for ranks in (1, 2)]
    runs += [("tensor_parallel.py", ranks) for ranks in (1, 4)]
    jobs = [f"{ROOT / 'examples' / script}:{ranks}" for script, ranks in runs]
    folder = once(tmp_path_factory, "examples", lambda folder: output_of(str(FORKED), str(folder), *jobs))

    def printed(script: str, ranks: int, rank: int = 0) -> list[list[float]]:
        return numbers((folder / f"{script}-{ranks}-{rank}").read_text())

    return printed


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_both_scripts_on_one_rank_and_on_two_are_the_same_method(on_ranks: Callable) -> None:
    first = on_ranks("ddp.py", 1)
    assert [line[0] for line in first] == [5, 10, 15, 20]
    assert first[-1][1] < 0.9 * first[0][1], "it learns"
    for line in first:
        assert sum(line[2:]) == pytest.approx(1, abs=3 * PRINTED)
    for other in (("ddp.py", 2), ("fsdp2.py", 1), ("fsdp2.py", 2)):
        for line, same in zip(first, on_ranks(*other), strict=True):
            assert same == pytest.approx(line, abs=PRINTED)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_stages_of_tensor_parallel_ranks_are_one_process(on_ranks: Callable) -> None:
    one = on_ranks("tensor_parallel.py", 1)
    assert [line[0] for line in one] == [5, 10, 15, 20]
    assert one[-1][1] < 0.9 * one[0][1], "it learns"
    for line, same in zip(one, on_ranks("tensor_parallel.py", 4, 2), strict=True):  # the last stage's first rank
        assert same == pytest.approx(line, abs=PRINTED)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_as_the_readme_starts_it() -> None:
    lines = numbers(output_of(*RUN_ON, "2", "examples/ddp.py"))
    assert [line[0] for line in lines] == [5, 10, 15, 20]
    assert lines[-1][1] < 0.9 * lines[0][1], "it learns"


def test_pure_torch(printed_by: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    common = importlib.import_module("common")
    show, pair_losses = common.show, []

    def shown(step: int, out: gk.GroupRobustOutput) -> None:
        pair_losses.append(out.pair_losses.mean().item())
        show(step, out)

    monkeypatch.setattr(common, "show", shown)
    lines = numbers(printed_by("plain.py"))
    assert [line[0] for line in lines] == [5, 10, 15, 20]
    assert lines[-1][1] < 0.9 * lines[0][1]
    assert pair_losses[0] == pytest.approx(math.log(2), rel=1e-6), "the model is its own reference yet"
    assert sum(pair_losses[10:]) / 10 < 0.97 * math.log(2), "it learns: without a step each is log 2"


def test_accelerate(on_ranks: Callable) -> None:
    """A step of four micro-batches on one rank, or of two on each of two."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'grpo-kernels[trl]'")
    assert len((ROOT / "examples/with_accelerate.py").read_text().splitlines()) <= 40
    one, both = (on_ranks("with_accelerate.py", ranks) for ranks in (1, 2))
    assert [line[0] for line in both] == [5, 10, 15, 20]
    assert len({line[1] for line in both}) == 4, "alpha moves"
    for line, same in zip(one, both, strict=True):
        assert same == pytest.approx(line, abs=PRINTED)


def test_trl(tmp_path: Path, printed_by: Callable[..., str]) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
    row = {"prompt": "{}?", "chosen": " yes {}", "rejected": " no {}"}
    rows = [{name: text.format(i) for name, text in row.items()} | {"group": "ab"[i % 3 == 0]} for i in range(24)]
    files = [str(tmp_path / name) for name in ("train.jsonl", "eval.jsonl")]
    for file in files:
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--steps", "4", "--max-length", "32", "--out", str(tmp_path / "out")]
    table = [line.split(" | ") for line in printed_by("with_trl.py", *files, *options).splitlines()[-10:]]
    assert [(line[0].strip("| "), int(line[1])) for line in table] == [(g, s) for g in "ab" for s in range(5)]
    for group, count in (("a", 16), ("b", 8)):
        losses = [float(line[2]) for line in table if line[0] == f"| {group}"]
        assert losses[0] == pytest.approx(0.6931, abs=1e-4)
        assert losses[-1] < 0.69
        assert {line[5] for line in table if line[0] == f"| {group}"} == {f"{count} |"}


def test_unknown_groups_are_found_and_served(printed_by: Callable[..., str]) -> None:
    right, plain, robust = (
        [float(x) for x in re.findall(r"\d\.\d+", line)] for line in printed_by("unknown_groups.py").splitlines()
    )
    assert right[0] >= 0.95
    assert max(robust) < max(plain), "the type that does worst does better"
