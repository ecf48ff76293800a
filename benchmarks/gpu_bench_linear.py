"""DPO from hidden states and the head's weight on a GPU, ours and the peers that are installed: JSON records.

    python benchmarks/gpu_bench_linear.py [--seconds 60] [--cases 'linear/llama-3-8b/*']

The adapters and the gate are the package's; times are CUDA events. With --device cpu it rehearses on a tiny case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu_bench import Clock

from grpo_kernels import bench_linear, bench_machine
from grpo_kernels.bench_cases import LinearCase, cost, select
from grpo_kernels.bench_peers import PEERS, Peer

CASES = (
    LinearCase(16, 512, 4096, 128_256, "bfloat16"),
    LinearCase(16, 512, 4096, 128_256, "bfloat16", ignored=0.5),
)
REHEARSAL = (LinearCase(4, 8, 16, 200),)


def laps_of(operation: Any, inputs: tuple, device: str) -> dict[str, float]:
    """Milliseconds of the passes on the device, and of the host until both are enqueued."""
    clock = Clock(device)
    began = time.perf_counter()
    clock.mark()
    loss = operation(*inputs)
    clock.mark()
    torch.autograd.grad(loss, inputs[:2])
    clock.mark()
    host = 1e3 * (time.perf_counter() - began)
    forward, backward = clock.laps()
    return {"forward": forward, "backward": backward, "both": forward + backward, "host": host}


def matrix_gflops(case: LinearCase, device: str) -> float:
    """The rate of the case's own first product, float32 sums included."""
    dtype = getattr(torch, case.dtype)
    rows = min(case.counted, 4096)
    left = torch.randn(rows, case.hidden_size, device=device, dtype=dtype)
    right = torch.randn(case.hidden_size, case.vocab_size, device=device, dtype=dtype)
    laps = []
    for _ in range(7):
        clock = Clock(device)
        clock.mark()
        left @ right
        clock.mark()
        laps += clock.laps()
    return 2 * rows * case.hidden_size * case.vocab_size / median(laps[2:]) / 1e6


def measure_peer(peer: Peer, case: LinearCase, device: str, repetitions: int) -> dict[str, Any]:
    """What the peer's record says of its times.

    Raises:
        ValueError: its gradient is wrong.
    """
    found: dict[str, Any] = {"gradient_error": bench_linear.gate(peer, case, device)}
    operation, inputs = peer.build(), bench_linear.inputs_of(case, device)
    for _ in range(2):
        laps_of(operation, inputs, device)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    laps = [laps_of(operation, inputs, device) for _ in range(repetitions)]
    if device == "cuda":
        found["peak_extra_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
    for part in ("forward", "backward", "both"):
        low, middle, high = quantiles([lap[part] for lap in laps], n=4)
        found[part] = {"median_ms": round(middle, 4), "iqr_ms": [round(low, 4), round(high, 4)]}
    found["host_ms"] = round(median(lap["host"] for lap in laps), 3)
    one_call = partial(laps_of, operation, inputs, device)
    found["launches" if device == "cuda" else "operator_calls"] = bench_machine.operator_calls(one_call, device)
    return found


def measure(case: LinearCase, device: str, repetitions: int) -> list[dict[str, Any]]:
    """A record for each peer; those that cannot run, are wrong or do not fit say why."""
    rate, floor = matrix_gflops(case, device), cost(case)
    records = []
    for peer in PEERS:
        record: dict[str, Any] = {"contender": peer.name, "also_computes": peer.computes, "case": asdict(case)}
        reason = peer.why_not(device)
        if reason is None:
            try:
                record |= measure_peer(peer, case, device, repetitions)
                for part in ("forward", "backward", "both"):
                    record[part]["floor_flops"] = floor[part].flops
                    gflops = floor[part].flops / record[part]["median_ms"] / 1e6
                    record[part]["fraction_of_matrix_rate"] = round(gflops / rate, 4)
            except Exception as error:  # a peer may raise anything; one that fails costs the others nothing
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if reason is not None:
            record["not_measured_because"] = reason
        record |= {"matrix_gflops": round(rate, 1), "repetitions": repetitions}
        records.append(record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no new case after this long")
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--cases", nargs="+", default=(), help="names of grpo_kernels/bench_cases.py, or patterns")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_bench_linear: there is no CUDA device", file=sys.stderr)
        return 2
    cases: Any = CASES if arguments.device == "cuda" else REHEARSAL
    if arguments.cases:
        cases = [case for case in select(arguments.cases).values() if isinstance(case, LinearCase)]
    began, records = time.monotonic(), []
    for case in cases:
        if time.monotonic() - began > arguments.seconds:
            print(f"{case.name}: not measured, {arguments.seconds:.0f} s were over", file=sys.stderr)
            continue
        records += measure(case, arguments.device, arguments.repetitions)
    found = bench_machine.environment()
    if arguments.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    found["command"] = "python benchmarks/gpu_bench_linear.py"
    print(json.dumps({**found, "records": records}, indent=2))
    return 0 if any("both" in record for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
