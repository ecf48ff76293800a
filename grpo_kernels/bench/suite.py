"""How one operation is measured: contenders in turns on the same inputs, each checked against float64 first."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.bench.cases import Case, LinearCase, cost
from grpo_kernels.bench.machine import Clock, matrix_gflops, milliseconds, operator_calls, peak_extra_mib
from grpo_kernels.kernels import dispatch

Operation = Callable[..., Tensor]  # (*inputs) -> loss
WARM_UP = 2  # rounds that are not counted


def allowed_error(dtype: torch.dtype, ours: bool) -> float:
    """Over the largest exact entry, in roundings of the dtype: ours 16, others 256; never so much that zeros pass."""
    return min((16 if ours else 256) * torch.finfo(dtype).eps, 0.1)


@dataclass(frozen=True)
class Contender:
    """``why_not(device)`` is None where it can run; ``computes`` says what else than the operation it can give."""

    name: str
    computes: str
    why_not: Callable[[str], str | None]
    build: Callable[[Any], Operation]  # from the case
    adapts: bool = False  # compiles or tunes itself at the first call with new shapes
    ours: bool = False


@dataclass(frozen=True)
class Suite:
    """One operation. Gradients are taken of those inputs that require them; the first contender is the baseline."""

    op: str
    contenders: tuple[Contender, ...]
    inputs_of: Callable[[Any, str], tuple[Any, ...]]  # (case, device)
    exact: Callable[[Any], Operation]  # from the case; for float64 inputs
    # What the device can do at best, timed in the same turns: (case, inputs) -> a call.
    yardstick: Callable[[Any, tuple[Any, ...]], Callable[[], object]]
    # The yardstick copies the inputs back after contenders that write over them.
    restores: bool = False


def always(device: str) -> None:
    return None


def needs(package: str, gpu: bool = False) -> Callable[[str], str | None]:
    def why_not(device: str) -> str | None:
        if gpu and device != "cuda":
            return "its kernels run on NVIDIA GPUs only"
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return why_not


def needs_backend(name: str, argument: str) -> Callable[[str], str | None]:
    """Of ours: the dispatch table's reasons."""

    def why_not(device: str) -> str | None:
        if name == "triton" and device == "cpu":
            return "on a CPU it only runs in Triton's interpreter"
        request = dispatch.Request(argument, (), torch.float32, torch.device(device))
        return "; ".join(dispatch.reasons_against(dispatch.entry_of(name), request)) or None

    return why_not


def gate(suite: Suite, contender: Contender, case: Any, device: str = "cpu") -> float:
    """The largest error of the loss and of the gradients, each over its largest exact entry, on 16 positions.

    Raises:
        ValueError: it is over `allowed_error`.
    """
    small = replace(case, length=min(case.length, 16))
    inputs = suite.inputs_of(small, device)

    def doubled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(doubled, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    exact_inputs = doubled(inputs)
    exact = _loss_and_gradients(suite.exact(small), exact_inputs)
    got = _loss_and_gradients(contender.build(small), inputs)
    errors = [((g.double() - e).abs().max() / e.abs().max()).item() for g, e in zip(got, exact, strict=True)]
    allowed = allowed_error(getattr(torch, case.dtype), contender.ours)
    if not max(errors) <= allowed:
        named = ", ".join(f"{error:.2g}" for error in errors)
        raise ValueError(f"errors of loss and gradients ({named}) over {allowed:.2g}")
    return max(errors)


def _leaves(inputs: Sequence[Any]) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def _loss_and_gradients(operation: Operation, inputs: Sequence[Any]) -> list[Tensor]:
    loss = operation(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, _leaves(inputs))]


def _untimed(operation: Operation, inputs: Sequence[Any]) -> None:
    torch.autograd.grad(operation(*inputs), _leaves(inputs))


def step(operation: Operation, inputs: Sequence[Any], device: str = "cpu") -> tuple[float, float, float]:
    """Milliseconds: forward, backward, and of the host until both are enqueued."""
    leaves, clock = _leaves(inputs), Clock(device)
    began = time.perf_counter()
    clock.mark()
    loss = operation(*inputs)
    clock.mark()
    torch.autograd.grad(loss, leaves)
    clock.mark()
    host = 1e3 * (time.perf_counter() - began)
    forward, backward = clock.laps()
    return forward, backward, host


def measure_times(
    suite: Suite, operations: dict[str, Operation], case: Any, inputs: tuple[Any, ...], repetitions: int, device: str
) -> tuple[dict[str, list[tuple[float, float, float]]], float, dict[str, str]]:
    """(`step` of each repetition by contender, the yardstick's median milliseconds, why others have no times).

    In turns, so that a slow moment meets all, and each round in another order: what the cache and the allocator hold
    for a contender is up to who came before it.
    """
    yardstick = suite.yardstick(case, inputs)
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in operations}
    rulers, failed = [], {}
    for repetition in range(repetitions + WARM_UP):
        for name in random.Random(repetition).sample(list(times), len(times)):
            try:
                laps = step(operations[name], inputs, device)
                if repetition >= WARM_UP:
                    times[name].append(laps)
            except Exception as error:  # out of memory, mostly
                failed[name] = _in_short(error)
                del times[name]
            if suite.restores:
                rulers.append(milliseconds(yardstick, device))
        if not suite.restores:
            rulers.append(milliseconds(yardstick, device))
    return times, median(rulers[WARM_UP:]), failed


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def resident_peaks_mib(suite_name: str, contenders: Sequence[str], case: Any) -> dict[str, float]:
    """Resident memory at the peak of one step above what it was before, on the CPU (Linux), by the contender's name.

    Each has a process of its own, a fork of a fresh one that has imported PyTorch once for all of them.
    """
    request = json.dumps({"suite": suite_name, "contenders": list(contenders), "case": asdict(case)})
    command = [sys.executable, "-c", "from grpo_kernels.bench import command; command.report_peak_memory()", request]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    peaks: dict[str, float] = json.loads(found)
    return peaks


def peak_of_fresh_process(suite: Suite, contender: Contender, case: Any) -> float:
    """A fork's part of `resident_peaks_mib`."""
    operation = contender.build(case)
    step(operation, suite.inputs_of(replace(case, num_sequences=2, length=16), "cpu"))  # loads libraries, compiles
    inputs = suite.inputs_of(case, "cpu")
    if contender.adapts:
        step(operation, inputs)  # compiles or tunes again for these shapes
    return peak_extra_mib(lambda: step(operation, inputs))


def records_of(
    name: str, suite: Suite, case: Any, repetitions: int, copied_gbps: float, device: str = "cpu", adapting: bool = True
) -> list[dict[str, Any]]:
    """A record for each contender; those that cannot run, fail or are wrong say why and have no times."""
    torch.compiler.reset()  # compiled for eight cases already, a function would run uncompiled in the ninth
    records: dict[str, dict[str, Any]] = {}
    able: dict[str, Contender] = {}
    for contender in suite.contenders:
        record: dict[str, Any] = {"op": suite.op, "contender": contender.name, "ours": contender.ours}
        records[contender.name] = record = record | {"also_computes": contender.computes, "case": asdict(case)}
        reason = contender.why_not(device)
        if reason is None and contender.adapts and not adapting:
            reason = "it compiles or tunes itself, which this run leaves out"
        if reason is not None:
            record["not_measured_because"] = reason
            continue
        try:
            record["gradient_error"] = gate(suite, contender, case, device)
            able[contender.name] = contender
        except Exception as error:  # a peer may raise anything; what fails costs the others nothing
            record["failed_because"] = _in_short(error)
    for one, found in _measured(suite, case, able, repetitions, copied_gbps, device).items():
        records[one] |= found
    timed = [one for one, record in records.items() if "median_ms" in record]
    if device == "cpu" and timed:  # now that this process holds no inputs
        for one, peak in resident_peaks_mib(name, timed, case).items():
            records[one]["peak_extra_mib"] = round(peak, 1)
    return list(records.values())


def _measured(
    suite: Suite, case: Any, able: dict[str, Contender], repetitions: int, copied_gbps: float, device: str
) -> dict[str, dict[str, Any]]:
    """What measuring adds to each contender's record; on a CPU all but the memory."""
    inputs = suite.inputs_of(case, device)
    operations = {name: contender.build(case) for name, contender in able.items()}
    times, ruler, failed = measure_times(suite, operations, case, inputs, repetitions, device)
    matrix_rate = matrix_gflops(getattr(torch, case.dtype), device)
    totals = {name: [forward + backward for forward, backward, _ in laps] for name, laps in times.items()}
    baseline = totals.get(suite.contenders[0].name)
    found: dict[str, dict[str, Any]] = {name: {"failed_because": reason} for name, reason in failed.items()}
    for name, laps in times.items():
        middle, again = median(totals[name]), partial(_untimed, operations[name], inputs)
        found[name] = record = _spread("median", "", totals[name])
        record["repetitions"] = repetitions
        record["times_faster_than_reference"] = round(median(baseline) / middle, 2) if baseline else None
        for part, own in zip(("forward", "backward", "host"), zip(*laps, strict=True), strict=True):
            record |= _spread(part, f"{part}_", own)
            if part != "host" and isinstance(case, Case):
                record[f"{part}_gbps"] = float(f"{cost(case)[part].bytes / median(own) / 1e6:.4g}")
        record |= _against(case, ruler, middle, copied_gbps, matrix_rate)
        record["launches" if device == "cuda" else "operator_calls"] = operator_calls(again, device)
        if device == "cuda":
            record["peak_extra_mib"] = round(peak_extra_mib(again, device), 1)
    return found


def _spread(name: str, prefix: str, laps: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles, to the hundredth of a millisecond, or four digits of a short time."""
    low, middle, high = (round(lap, 2 if lap >= 10 else 4) for lap in quantiles(laps, n=4))
    return {f"{name}_ms": middle, f"{prefix}iqr_ms": [low, high]}


def _against(
    case: Case | LinearCase, ruler: float, middle: float, copied_gbps: float, matrix_rate: float
) -> dict[str, Any]:
    """A median time beside what the device can do: the suite's yardstick, and the roof of the cost model."""
    floor = cost(case)["both"]
    if isinstance(case, LinearCase):
        own = {"times_bare_products": round(middle / ruler, 3), "bare_products_ms": round(ruler, 2)}
    else:  # the copy in the same turns
        moved = 2 * case.num_sequences * case.length * case.vocab_size * getattr(torch, case.dtype).itemsize
        copied_gbps = moved / ruler / 1e6
        gbps = floor.bytes / middle / 1e6
        own = {"gbps": round(gbps, 2), "fraction_of_copy": round(gbps / copied_gbps, 3)}
    return {
        "floor_bytes": floor.bytes,
        "floor_flops": floor.flops,
        "copy_gbps": round(copied_gbps, 2),
        "matrix_gflops": round(matrix_rate, 1),
        "fraction_of_roof": round(floor.milliseconds(copied_gbps, matrix_rate) / middle, 3),
        **own,
    }
