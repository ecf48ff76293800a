"""Find better rows for grpo_kernels/kernels/triton/tiles.py on the GPU at hand, and print them.

    python benchmarks/tune_tiles.py [--rows 4096] [--seconds 60]

For each pass and each size of a logit it times the kernels over a grid of tiles and warps, at V = 128256 and 151936,
and prints the table with the best geometric mean. Nothing is written: paste what you like.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from typing import Any

import torch

VOCABULARIES = (128_256, 151_936)
DTYPES = {2: torch.bfloat16, 4: torch.float32}
BLOCKS = {2: (2048, 4096, 8192, 16384), 4: (1024, 2048, 4096, 8192)}
WARPS = (4, 8, 16)


def candidates() -> list[tuple[str, int, int, int]]:
    """(pass, bytes per logit, block, warps); at least one 16-byte load a thread."""
    found = []
    for pass_name, itemsize in itertools.product(("forward", "backward"), DTYPES):
        for block, warps in itertools.product(BLOCKS[itemsize], WARPS):
            if block * itemsize >= 16 * 32 * warps:
                found.append((pass_name, itemsize, block, warps))
    return found


def seconds_of(operation: Any, device: str, repetitions: int = 5) -> float:
    """The fastest of a few calls."""
    times = []
    for repetition in range(repetitions + 1):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            operation()
            end.record()
            torch.cuda.synchronize()
            elapsed = begin.elapsed_time(end) / 1e3
        else:
            began = time.perf_counter()
            operation()
            elapsed = time.perf_counter() - began
        if repetition:  # the first compiles
            times.append(elapsed)
    return min(times)


def measure(device: str, rows: int, vocabularies: tuple[int, ...], budget: float, repetitions: int = 5) -> list[dict]:
    """A record for each candidate that ran before ``budget`` seconds were over, best first within its pass and size."""
    from grpo_kernels.kernels.triton import logps, tiles

    began, records = time.monotonic(), []
    kept = dict(tiles.TILES)
    for pass_name, itemsize, block, warps in candidates():
        if time.monotonic() - began > budget:
            print(f"stopped after {budget:.0f} s: the rest was not tried", file=sys.stderr)
            break
        tiles.TILES[pass_name, itemsize] = tiles.Tile(block, warps, "being measured")
        bandwidths = []
        for vocab in vocabularies:
            logits = torch.randn(rows, vocab, device=device).to(DTYPES[itemsize])
            labels = torch.randint(0, vocab, (rows,), device=device)
            upstream = torch.ones(rows, device=device)
            _, lse = logps.token_logps_forward(logits, labels, -100)

            def forward(logits: Any = logits, labels: Any = labels) -> None:
                logps.token_logps_forward(logits, labels, -100)

            def backward(logits: Any = logits, labels: Any = labels, lse: Any = lse, up: Any = upstream) -> None:
                logps.token_logps_backward(up, logits, labels, lse, -100, logits)

            moved = logits.nbytes * (1 if pass_name == "forward" else 2)
            elapsed = seconds_of(forward if pass_name == "forward" else backward, device, repetitions)
            bandwidths.append(moved / elapsed / 1e9)
        mean = math.exp(sum(map(math.log, bandwidths)) / len(bandwidths))
        records.append(
            {"pass": pass_name, "itemsize": itemsize, "block": block, "num_warps": warps, "gbps": round(mean, 1)}
        )
        tiles.TILES[pass_name, itemsize] = kept[pass_name, itemsize]
    return sorted(records, key=lambda r: (r["pass"], r["itemsize"], -r["gbps"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no new candidate after this long")
    parser.add_argument("--json", action="store_true", help="print all records")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_tiles: there is no CUDA device", file=sys.stderr)
        return 2
    records = measure("cuda", arguments.rows, VOCABULARIES, arguments.seconds)
    if arguments.json:
        print(json.dumps(records, indent=2))
        return 0
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.rows} rows"
    seen = set()
    for record in records:
        key = (record["pass"], record["itemsize"])
        if key not in seen:
            seen.add(key)
            tile = f"Tile(block={record['block']}, num_warps={record['num_warps']}, measured={where!r})"
            print(f"    {key}: {tile},  # {record['gbps']} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
