"""Find better rows for grpo_kernels/kernels/triton/tiles.py on the GPU at hand, and print them.

    python benchmarks/tune_tiles.py [--seconds 60]

What is timed is what users run: GroupRobustLoss, its fused forward and its backward in place, over a grid of tiles, at
V = 128256 and 151936. The tile at present comes first, so that the rest has something to beat. Nothing is written:
paste what you like.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from grpo_kernels.bench import logits, suite
from grpo_kernels.bench.cases import Case, cost
from grpo_kernels.kernels.triton import tiles

SHAPES = ((16, 512, 128_256), (16, 512, 151_936))
DTYPES = {2: "bfloat16", 4: "float32"}
# What a Tile has of these is tried in all combinations, by bytes a logit.
CHOICES: dict[str, dict[int, tuple]] = {
    "max_registers": {2: (64, None), 4: (64, None)},
    "block": {2: (8192, 4096, 16384, 2048), 4: (4096, 2048, 8192, 1024)},
    "num_warps": {2: (8, 4, 16), 4: (8, 4, 16)},
}
REPETITIONS = 9
CONTENDER = "triton in place"


def candidates(pass_name: str, itemsize: int) -> list[tiles.Tile]:
    """The present tile, and others whose threads load at least 16 bytes at a time."""
    present = tiles.TILES[pass_name, itemsize]
    names = [name for name in CHOICES if hasattr(present, name)]
    others = []
    for values in itertools.product(*(CHOICES[name][itemsize] for name in names)):
        tile = replace(present, **dict(zip(names, values, strict=True)))
        if tile != present and tile.block * itemsize >= 16 * 32 * tile.num_warps:
            others.append(tile)
    return [present, *others]


def gbps(pass_name: str, case: Case, inputs: tuple[Any, ...], operation: suite.Operation, repetitions: int) -> float:
    """Of the least that the pass must move.

    Raises:
        RuntimeError: the kernel does not compile or run with this tile.
    """
    operations = {CONTENDER: operation}
    times, _, failed = suite.measure_times(logits.SUITE, operations, case, inputs, repetitions, "cuda")
    if failed:
        raise RuntimeError(failed[CONTENDER])
    own = [forward if pass_name == "forward" else backward for forward, backward, _ in times[CONTENDER]]
    return cost(case)[pass_name].bytes / median(own) / 1e6


def search(left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """A record for each candidate; after those of a pass and size, the row that is best. ``left``: seconds yet."""
    (contender,) = (one for one in logits.SUITE.contenders if one.name == CONTENDER)
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    for itemsize, pass_name in itertools.product(DTYPES, ("forward", "backward")):
        key, found = (pass_name, itemsize), []
        cases = [Case(*shape, DTYPES[itemsize]) for shape in SHAPES]
        ready = [(case, logits.inputs_of(case, "cuda"), contender.build(case)) for case in cases]
        present = tiles.TILES[key]
        for tile in candidates(*key):
            if left() < 3:
                yield {"pass": pass_name, "itemsize": itemsize, "not_tried": "the rest: the time is over"}
                break
            record = {"pass": pass_name, "itemsize": itemsize, **asdict(tile), "measured": where}
            tiles.TILES[key] = tile
            try:
                rates = [gbps(pass_name, *one, REPETITIONS) for one in ready]
            except RuntimeError as error:
                yield {**record, "failed_because": str(error)}
                continue
            finally:
                tiles.TILES[key] = present
            record["gbps"] = round(math.exp(sum(map(math.log, rates)) / len(rates)), 1)
            found.append(record)
            yield record
        if found:
            yield {"best": max(found, key=lambda record: record["gbps"]), "present": found[0]["gbps"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no new candidate after this long")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_tiles: there is no CUDA device", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.seconds
    for record in search(lambda: end - time.monotonic()):
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
