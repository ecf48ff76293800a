"""Forward and backward of GroupRobustLoss on a GPU against eager PyTorch, torch.compile and a plain copy: JSON records.

    python benchmarks/gpu_bench.py [--seconds 100]

The protocol is that of benchmarks/README.md; times are CUDA events. With --device cpu it rehearses on a tiny case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import GroupRobustLoss, GroupWeights, backends
from grpo_kernels.bench import GROUP_SIZES
from grpo_kernels.bench_cases import Case, cost
from grpo_kernels.bench_machine import environment

CASES = (
    Case(32, 512, 128_256, "bfloat16"),
    Case(32, 512, 128_256, "bfloat16", ignored=0.5),
    Case(32, 512, 151_936, "bfloat16"),
    Case(32, 512, 128_256, "float32"),
    Case(2, 64, 128_256, "bfloat16"),
)
REHEARSAL = (Case(4, 3, 200, "float32"),)


class Clock:
    """Milliseconds between marks on the device's own time line."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:], strict=False)]


def loss_of(backend: str, device: str, inplace: bool = False) -> GroupRobustLoss:
    weights = GroupWeights(group_sizes=GROUP_SIZES, step_size=0.01)
    return GroupRobustLoss(weights, beta=0.1, backend=backend, inplace_backward=inplace).to(device)


def contenders(device: str) -> dict[str, Callable]:
    found: dict[str, Callable] = {
        "eager": loss_of("reference", device),
        "torch.compile": torch.compile(loss_of("reference", device)),
        "torch in place": loss_of("torch", device, inplace=True),
    }
    for name in ("triton", "cuda"):
        if not backends().get(name, ["no such backend"]):
            found[name] = loss_of(name, device)
            found[f"{name} in place"] = loss_of(name, device, inplace=True)
    return found


def inputs_of(case: Case, device: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shape = (case.num_sequences, case.length)
    logits = torch.empty(*shape, case.vocab_size, dtype=getattr(torch, case.dtype), device=device).normal_()
    labels = torch.randint(0, case.vocab_size, shape, device=device)
    labels[:, : int(case.length * case.ignored)] = -100
    group_ids = torch.arange(case.num_sequences // 2, device=device) % len(GROUP_SIZES)
    return logits, labels, group_ids, torch.randn(case.num_sequences, device=device)


def gate(loss_fn: Callable, case: Case, device: str) -> float:
    """Largest error of the gradient over the largest gradient, against float64, on the last 8 positions.

    Raises:
        ValueError: it is more than four roundings of the dtype.
    """
    logits, labels, *rest = inputs_of(case, device)
    logits, labels = logits[:, -8:].contiguous(), labels[:, -8:].contiguous()
    leaf, exact_leaf = logits.requires_grad_(), logits.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(loss_of("reference", device)(exact_leaf, labels, *rest).loss, exact_leaf)
    (got,) = torch.autograd.grad(loss_fn(leaf, labels, *rest).loss, leaf)
    error = ((got.double() - exact).abs().max() / exact.abs().max()).item()
    allowed = 4 * torch.finfo(logits.dtype).eps
    if not error <= allowed:
        raise ValueError(f"gradient error {error:.2g} is over {allowed:.2g}")
    return error


def measure(case: Case, device: str, repetitions: int) -> list[dict[str, Any]]:
    """A record for each contender that passes the gate and fits the memory; the others' say why they have no times."""
    logits, *rest = inputs_of(case, device)
    pristine = logits.clone()
    records, times, copies = [], {}, []
    for name, loss_fn in contenders(device).items():
        record: dict[str, Any] = {"contender": name, "case": asdict(case)}
        records.append(record)
        try:
            record["gradient_error"] = gate(loss_fn, case, device)
            times[name], host = [], []
            for repetition in range(repetitions + 2):
                if device == "cuda":
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                leaf = logits.detach().requires_grad_()
                clock = Clock(device)
                began = time.perf_counter()
                clock.mark()
                loss = loss_fn(leaf, *rest).loss
                clock.mark()
                (gradient,) = torch.autograd.grad(loss, leaf)
                clock.mark()
                host.append(1e3 * (time.perf_counter() - began))
                forward, backward = clock.laps()
                if device == "cuda":
                    record["peak_extra_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
                del loss, gradient, leaf
                copy = Clock(device)
                copy.mark()
                logits.copy_(pristine)
                copy.mark()
                if repetition >= 2:  # the first ones compile and warm up
                    times[name].append({"forward": forward, "backward": backward, "both": forward + backward})
                    copies += copy.laps()
            record["host_ms"] = round(median(host[2:]), 3)
        except (ValueError, RuntimeError, NotImplementedError) as error:  # out of memory is a RuntimeError
            times.pop(name, None)
            record["not_measured_because"] = str(error).splitlines()[0][:300]
            logits.copy_(pristine)
    copy_gbps = 2 * logits.nbytes / median(copies) / 1e6 if copies else float("nan")
    for record in records:
        for part, (floor, _) in cost(case).items():
            laps = [lap[part] for lap in times.get(record["contender"], [])]
            if laps:
                low, middle, high = quantiles(laps, n=4) if len(laps) > 1 else laps * 3
                record[part] = {
                    "median_ms": round(middle, 4),
                    "iqr_ms": [round(low, 4), round(high, 4)],
                    "floor_bytes": floor,
                    "fraction_of_copy": round(floor / middle / 1e6 / copy_gbps, 4),
                }
        record["copy_gbps"] = round(copy_gbps, 1)
        record["repetitions"] = repetitions
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=100.0, help="begin no new case after this long")
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_bench: there is no CUDA device", file=sys.stderr)
        return 2
    began, records = time.monotonic(), []
    for case in CASES if arguments.device == "cuda" else REHEARSAL:
        if time.monotonic() - began > arguments.seconds:
            print(f"{case.name}: not measured, {arguments.seconds:.0f} s were over", file=sys.stderr)
            continue
        records += measure(case, arguments.device, arguments.repetitions)
    found = environment()
    if arguments.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    found["command"] = "python benchmarks/gpu_bench.py"
    print(json.dumps({**found, "records": records}, indent=2))
    return 0 if any("both" in record for record in records) else 1


if __name__ == "__main__":
    sys.exit(main())
