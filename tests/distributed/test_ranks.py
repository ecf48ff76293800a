"""Exactness across ranks: cases.py and the other files of cases under gloo with one, two and four processes.

Processes are dear to start, so all cases run in one start of worlds.py; each is a test of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from once import once

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import edge_cases  # noqa: E402, F401  (adds its cases)
import group_cases  # noqa: E402, F401
import saved_cases  # noqa: E402, F401
import sharded_cases  # noqa: E402, F401
from cases import CASES  # noqa: E402


def run_worlds(folder: Path) -> None:
    paths = [str(FOLDER.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        command = [sys.executable, str(FOLDER / "worlds.py"), str(folder)]
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "worlds", run_worlds)


@pytest.mark.parametrize(
    ("world", "name"), [pytest.param(w, name, id=f"{w}-{name}") for name, one in CASES.items() for w in one.worlds]
)
def test_case(world: int, name: str, worlds: Path) -> None:
    for rank in range(world):
        path = worlds / f"{world}-{rank}.json"
        results = json.loads(path.read_text()) if path.exists() else {}
        assert name in results, f"rank {rank} did not get to it:\n{(worlds / 'output').read_text()[-3000:]}"
        assert not results[name], f"rank {rank}:\n{results[name]}"
