"""Exactness across ranks: the cases of cases.py and sharded_cases.py under gloo with one, two and four processes.

Processes are dear to start, so all cases of a world size run in one start; each is a test of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

WORLD_SIZES = (1, 2, 4)


def worker(rank: int, world: int, folder: str) -> None:
    import sharded_cases  # noqa: F401  (adds its cases)
    import torch.distributed as dist
    from cases import CASES

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


@lru_cache
def results_of(world: int) -> list[dict[str, str]]:
    folder = tempfile.mkdtemp()
    environment = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    os.environ.update(environment)
    context = torch.multiprocessing.spawn(worker, (world, folder), nprocs=world, join=False)
    try:
        while not context.join(timeout=240):
            pass
    except Exception as error:  # a rank died, in the case after the last one that all ranks finished
        print(f"world size {world}: {error}")
    found = []
    for rank in range(world):
        path = Path(folder, f"rank{rank}.json")
        found.append(json.loads(path.read_text()) if path.exists() else {})
    return found


def case_names() -> list[str]:
    import sharded_cases  # noqa: F401  (adds its cases)
    from cases import CASES

    return list(CASES)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("name", case_names())
@pytest.mark.parametrize("world", WORLD_SIZES)
def test_case(world: int, name: str) -> None:
    for rank, results in enumerate(results_of(world)):
        assert name in results, f"rank {rank} did not get to it"
        assert not results[name], f"rank {rank}:\n{results[name]}"
