"""Runs the cases of cases.py and the other files of cases, world after world: ``python worlds.py FOLDER``.

Importing PyTorch is what a rank costs most, so ranks are forks of this process, which has no threads. Rank r of world w
leaves FOLDER/w-r.json: {case: "", or what went wrong}, and prints what each case costs.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import edge_cases  # noqa: F401  (adds its cases)
import group_cases  # noqa: F401
import quick_interpreter
import saved_cases  # noqa: F401
import sharded_cases  # noqa: F401
import torch
import torch.distributed as dist
from cases import CASES, WORLD_SIZES

# By PyTorch as well: once here instead of once in each rank.
IMPORTED_BY_CASES = [
    f"torch.{name}"
    for name in (
        *("_dynamo.backends.debugging", "_functorch.aot_autograd", "_inductor.compile_fx"),
        *("distributed.checkpoint.state_dict", "distributed.fsdp", "distributed.pipelining"),
    )
]


def rank_of_world(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=5))
    results = {}
    for name, one in CASES.items():
        if world not in one.worlds:
            continue
        torch.manual_seed(0)
        began = time.process_time()
        try:
            one.function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(f"world {world}, rank {rank}, {name}: {time.process_time() - began:.1f} s of CPU", flush=True)
        (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> None:
    quick_interpreter.install()
    for module in IMPORTED_BY_CASES:
        importlib.import_module(module)
    for world in WORLD_SIZES:
        try:
            torch.multiprocessing.start_processes(rank_of_world, (world, folder), nprocs=world, start_method="fork")
        except Exception as error:  # a rank died, in the case after the last one that all ranks finished
            print(f"world size {world}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
