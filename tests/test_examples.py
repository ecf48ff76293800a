"""The scripts of examples/, as their docstrings say, on one rank and on two: the same numbers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(script: str, num_ranks: int) -> list[list[float]]:
    """The numbers of each line printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, f"examples/{script}"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [[float(x) for x in re.findall(r"\d+\.?\d*", line)] for line in ran.stdout.splitlines() if "alpha" in line]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("script", ["ddp.py", "fsdp2.py"])
def test_ranks_agree(script: str) -> None:
    one, two = run(script, 1), run(script, 2)
    assert [line[0] for line in one] == [5, 10, 15, 20]
    assert one[-1][1] < 0.9 * one[0][1], "it learns"
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, abs=5e-5)
        assert sum(together[2:]) == pytest.approx(1, abs=1e-5)


def test_both_scripts_are_the_same_method() -> None:
    assert run("ddp.py", 2)[-1] == pytest.approx(run("fsdp2.py", 2)[-1], abs=5e-5)
