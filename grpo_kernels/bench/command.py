"""`python -m grpo_kernels bench`: forward and backward of the losses, ours and others', as JSON records and pictures.

benchmarks/README.md is the protocol; suite.py measures, logits.py and linear.py hold the contenders.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from grpo_kernels.bench import linear, logits
from grpo_kernels.bench.cases import DEFAULT, QUICK, Case, LinearCase, select, why_not
from grpo_kernels.bench.machine import available_bytes, copy_gbps, environment, folder_name, read_gbps
from grpo_kernels.bench.suite import Contender, Suite, peak_of_fresh_process, records_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from rich.table import Table

SUITES: dict[str, Suite] = {"logits": logits.SUITE, "linear": linear.SUITE}


def suite_name(case: Case | LinearCase) -> str:
    return "linear" if isinstance(case, LinearCase) else "logits"


def report_peak_memory() -> None:
    """The fresh process of `suite.resident_peaks_mib`: prints a number for each contender, by its name."""
    request = json.loads(sys.argv[-1])
    suite = SUITES[request["suite"]]
    case = (LinearCase if request["suite"] == "linear" else Case)(**request["case"])
    peaks, fork = {}, multiprocessing.get_context("fork")
    for contender in suite.contenders:
        if contender.name in request["contenders"]:
            receiver, sender = fork.Pipe(duplex=False)
            process = fork.Process(target=_send_peak, args=(sender, suite, contender, case))
            process.start()
            sender.close()  # so that a process that dies is an EOFError
            peaks[contender.name] = receiver.recv()
            process.join()
    print(json.dumps(peaks))


def _send_peak(sender: Connection, suite: Suite, contender: Contender, case: Case | LinearCase) -> None:
    sender.send(peak_of_fresh_process(suite, contender, case))


def repetitions_of(case: Case | LinearCase, device: str, quick: bool) -> int:
    """On a CPU a call of the linear path takes seconds, and one of a small shape little."""
    if device == "cuda" or quick:
        return 20
    return 5 if isinstance(case, LinearCase) else 9


def measured(
    cases: Sequence[Case | LinearCase],
    device: str = "cpu",
    seconds: float = float("inf"),
    quick: bool = False,
    contenders: Sequence[str] = ("*",),
) -> Iterator[tuple[Case | LinearCase, dict[str, Any] | str]]:
    """Each case with what its file shall hold, or with the reason why it was not measured.

    No case begins after ``seconds``. ``quick`` repeats less and leaves out what compiles or tunes itself, which takes a
    minute a case. ``contenders``: patterns of their names.
    """
    began = time.monotonic()
    found = {**environment(device), "copy_gbps": round(copy_gbps(device), 2), "read_gbps": round(read_gbps(device), 2)}
    for case in cases:
        # A GPU that is out of memory says so, contender by contender; a CPU's process is killed.
        reason = why_not(case, available_bytes()) if device == "cpu" else None
        if time.monotonic() - began > seconds:
            reason = f"{seconds:g} s were over"
        if reason is not None:
            yield case, reason
            continue
        name = suite_name(case)
        some = tuple(one for one in SUITES[name].contenders if any(fnmatchcase(one.name, x) for x in contenders))
        suite, repetitions = replace(SUITES[name], contenders=some), repetitions_of(case, device, quick)
        yield (
            case,
            {**found, "records": records_of(name, suite, case, repetitions, found["copy_gbps"], device, not quick)},
        )


def run(
    cases: Sequence[Case | LinearCase],
    out: Path,
    device: str = "cpu",
    seconds: float = float("inf"),
    quick: bool = False,
) -> list[dict[str, Any]]:
    """Measure, print a table, and write ``<out>/<case>.json`` case by case, as `measured` says."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    out.mkdir(parents=True, exist_ok=True)
    all_records = []
    with console.status("measuring"):
        for case, found in measured(cases, device, seconds, quick):
            if isinstance(found, str):
                console.print(f"{case.name}: not measured: {found}", highlight=False)
                continue
            console.print(_table(case.name, found["records"]))
            for record in found["records"]:
                reason = record.get("not_measured_because") or record.get("failed_because")
                if reason:
                    console.print(f"{record['contender']}: {reason}", highlight=False)
            (out / f"{case.name}.json").write_text(json.dumps(found, indent=2) + "\n")
            all_records += found["records"]
    console.print(f"records are in {out}", highlight=False)
    return all_records


def _table(title: str, records: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    against = "times_bare_products" if "hidden_size" in records[0]["case"] else "fraction_of_copy"
    table = Table(title=f"{title}, forward + backward")
    for column in ("contender", "median ms", "IQR ms", "x reference", against.replace("_", " "), "peak extra MiB"):
        first = column == "contender"
        table.add_column(column, justify="left" if first else "right", no_wrap=first)
    for record in records:
        if "median_ms" in record:
            low, high = record["iqr_ms"]
            row = [record["contender"], record["median_ms"], f"{low}-{high}", record["times_faster_than_reference"]]
            table.add_row(*map(str, [*row, record[against], record["peak_extra_mib"]]))
    return table


def bench(
    out: str | None,
    quick: bool,
    names: Sequence[str] = (),
    plots_only: bool = False,
    device: str = "auto",
    seconds: float = float("inf"),
) -> int:
    """The exit status: 1 where a backend of ours failed or was wrong."""
    from grpo_kernels.bench import plots

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device")
    folder = Path(out) if out else Path("benchmarks/results") / folder_name(device)
    records = []
    if not plots_only:
        cases = select(names).values() if names else QUICK if quick else DEFAULT
        records = run(tuple(cases), folder, device, seconds, quick)
    elif not any(folder.glob("*.json")):
        raise ValueError(f"--out must be a folder with records to draw, {str(folder)!r} has no .json")
    for picture in (*plots.draw(folder, folder), *plots.draw_summaries(folder, folder)):
        print(f"picture: {picture}")
    failed = [record["contender"] for record in records if record["ours"] and "failed_because" in record]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))
