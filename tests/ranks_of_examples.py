"""Runs scripts in float64 on so many ranks each: ``python ranks_of_examples.py FOLDER SCRIPT:RANKS ...``.

AdamW divides a gradient that is nothing but rounding by its own size: in float32 runs that ought to be the same drift
apart. Importing PyTorch is what a rank costs most, so ranks are forks of this process, which has no threads. What
rank r prints is in FOLDER/SCRIPT-RANKS-r.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed

# What the scripts load, or PyTorch and Accelerate for them.
for module in ("grpo_kernels", "torch.distributed.fsdp", "torch._dynamo", "accelerate", "transformers.modeling_utils"):
    with contextlib.suppress(ImportError):
        importlib.import_module(module)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}


def run(script: Path, output: Path) -> None:
    status = 1
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(1)
            sys.argv = [str(script)]
            sys.path.insert(0, str(script.parent))
            runpy.run_path(str(script), run_name="__main__")
            status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(folder: Path, jobs: list[str]) -> int:
    failed = 0
    for job in jobs:
        script, ranks = Path(job.split(":")[0]), int(job.split(":")[1])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                os.environ.update(environment(rank, ranks, port))
                run(script, folder / f"{script.name}-{ranks}-{rank}")
            children.append(child)
        for child in children:
            failed |= os.waitpid(child, 0)[1]
    return int(failed != 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
