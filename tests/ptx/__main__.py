"""`make ptx`: more shapes and interleavings than the tests take, and each barrier and fence left out in turn."""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from ptx import cases, cuda_kernels, faults
from ptx.memory import Fault

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def every_case(seed: int) -> list[cases.Tokens | cases.Fused]:
    tokens = [
        cases.Tokens(dtype, vocab, splits, inplace=inplace, seed=seed)
        for dtype, (vocab, splits), inplace in itertools.product(
            DTYPES, ((1, 1), (127, 2), (2501, 3), (2560, 1)), (False, True)
        )
    ]
    fused = [
        cases.Fused(dtype, vocab, splits, packed, every_option, seed)
        for dtype, (vocab, splits), packed, every_option in itertools.product(
            DTYPES, ((300, 1), (777, 3)), (False, True), (False, True)
        )
    ]
    return [*tokens, *fused]


def run(compiler: str, case: cases.Tokens | cases.Fused, mutate: cases.Mutate | None = None) -> None:
    (cases.run_tokens if isinstance(case, cases.Tokens) else cases.run_fused)(compiler, case, mutate)


def left_out(compiler: str, case: cases.Fused, seeds: int) -> None:
    """Which barriers and fences of the fused kernel are needed, by the source line that they come from."""
    seen: dict[str, str] = {}

    def look(name: str, text: str) -> str:
        seen[name] = text
        return text

    run(compiler, case, look)
    name = next(one for one in seen if "group_robust" in one)
    for opcode in ("bar.sync", "membar", "fence"):
        for source in faults.instructions_by_source(seen[name], name, opcode):
            found = None
            for seed in range(seeds):
                try:
                    other = cases.Fused(case.dtype, case.vocab, case.splits, case.packed, seed=seed)
                    run(compiler, other, faults.without(name, opcode, source))
                except Fault as fault:
                    found = fault.kind
                    break
            print(f"{compiler}: without {opcode} of {source}: {found or 'nothing found'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="make ptx", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="interleavings of each case")
    parser.add_argument("--compiler", choices=("triton", "cuda"), action="append")
    parser.add_argument("--left-out", action="store_true", help="only the barriers and fences")
    options = parser.parse_args()
    for compiler in options.compiler or ("triton", "cuda"):
        if compiler == "cuda" and cuda_kernels.missing():
            print(f"cuda: {cuda_kernels.missing()}")
            continue
        for seed in range(0 if options.left_out else options.seeds):
            for case in every_case(seed):
                begun = time.process_time()
                run(compiler, case)
                print(f"{compiler} {case}: {time.process_time() - begun:.1f} s", flush=True)
        left_out(compiler, cases.Fused(torch.bfloat16, 777, 3, packed=True), options.seeds)


if __name__ == "__main__":
    main()
