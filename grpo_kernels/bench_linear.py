"""`python -m grpo_kernels bench`, the linear path: DPO from hidden states and the head's weight, forward and backward.

All contenders of bench_peers.py in one process, in turns, each checked against float64 first; beside them the three
bare matrix products that any of them must do at least.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.bench_cases import LinearCase, cost
from grpo_kernels.bench_machine import matrix_gflops, operator_calls, resident_kib
from grpo_kernels.bench_peers import PEERS, Peer, Reference, dpo

CASES = (
    LinearCase(8, 512, 512, 32_000, ignored=0.5),
    LinearCase(8, 512, 512, 32_000, ignored=0.5, reference=True),
    LinearCase(8, 512, 512, 32_000, reference=True),
)
QUICK_CASES = (LinearCase(4, 64, 128, 8_000),)


def inputs_of(case: LinearCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Reference]:
    """(hidden, weight, labels, reference), the first two requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (case.num_sequences, case.length), getattr(torch, case.dtype)

    def states_and_head() -> tuple[Tensor, Tensor]:
        hidden = torch.randn(*shape, case.hidden_size, generator=generator)
        weight = torch.randn(case.vocab_size, case.hidden_size, generator=generator) / case.hidden_size**0.5
        return hidden.to(device, dtype), weight.to(device, dtype)

    hidden, weight = (x.requires_grad_() for x in states_and_head())
    labels = torch.randint(0, case.vocab_size, shape, generator=generator)
    labels[:, : int(case.length * case.ignored)] = -100
    return hidden, weight, labels.to(device), states_and_head() if case.reference else None


def gate(peer: Peer, case: LinearCase, device: str = "cpu") -> float:
    """The larger of dhidden's and dweight's error, over the largest exact entry, on 16 positions of each sequence.

    Raises:
        ValueError: it is more than 256 roundings of the dtype: sums over the vocabulary and over tokens.
    """
    small = replace(case, length=16)
    hidden, weight, labels, reference = inputs_of(small, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact_reference = None if reference is None else (reference[0].double(), reference[1].double())

    @dpo
    def exact_loss_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        picked = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (picked * (labels != -100)).sum(-1)

    exact_loss = exact_loss_of(*exact_inputs, labels, exact_reference)
    exact = torch.autograd.grad(exact_loss, exact_inputs)
    loss = peer.build()(hidden, weight, labels, reference)
    grads = torch.autograd.grad(loss, (hidden, weight))
    errors = [((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(grads, exact, strict=True)]
    allowed = 256 * torch.finfo(hidden.dtype).eps
    if not max(errors) <= allowed or abs(loss.item() - exact_loss.item()) > 1e-4 * abs(exact_loss.item()):
        raise ValueError(f"gradient error {max(errors):.2g} is over {allowed:.2g} or the loss is wrong")
    return max(errors)


def step(operation: Any, inputs: tuple[Tensor, Tensor, Tensor, Reference]) -> tuple[float, float]:
    """(forward, backward) milliseconds."""
    began = time.perf_counter()
    loss = operation(*inputs)
    between = time.perf_counter()
    torch.autograd.grad(loss, inputs[:2])
    return 1e3 * (between - began), 1e3 * (time.perf_counter() - between)


def passes(times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Median and quartiles of forward and of backward, as a record holds them."""
    found: dict[str, Any] = {}
    for part, laps in zip(("forward", "backward"), zip(*times, strict=True), strict=True):
        low, middle, high = quantiles(laps, n=4)
        found[f"{part}_ms"] = round(middle, 2)
        found[f"{part}_iqr_ms"] = [round(low, 2), round(high, 2)]
    return found


def measure_times(case: LinearCase, peers: Sequence[Peer], repetitions: int) -> dict[str, list[tuple[float, float]]]:
    """(forward, backward) milliseconds of each and of the bare products, in turns; the first two rounds warm up."""
    inputs = inputs_of(case)
    operations = {peer.name: peer.build() for peer in peers}
    hidden = inputs[0].detach()[inputs[2] != -100]
    weight, logits = inputs[1].detach(), torch.empty(case.counted, case.vocab_size, dtype=hidden.dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> tuple[float, float]:
        began = time.perf_counter()
        torch.mm(hidden, weight.t(), out=logits)
        if inputs[3] is not None:
            torch.mm(hidden, inputs[3][1].t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)
        return 1e3 * (time.perf_counter() - began), 0.0

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*operations, "products")}
    for repetition in range(repetitions + 2):
        for name in times:
            laps = products() if name == "products" else step(operations[name], inputs)
            if repetition >= 2:
                times[name].append(laps)
    return times


def peak_extra_mib(peer: Peer, case: LinearCase) -> float:
    """Resident memory at the peak of one step above what it was before, in a fresh process (Linux)."""
    request = json.dumps({"peer": peer.name, "case": asdict(case)})
    command = [
        sys.executable,
        "-c",
        "from grpo_kernels import bench_linear; bench_linear.report_peak_memory()",
        request,
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def report_peak_memory() -> None:
    """The child process of `peak_extra_mib`: prints one number."""
    request = json.loads(sys.argv[-1])
    peer = next(peer for peer in PEERS if peer.name == request["peer"])
    case = LinearCase(**request["case"])
    operation = peer.build()
    small = replace(case, num_sequences=2, length=16)
    step(operation, inputs_of(small))  # loads libraries, starts threads, compiles
    if peer.adapts:
        step(operation, inputs_of(case))  # compiles or tunes again for these shapes
    inputs = inputs_of(case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = resident_kib("VmRSS")
    step(operation, inputs)
    print((resident_kib("VmHWM") - before) / 1024)


def records_of(case: LinearCase, peers: Sequence[Peer], repetitions: int, copy_gbps: float) -> list[dict[str, Any]]:
    """A record for each peer; those that cannot run, or are wrong, say why and have no times."""
    records, able = [], []
    for peer in peers:
        record: dict[str, Any] = {
            "op": "DPO from hidden states, forward + backward",
            "contender": peer.name,
            "also_computes": peer.computes,
            "case": asdict(case),
        }
        records.append(record)
        reason = peer.why_not("cpu")
        if reason is None:
            try:
                record["gradient_error"] = gate(peer, case)
                able.append(peer)
            except Exception as error:  # a peer's fault is its record; ours stops the run
                if peer.computes.startswith("groups"):
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if reason is not None:
            record["not_measured_because"] = reason
    times = measure_times(case, able, repetitions)
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    bare, baseline = median(totals["products"]), median(totals["eager"])
    floor, matrix_rate = cost(case)["both"], matrix_gflops(getattr(torch, case.dtype))
    roof = floor.milliseconds(copy_gbps, matrix_rate)
    few = inputs_of(replace(case, num_sequences=2, length=16))
    by_name = {record["contender"]: record for record in records}
    for peer in able:
        low, middle, high = quantiles(totals[peer.name], n=4)
        operation = peer.build()
        step(operation, few)  # compiles
        by_name[peer.name].update(
            median_ms=round(middle, 2),
            iqr_ms=[round(low, 2), round(high, 2)],
            repetitions=repetitions,
            times_faster_than_reference=round(baseline / middle, 2),
            floor_flops=floor.flops,
            floor_bytes=floor.bytes,
            matrix_gflops=round(matrix_rate, 1),
            fraction_of_roof=round(roof / middle, 3),
            **passes(times[peer.name]),
            operator_calls=operator_calls(partial(step, operation, few)),
            times_bare_products=round(middle / bare, 3),
            bare_products_ms=round(bare, 2),
            peak_extra_mib=round(peak_extra_mib(peer, case), 1),
        )
    return records
