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
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.bench_machine import resident_kib
from grpo_kernels.bench_peers import BETA, PEERS, Peer


@dataclass(frozen=True)
class LinearCase:
    """Hidden states of ``num_sequences`` x ``length`` x ``hidden_size``; the first ``ignored`` of each is prompt."""

    num_sequences: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: str = "float32"
    ignored: float = 0.0

    @property
    def name(self) -> str:
        shape = f"{self.num_sequences}x{self.length}x{self.hidden_size}x{self.vocab_size}"
        return f"linear_{shape}_{self.dtype}_ignored{round(100 * self.ignored)}"

    @property
    def counted(self) -> int:
        return self.num_sequences * (self.length - int(self.length * self.ignored))

    @property
    def floor_flops(self) -> int:
        """Three products over counted tokens: logits, dhidden, dweight."""
        return 6 * self.counted * self.hidden_size * self.vocab_size


CASES = (LinearCase(8, 512, 512, 32_000, ignored=0.5),)
QUICK_CASES = (LinearCase(4, 64, 128, 8_000),)


def inputs_of(case: LinearCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, labels), both of the first requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (case.num_sequences, case.length), getattr(torch, case.dtype)
    hidden = torch.randn(*shape, case.hidden_size, generator=generator)
    weight = torch.randn(case.vocab_size, case.hidden_size, generator=generator) / case.hidden_size**0.5
    labels = torch.randint(0, case.vocab_size, shape, generator=generator)
    labels[:, : int(case.length * case.ignored)] = -100
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, labels.to(device)


def gate(peer: Peer, case: LinearCase, device: str = "cpu") -> float:
    """The larger of dhidden's and dweight's error, over the largest exact entry, on 16 positions of each sequence.

    Raises:
        ValueError: it is more than 256 roundings of the dtype: sums over the vocabulary and over tokens.
    """
    small = LinearCase(case.num_sequences, 16, case.hidden_size, case.vocab_size, case.dtype, case.ignored)
    hidden, weight, labels = inputs_of(small, device)
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = exact_inputs[0] @ exact_inputs[1].t()
    logps = (logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)).sum(
        -1
    )
    chosen, rejected = logps.chunk(2)
    exact_loss = -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
    exact = torch.autograd.grad(exact_loss, exact_inputs)
    loss = peer.build()(hidden, weight, labels)
    grads = torch.autograd.grad(loss, (hidden, weight))
    errors = [((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(grads, exact, strict=True)]
    allowed = 256 * torch.finfo(hidden.dtype).eps
    if not max(errors) <= allowed or abs(loss.item() - exact_loss.item()) > 1e-4 * abs(exact_loss.item()):
        raise ValueError(f"gradient error {max(errors):.2g} is over {allowed:.2g} or the loss is wrong")
    return max(errors)


def step(operation: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    torch.autograd.grad(operation(*inputs), inputs[:2])


def measure_times(case: LinearCase, peers: Sequence[Peer], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of each, and of the three bare products, taken in turns; the first two rounds warm up."""
    inputs = inputs_of(case)
    operations = {peer.name: peer.build() for peer in peers}
    hidden = inputs[0].detach()[inputs[2] != -100]
    weight, logits = inputs[1].detach(), torch.empty(case.counted, case.vocab_size, dtype=hidden.dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    times: dict[str, list[float]] = {name: [] for name in (*operations, "products")}
    for repetition in range(repetitions + 2):
        for name in times:
            began = time.perf_counter()
            products() if name == "products" else step(operations[name], inputs)
            if repetition >= 2:
                times[name].append(1e3 * (time.perf_counter() - began))
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
    small = LinearCase(2, 16, case.hidden_size, case.vocab_size, case.dtype)
    step(operation, inputs_of(small))  # loads libraries, starts threads, compiles
    if peer.name == "torch.compile":
        step(operation, inputs_of(case))  # compiles again for these shapes
    inputs = inputs_of(case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = resident_kib("VmRSS")
    step(operation, inputs)
    print((resident_kib("VmHWM") - before) / 1024)


def records_of(case: LinearCase, repetitions: int) -> list[dict[str, Any]]:
    """A record for each peer; those that cannot run, or are wrong, say why and have no times."""
    records, able = [], []
    for peer in PEERS:
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
    bare = median(times["products"])
    baseline = median(times["eager"])
    by_name = {record["contender"]: record for record in records}
    for peer in able:
        low, middle, high = quantiles(times[peer.name], n=4)
        by_name[peer.name].update(
            median_ms=round(middle, 2),
            iqr_ms=[round(low, 2), round(high, 2)],
            repetitions=repetitions,
            times_faster_than_reference=round(baseline / middle, 2),
            floor_flops=case.floor_flops,
            times_bare_products=round(middle / bare, 3),
            bare_products_ms=round(bare, 2),
            peak_extra_mib=round(peak_extra_mib(peer, case), 1),
        )
    return records
