"""`python -m grpo_kernels bench`: forward and backward of the loss, each backend in the same process, as JSON records.

A record holds median and interquartile range of the time, the bytes that the operation must move by one model for every
backend, the copy bandwidth measured in the same run, and the extra memory at the peak, measured in a process of its
own. A backend whose result is off writes no record.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_kernels import bench_linear, dispatch, reference
from grpo_kernels.bench_cases import Case, LinearCase, cost, select, why_not
from grpo_kernels.bench_machine import available_bytes, copy_gbps, environment, operator_calls, resident_kib
from grpo_kernels.group_weights import GroupWeights
from grpo_kernels.losses import GroupRobustLoss

if TYPE_CHECKING:
    from rich.table import Table

GROUP_SIZES = [700, 220, 80]


def group_sizes(case: Case) -> list[int]:
    """Of the data set: unequal, and one for each group."""
    return [GROUP_SIZES[g % 3] for g in range(case.num_groups)]


@dataclass(frozen=True)
class Contender:
    name: str
    backend: str
    inplace_backward: bool = False
    compiled: bool = False


# Those that this machine can run; the first is what the others are compared with.
CONTENDERS = tuple(
    contender
    for contender in (
        Contender("reference", "reference"),
        Contender("torch.compile", "reference", compiled=True),
        Contender("torch", "torch"),
        Contender("torch in place", "torch", inplace_backward=True),
        Contender("cpp", "cpp"),
        Contender("cpp in place", "cpp", inplace_backward=True),
    )
    if not dispatch.backends()[contender.backend]
)
CASES = (
    Case(8, 512, 32000, "float32"),
    Case(8, 512, 32000, "float32", ignored=0.5),
    Case(8, 512, 32000, "bfloat16"),
)
QUICK_CASES = (Case(4, 128, 8000, "float32"),)


def inputs_of(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, labels, group_ids, ref_logps), the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.num_sequences, case.length)
    logits = torch.randn(*shape, case.vocab_size, generator=generator).to(getattr(torch, case.dtype))
    labels = torch.randint(0, case.vocab_size, shape, generator=generator)
    labels[:, : int(case.length * case.ignored)] = -100
    group_ids = torch.arange(case.num_sequences // 2) % case.num_groups
    return logits, labels, group_ids, torch.zeros(case.num_sequences)


def loss_and_gradient(contender: Contender, case: Case) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple]:
    """The measured operation: (logits, ...) -> (loss, dlogits, seconds forward, seconds backward).

    In place, the logits hold the gradient afterwards.
    """
    weights = GroupWeights(group_sizes=group_sizes(case), step_size=0.0)
    loss_fn: Callable = GroupRobustLoss(
        weights, beta=0.01, inplace_backward=contender.inplace_backward, backend=contender.backend
    )

    if contender.compiled:
        loss_fn = torch.compile(loss_fn)

    def operation(logits: Tensor, labels: Tensor, group_ids: Tensor, ref_logps: Tensor) -> tuple:
        leaf = logits.detach().requires_grad_()
        began = time.perf_counter()
        loss = loss_fn(leaf, labels, group_ids, ref_logps=ref_logps).loss
        between = time.perf_counter()
        (dlogits,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), dlogits, between - began, time.perf_counter() - between

    return operation


def gate(contender: Contender, case: Case) -> float:
    """The largest error of the gradient over the largest gradient, on the case's first and last 16 positions.

    Raises:
        ValueError: it is more than four roundings of the dtype.
    """
    logits, labels, group_ids, ref_logps = inputs_of(case)
    some = torch.cat([torch.arange(16), torch.arange(case.length - 16, case.length)])
    logits, labels = logits[:, some].contiguous(), labels[:, some].contiguous()
    exact_logits = logits.double().requires_grad_()
    logps = reference.sequence_logps(exact_logits, labels, None, -100, False)
    losses = reference.pair_losses(reference.margins(logps, None), 0.01, "sigmoid")
    sizes = torch.tensor(group_sizes(case))
    exact_loss = reference.group_losses(losses, group_ids, case.num_groups, sizes, "importance").mean()
    (exact,) = torch.autograd.grad(exact_loss, exact_logits)
    loss, dlogits, *_ = loss_and_gradient(contender, case)(logits, labels, group_ids, ref_logps)
    error = ((dlogits.double() - exact).abs().max() / exact.abs().max()).item()
    allowed = 4 * torch.finfo(logits.dtype).eps
    if error > allowed or abs(loss.item() - exact_loss.item()) > 1e-5 * abs(exact_loss.item()):
        raise ValueError(f"{contender.name} on {case.name}: gradient error {error:.2g} is over {allowed:.2g}")
    return error


def measure_times(
    case: Case, contenders: Sequence[Contender], repetitions: int
) -> dict[str, list[tuple[float, float]]]:
    """(forward, backward) milliseconds of each contender, taken in turns so that a slow moment meets all.

    "copy" beside them is a plain copy of the logits.
    """
    logits, labels, group_ids, ref_logps = inputs_of(case)
    operations = {contender.name: loss_and_gradient(contender, case) for contender in contenders}
    pristine = logits.clone()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*operations, "copy")}
    for repetition in range(repetitions + 1):
        for name, operation in operations.items():
            *_, forward, backward = operation(logits, labels, group_ids, ref_logps)
            if repetition:  # the first warms up
                times[name].append((1e3 * forward, 1e3 * backward))
            began = time.perf_counter()
            logits.copy_(pristine)  # the machine's copy bandwidth, and the logits as they were
            if repetition:
                times["copy"].append((1e3 * (time.perf_counter() - began), 0.0))
    return times


def calls_of(contender: Contender, case: Case) -> int:
    """Operators that one call runs, on few tokens: their number does not grow with the tokens of a chunk."""
    few = replace(case, num_sequences=2, length=16)
    operation, inputs = loss_and_gradient(contender, few), inputs_of(few)
    operation(*inputs)
    return operator_calls(lambda: operation(*inputs))


def peak_extra_mib(contender: Contender, case: Case) -> float:
    """Resident memory at the peak of one call above what it was before, in a fresh process (Linux)."""
    request = json.dumps({"contender": asdict(contender), "case": asdict(case)})
    command = [sys.executable, "-c", "from grpo_kernels import bench; bench.report_peak_memory()", request]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report_peak_memory() -> None:
    """The child process of `peak_extra_mib`: prints one number."""
    request = json.loads(sys.argv[-1])
    contender, case = Contender(**request["contender"]), Case(**request["case"])
    small = Case(2, 64, case.vocab_size, case.dtype)
    loss_and_gradient(contender, small)(*inputs_of(small))  # loads libraries and starts threads
    inputs = inputs_of(case)
    operation = loss_and_gradient(contender, case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = resident_kib("VmRSS")
    operation(*inputs)
    print((resident_kib("VmHWM") - before) / 1024)


def _records_of(case: Case, contenders: Sequence[Contender], repetitions: int) -> list[dict[str, Any]]:
    errors = {contender.name: gate(contender, case) for contender in contenders}
    times = measure_times(case, contenders, repetitions)
    floor = cost(case)["both"].bytes
    copy_bytes = 2 * case.num_sequences * case.length * case.vocab_size * getattr(torch, case.dtype).itemsize
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    copied = copy_bytes / median(totals["copy"]) / 1e6
    baseline = median(totals[contenders[0].name])
    records = []
    for contender in contenders:
        middle = median(totals[contender.name])
        low, _, high = quantiles(totals[contender.name], n=4)
        records.append(
            {
                "op": "GroupRobustLoss forward + backward",
                "contender": contender.name,
                "backend": contender.backend,
                "case": asdict(case),
                "median_ms": round(middle, 2),
                "iqr_ms": [round(low, 2), round(high, 2)],
                "repetitions": repetitions,
                "times_faster_than_reference": round(baseline / middle, 2),
                "floor_bytes": floor,
                "gbps": round(floor / middle / 1e6, 2),
                "copy_gbps": round(copied, 2),
                "fraction_of_copy": round(floor / middle / 1e6 / copied, 3),
                "fraction_of_roof": round(floor / middle / 1e6 / copied, 3),
                **bench_linear.passes(times[contender.name]),
                "operator_calls": calls_of(contender, case),
                "peak_extra_mib": round(peak_extra_mib(contender, case), 1),
                "gradient_error": errors[contender.name],
            }
        )
    return records


def run(cases: Sequence[Case | LinearCase], repetitions: int, out: Path, compiled: bool = True) -> list[dict[str, Any]]:
    """Measure, print a table, and write ``<out>/cpu/<case>.json``; torch.compile costs a minute a case."""
    from rich.console import Console

    console, folder = Console(), out / "cpu"
    found = {**environment(), "copy_gbps": round(copy_gbps(), 2)}
    folder.mkdir(parents=True, exist_ok=True)
    contenders = [one for one in CONTENDERS if compiled or not one.compiled]
    peers = [one for one in bench_linear.PEERS if compiled or not one.adapts]
    all_records = []
    for case in cases:
        reason = why_not(case, available_bytes())
        if reason is not None:
            console.print(f"{case.name}: not measured: {reason}", highlight=False)
            continue
        with console.status(f"measuring {case.name}"):
            if isinstance(case, Case):
                records = _records_of(case, contenders, repetitions)
            else:  # a call takes seconds
                records = bench_linear.records_of(case, peers, min(repetitions, 5), found["copy_gbps"])
        console.print(_table(case.name, records))
        for record in records:
            if "not_measured_because" in record:
                console.print(f"{record['contender']}: {record['not_measured_because']}", highlight=False)
        (folder / f"{case.name}.json").write_text(json.dumps({**found, "records": records}, indent=2) + "\n")
        all_records += records
    console.print(f"records are in {folder}", highlight=False)
    return all_records


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    against = "fraction_of_copy" if "fraction_of_copy" in records[0] else "times_bare_products"
    table = Table(title=f"{title}, forward + backward")
    for column in ("contender", "median ms", "IQR ms", "x reference", against.replace("_", " "), "peak extra MiB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for record in records:
        if "median_ms" in record:
            low, high = record["iqr_ms"]
            row = [record["contender"], record["median_ms"], f"{low}-{high}", record["times_faster_than_reference"]]
            table.add_row(*map(str, [*row, record[against], record["peak_extra_mib"]]))
    return table


def command(out: str, quick: bool, names: Sequence[str] = (), plots_only: bool = False) -> int:
    from grpo_kernels import bench_plots

    cases: Sequence[Case | LinearCase] = (*CASES, *bench_linear.CASES)
    if names:
        cases = tuple(select(names).values())
    elif quick:
        cases = (*QUICK_CASES, *bench_linear.QUICK_CASES)
    if plots_only:
        cases = ()
    if cases:
        run(cases, 5 if quick else 9, Path(out), compiled=not quick)
    folder = Path(out) / "cpu"
    for picture in (*bench_plots.draw(folder, folder), *bench_plots.draw_summaries(folder, folder)):
        print(f"picture: {picture}")
    return 0
