"""The scripts of examples/, as their docstrings say, on one rank and where they can on two: the same numbers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
RUN_ON = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
# AdamW divides a gradient that is nothing but rounding by its own size: in float32 runs that ought to be the same drift
# apart. In float64 they agree in all digits that are printed, but for the last one's rounding.
IN_FLOAT64 = (
    "import runpy, sys, torch; torch.set_default_dtype(torch.float64); runpy.run_path(sys.argv[1], run_name='__main__')"
)
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


def numbers(output: str) -> list[list[float]]:
    """Those of each line that shows alpha."""
    return [[float(x) for x in re.findall(r"\d+\.?\d*", line)] for line in output.splitlines() if "alpha" in line]


def alone(script: str) -> list[list[float]]:
    """One rank needs no launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return numbers(output_of("-c", IN_FLOAT64, f"examples/{script}", **address, **ranks))


def two(script: str) -> list[list[float]]:
    command = ["--no-python", sys.executable, "-c", IN_FLOAT64, f"examples/{script}"]
    return numbers(output_of(*RUN_ON, "2", *command))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_both_scripts_on_one_rank_and_on_two_are_the_same_method() -> None:
    first = alone("ddp.py")
    assert [line[0] for line in first] == [5, 10, 15, 20]
    assert first[-1][1] < 0.9 * first[0][1], "it learns"
    for line in first:
        assert sum(line[2:]) == pytest.approx(1, abs=3 * PRINTED)
    for other in (two("ddp.py"), alone("fsdp2.py"), two("fsdp2.py")):
        for line, same in zip(first, other, strict=True):
            assert same == pytest.approx(line, abs=PRINTED)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_as_the_readme_starts_it() -> None:
    lines = numbers(output_of(*RUN_ON, "2", "examples/ddp.py"))
    assert [line[0] for line in lines] == [5, 10, 15, 20]
    assert lines[-1][1] < 0.9 * lines[0][1], "it learns"


def test_pure_torch() -> None:
    lines = numbers(output_of("examples/plain.py"))
    assert [line[0] for line in lines] == [5, 10, 15, 20]
    assert lines[-1][1] < 0.9 * lines[0][1], "it learns"


def test_accelerate() -> None:
    """A step of four micro-batches on one rank, or of two on each of two."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'grpo-kernels[trl]'")
    assert len((ROOT / "examples/with_accelerate.py").read_text().splitlines()) <= 40
    one, both = numbers(output_of("-c", IN_FLOAT64, "examples/with_accelerate.py")), two("with_accelerate.py")
    assert [line[0] for line in both] == [5, 10, 15, 20]
    assert len({line[1] for line in both}) == 4, "alpha moves"
    for line, same in zip(one, both, strict=True):
        assert same == pytest.approx(line, abs=PRINTED)


def test_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
    row = {"prompt": "{}?", "chosen": " yes {}", "rejected": " no {}"}
    rows = [{name: text.format(i) for name, text in row.items()} | {"group": "ab"[i % 3 == 0]} for i in range(24)]
    files = [str(tmp_path / name) for name in ("train.jsonl", "eval.jsonl")]
    for file in files:
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--steps", "4", "--max-length", "32", "--out", str(tmp_path / "out")]
    table = [line.split(" | ") for line in output_of("examples/with_trl.py", *files, *options).splitlines()[-10:]]
    assert [(line[0].strip("| "), int(line[1])) for line in table] == [(g, s) for g in "ab" for s in range(5)]
    for group, count in (("a", 16), ("b", 8)):
        losses = [float(line[2]) for line in table if line[0] == f"| {group}"]
        assert losses[0] == pytest.approx(0.6931, abs=1e-4)
        assert losses[-1] < 0.69
        assert {line[5] for line in table if line[0] == f"| {group}"} == {f"{count} |"}
