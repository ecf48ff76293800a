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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.bench_machine import resident_kib
from grpo_kernels.bench_peers import PEERS, Peer, Reference, dpo


@dataclass(frozen=True)
class LinearCase:
    """Hidden states of ``num_sequences`` x ``length`` x ``hidden_size``; the first ``ignored`` of each is prompt.

    With ``reference`` the reference policy's log-probabilities are computed, too, from hidden states and a head of its
    own: without, the loss is reference-free.
    """

    num_sequences: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: str = "float32"
    ignored: float = 0.0
    reference: bool = False

    @property
    def name(self) -> str:
        shape = f"{self.num_sequences}x{self.length}x{self.hidden_size}x{self.vocab_size}"
        suffix = "_reference" if self.reference else ""
        return f"linear_{shape}_{self.dtype}_ignored{round(100 * self.ignored)}{suffix}"

    @property
    def counted(self) -> int:
        return self.num_sequences * (self.length - int(self.length * self.ignored))

    @property
    def floor_flops(self) -> int:
        """Three products over counted tokens: logits, dhidden, dweight; a fourth for the reference's logits."""
        return (8 if self.reference else 6) * self.counted * self.hidden_size * self.vocab_size


CASES = (LinearCase(8, 512, 512, 32_000, ignored=0.5), LinearCase(8, 512, 512, 32_000, reference=True))
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


def step(operation: Any, inputs: tuple[Tensor, Tensor, Tensor, Reference]) -> None:
    torch.autograd.grad(operation(*inputs), inputs[:2])


def measure_times(case: LinearCase, peers: Sequence[Peer], repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of each, and of the bare products, taken in turns; the first two rounds warm up."""
    inputs = inputs_of(case)
    operations = {peer.name: peer.build() for peer in peers}
    hidden = inputs[0].detach()[inputs[2] != -100]
    weight, logits = inputs[1].detach(), torch.empty(case.counted, case.vocab_size, dtype=hidden.dtype)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if inputs[3] is not None:
            torch.mm(hidden, inputs[3][1].t(), out=logits)
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
    small = replace(case, num_sequences=2, length=16)
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
