"""A GPU that is at hand for a quarter of an hour, turned into evidence: two parts, of 270 and 300 seconds.

    make gpu-check PART=A [OUT=FOLDER] [WHEELS=FOLDER] [COMMIT=NAME]    (python benchmarks/gpu_check.py --part A ...)

A proves and measures the kernels, B runs the tests of every backend and the peers. A stage is a process of its own that
may run until its second of the part, so that one that fails or hangs costs the others nothing. Building csrc and
installing wheels go on beside them.

Three files a part: <out>/gpu_check_A.json, written anew after every line that a stage prints, so that a kill loses
nothing; gpu_check_A.md, its summary; gpu_check_A.tar.gz, all that the stages said. What they do is gpu_stages.py.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_stages import NO_GPU

ROOT = Path(__file__).resolve().parent.parent
GRACE = 4  # seconds between asking a stage to end, when pytest still says what failed, and killing it
TAIL = 4000  # characters of a stage's output that its record keeps; the archive has LOG_BYTES of it
LOG_BYTES = 2**21


# -- what is read from a line of output: each takes the line and the stage's record ------------------------------------


def json_line(line: str, record: dict[str, Any]) -> None:
    if line.startswith("{"):
        record["lines"].append(json.loads(line))


OUTCOME = r"(?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
TEST_LINES = (
    re.compile(rf"\[gw\d+\] \[ *\d+%\] {OUTCOME} (?P<name>.*)"),  # with pytest-xdist
    re.compile(rf"(?P<name>\S+::.*?) {OUTCOME}( \(.*\))? +\[ *\d+%\]"),
)


def test_line(line: str, record: dict[str, Any]) -> None:
    """Of ``pytest -v``."""
    for pattern in TEST_LINES:
        found = pattern.fullmatch(line)
        if found:
            record.setdefault("counts", Counter())[found["outcome"].lower()] += 1
            if found["outcome"] in ("FAILED", "ERROR"):
                record["lines"].append({"failed": found["name"]})


def sanitizer_line(line: str, record: dict[str, Any]) -> None:
    json_line(line, record)
    if re.search(r"SUMMARY|Invalid|Error:|hazard", line) and len(record["lines"]) < 40:
        record["lines"].append({"said": line.strip("= ")})


SHOWN = re.compile(
    r"Kernel Name|gpu__time_duration|registers_per_thread|occupancy_(limit|per)|waves_per|shared_mem_per_block|"
    r"(dram|l1tex|lts|sm|gpu)__\w*throughput\w*\.avg\.pct|dram__bytes_(read|write)\.sum|warps_active|"
    r"issue_active|inst_executed\.sum$|sectors_per_request|stall\w*per_warp_active|average_warps?_issue_stalled"
)


def profiler_line(line: str, record: dict[str, Any]) -> None:
    """Of ``ncu --csv --page raw``: names, units, then a line for each kernel."""
    json_line(line, record)
    if not line.startswith('"'):
        return
    cells = next(csv.reader([line]))
    if cells[0] == "ID":
        record["columns"] = cells
    elif cells[0] and "columns" in record:
        found = dict(zip(record["columns"], cells, strict=False))
        record["lines"].append({name: value for name, value in found.items() if SHOWN.search(name)})


# -- stages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """``command`` may run until the part's second ``until``; it begins when the stages in ``after`` have ended."""

    name: str
    until: int
    command: tuple[str, ...]
    read: Callable[[str, dict[str, Any]], None] = json_line
    after: tuple[str, ...] = ()
    beside: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def _do(stage: str, *options: str) -> tuple[str, ...]:
    """A function of gpu_stages.py."""
    return (sys.executable, str(ROOT / "benchmarks" / "gpu_stages.py"), stage, *options)


def _tests(*chosen: str, processes: int) -> tuple[str, ...]:
    """A file whose imports fail costs only itself; without pytest-xdist there is one process."""
    options = ("-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors")
    return _do("tests", "--processes", str(processes), "--", *options, *chosen)


NCU_SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy"),
    *("WarpStateStats", "MemoryWorkloadAnalysis", "InstructionStats"),
)
NCU = (
    *("ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"),
    *("--profile-from-start", "off", "--kernel-name", "regex:group_robust|logps"),
    *(part for section in NCU_SECTIONS for part in ("--section", section)),
)
# PyTorch asks the driver what fails by design; what a kernel does is what counts.
MEMCHECK = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "--report-api-errors", "no")
# Neither the block simulator, nor the tests of this script, nor what runs on the CPU.
ON_THE_GPU = ("tests", "-k", "(triton or cuda or gpu) and not simulated", "--ignore=tests/test_cuda.py")

PARTS: dict[str, tuple[Stage, ...]] = {
    "A": (
        Stage("csrc", 66, _do("csrc"), beside=True),
        Stage("facts", 20, _do("facts")),
        Stage("triton", 66, _do("kernels", "--contenders", "triton*")),
        Stage("cuda", 106, _do("kernels", "--contenders", "cuda*"), after=("csrc",)),
        Stage("smoke", 146, _tests("tests/test_gpu.py", "-k", "not inductor", processes=6), test_line),
        Stage("ncu", 186, (*NCU, *_do("profile")), profiler_line),
        Stage("tune", 246, _do("tune")),
        Stage("finish", 266, _do("finish")),
    ),
    "B": (
        Stage("csrc", 60, _do("csrc"), beside=True),
        Stage("wheels", 60, _do("wheels"), beside=True),
        Stage(
            "tests", 116, _tests(*ON_THE_GPU, "--ignore=tests/test_gpu_check.py", processes=12), test_line, ("csrc",)
        ),
        Stage("peers", 206, _do("peers"), after=("wheels",)),
        Stage("linear", 266, _do("linear")),
        Stage(
            "memcheck",
            296,
            (*MEMCHECK, *_do("sanitize")),
            sanitizer_line,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else memory beyond a tensor belongs to the allocator
        ),
    ),
}


# -- running them ------------------------------------------------------------------------------------------------------


class Report:
    """The record of a part, and its three files."""

    def __init__(self, part: str, out: Path) -> None:
        self.out, self.name, self.work = out, f"gpu_check_{part}", Path(tempfile.mkdtemp(prefix="gpu_check_"))
        self.stages: list[dict[str, Any]] = []
        self.head = {"part": part, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.began = time.monotonic()

    def seconds(self) -> float:
        return round(time.monotonic() - self.began, 1)

    def write(self) -> None:
        self._replace("json", json.dumps({**self.head, "seconds": self.seconds(), "stages": self.stages}, indent=1))
        self._replace("md", summary(self.stages))

    def write_archive(self) -> None:
        with tarfile.open(self.work / "archive.part", "w:gz") as archive:
            for log in sorted(self.work.glob("*.log")):
                whole = log.read_bytes()
                kept = self.work / f"{log.stem}.txt"
                kept.write_bytes(whole[-LOG_BYTES:])
                archive.add(kept, f"{self.name}/{kept.name}")
        self._replace("tar.gz", (self.work / "archive.part").read_bytes())

    def _replace(self, suffix: str, content: str | bytes) -> None:
        """A reader, or a kill, meets the old file or the new one."""
        target = self.out / f"{self.name}.{suffix}"
        half = target.with_name(f".{target.name}")
        half.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
        os.replace(half, target)


def _takes_interrupts() -> None:
    """Also where this program was started in the background, by a shell that makes it ignore them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Job:
    """A stage that runs. Its process group is its own, its session is not: whoever ends this script ends it, too."""

    def __init__(self, stage: Stage, report: Report) -> None:
        self.stage, self.report, self.asked, self.began = stage, report, False, report.seconds()
        self.record: dict[str, Any] = {"stage": stage.name, "outcome": "running", "lines": []}
        report.stages.append(self.record)
        self.path, self.read_bytes, self.unread = report.work / f"{stage.name}.log", 0, ""
        paths = [str(ROOT), str(report.work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
            **{"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
            **{"GPU_CHECK_SECONDS": str(max(1, round(stage.until - self.began))), "GPU_CHECK_WORK": str(report.work)},
            **stage.environment,
        }
        self.process: subprocess.Popen | None = None
        print(f"{self.began:6.1f} s  {stage.name}: until {stage.until} s ...", flush=True)
        try:
            with self.path.open("wb") as log:
                self.process = subprocess.Popen(
                    stage.command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=environment,
                    process_group=0,
                    preexec_fn=_takes_interrupts,
                )
        except OSError as error:
            self._end(f"failed: {error}")
        report.write()

    def has_ended(self) -> bool:
        """Reads what there is to read, and ends what is over its time."""
        if self.process is None:
            return True
        code, late = self.process.poll(), self.report.seconds() - self.stage.until
        self._read(to_the_end=code is not None)
        if code is not None:
            outcome = "passed" if code == 0 else f"failed (exit {code})"
            self._end("out of time" if self.asked else outcome)
        elif late > GRACE:
            self._end("out of time, killed")
        elif late > 0 and not self.asked:
            self.asked = True
            self.process.send_signal(signal.SIGINT)
        return self.process is None

    def _read(self, to_the_end: bool) -> None:
        with self.path.open("rb") as log:
            log.seek(self.read_bytes)
            new = log.read()
        self.read_bytes += len(new)
        text = new.decode(errors="replace")
        *lines, self.unread = (self.unread + text).split("\n")
        if to_the_end and self.unread:
            lines.append(self.unread)
        for line in lines:
            try:
                self.stage.read(line.strip(), self.record)
            except ValueError as error:  # a line that is not what it looks like
                self.record["lines"].append({"unreadable": f"{line[:200]}: {error}"})
        if new:
            self.record["output_end"] = (self.record.get("output_end", "") + text)[-TAIL:]
            self.report.write()

    def _end(self, outcome: str) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # and what it left behind
            self.process.wait()
            self.process = None
        self.record |= {"outcome": outcome, "seconds": round(self.report.seconds() - self.began, 1)}
        print(f"{self.report.seconds():6.1f} s  {self.stage.name}: {outcome}", flush=True)
        self.report.write()
        self.report.write_archive()

    def stop(self) -> None:
        if not self.has_ended():
            self._end("stopped")


def run(stages: Sequence[Stage], report: Report) -> int:
    """The exit status: 0 where every stage passed."""
    jobs: dict[str, Job] = {}

    def wait_for(*names: str) -> None:
        while {name for name, job in jobs.items() if not job.has_ended()} & set(names):  # reads what all of them say
            time.sleep(0.1)

    try:
        jobs |= {stage.name: Job(stage, report) for stage in stages if stage.beside}
        for stage in stages:
            if not stage.beside:
                wait_for(*stage.after)
                jobs[stage.name] = Job(stage, report)
                wait_for(stage.name)
                if jobs[stage.name].record["outcome"] == f"failed (exit {NO_GPU})":
                    break
    finally:
        for job in jobs.values():
            job.stop()
    return int(any(job.record["outcome"] != "passed" for job in jobs.values()))


# -- what a person reads -----------------------------------------------------------------------------------------------


def summary(stages: list[dict[str, Any]]) -> str:
    lines = ["| stage | outcome | seconds | |", "| --- | --- | --- | --- |"]
    for stage in stages:
        counts = ", ".join(f"{number} {word}" for word, number in stage.get("counts", {}).items())
        lines.append(f"| {stage['stage']} | {stage['outcome']} | {stage.get('seconds', '')} | {counts} |")
    for stage in stages:
        lines += ["", f"## {stage['stage']}"] if stage["lines"] else []
        for found in stage["lines"]:
            lines += _case(found) if "records" in found else ["", f"    {json.dumps(found)[:1500]}"]
    return "\n".join(lines)


COLUMNS = {
    "contender": "contender",
    "forward ms": "forward_ms",
    "GB/s": "forward_gbps",
    "backward ms": "backward_ms",
    "of GB/s": "backward_gbps",
    "both": "median_ms",
    "of the roof": "fraction_of_roof",
    "bare products": "times_bare_products",
    "host ms": "host_ms",
    "peak MiB": "peak_extra_mib",
}


def _case(found: dict[str, Any]) -> list[str]:
    rates = f"copy {found['copy_gbps']} GB/s, read {found['read_gbps']} GB/s"
    lines = ["", f"{found['case']}: {rates}", "", f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for record in found["records"]:
        cells = [str(record.get(key, "")) for key in COLUMNS.values()]
        if "median_ms" not in record:
            cells[1] = record.get("failed_because") or record["not_measured_because"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS), required=True)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", help="default: %(default)s"
    )
    parser.add_argument("--stages", help="only these, with commas between them")
    parser.add_argument("--commit", help="of the tree, where there is no git")
    arguments = parser.parse_args()
    stages = PARTS[arguments.part]
    if arguments.stages:
        wanted, names = arguments.stages.split(","), [stage.name for stage in stages]
        if not set(wanted) <= set(names):
            parser.error(f"--stages must be among {', '.join(names)}, got {arguments.stages!r}")
        stages = tuple(stage for stage in stages if stage.name in wanted)
    if arguments.commit:
        os.environ["GRPO_KERNELS_COMMIT"] = arguments.commit
    arguments.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    report = Report(arguments.part, arguments.out)
    status = run(stages, report)
    print(f"\n{summary(report.stages)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
