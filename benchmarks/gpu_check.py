"""One command that turns a GPU into evidence: build, tests, sanitizer, benchmark, tuning, each with a time limit.

    make gpu-check [OUT=FOLDER] [STAGES=facts,tests,...]    (python benchmarks/gpu_check.py --out ... --stages ...)

Each stage is a process of its own, so that one that fails or hangs costs the others nothing; together they take at most
9 minutes. Every stage leaves <out>/<stage>.json with its command, outcome, seconds, the end of its output and what it
found; the table at the end is also in <out>/summary.md. Wheels that pip shall install first, without a network, may lie
in the folder that the variable WHEELS names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 6000  # characters of a stage's output that its record keeps

SANITIZED = """
import torch, grpo_kernels as gk
for backend in ("triton", "cuda"):
    if gk.backends().get(backend, ["absent"]):
        continue
    for dtype in (torch.bfloat16, torch.float32):
        for vocab, length in ((1003, 5), (4096, 3), (1, 2), (20001, 2)):
            for splits in ((2, 1), (1, 7)):
                logits = torch.randn(4, length, vocab, device="cuda").to(dtype).requires_grad_()
                labels = torch.randint(0, vocab, (4, length), device="cuda")
                labels[0, 0], labels[1, 0] = -100, vocab - 1
                weights = gk.GroupWeights(group_sizes=[3, 2], step_size=0.1)
                loss_fn = gk.GroupRobustLoss(weights, backend=backend, reference_free=True).cuda()
                ids = torch.tensor([0, 1], device="cuda")
                loss_fn(logits, labels, ids).loss.backward()
                ends = torch.arange(0, 4 * length + 1, length, device="cuda")
                flat = logits.detach().flatten(0, 1).requires_grad_()
                loss_fn(flat, labels.flatten(), ids, None, ends).loss.backward()
                labels[2, 0] = vocab + 7  # outside the vocabulary: NaN, and nothing read out of bounds
                loss_fn(logits, labels, ids).loss.backward()
    print(backend, "done")
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Stage:
    """``commands`` run one after another within ``limit`` seconds; ``found`` makes the record of their output.

    They are made from the folder for records.
    """

    name: str
    limit: int
    commands: Callable[[Path], list[list[str]]]
    found: Callable[[str], Any] = lambda output: None
    needs: Callable[[], str | None] = lambda: None


def _python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


@cache
def _needs_gpu() -> str | None:
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    ran = subprocess.run(_python("-c", probe), capture_output=True, text=True, check=False, cwd=ROOT)
    return None if ran.returncode == 0 else "there is no CUDA device"


def _needs_sanitizer() -> str | None:
    return _needs_gpu() or (None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH")


def _test_commands(out: Path) -> list[list[str]]:
    """What runs on the GPU; not the block simulator, nor the tests of this script."""
    parallel = ["-n", "12", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    without = ["--ignore=tests/test_cuda.py", "--ignore=tests/test_gpu_check.py"]
    chosen = "(triton or cuda or gpu) and not simulated"
    return [_python("-m", "pytest", "-q", "tests", "-k", chosen, *without, "-p", "no:cacheprovider", *parallel)]


def _sanitizer_commands(out: Path) -> list[list[str]]:
    tools = ("memcheck", "racecheck", "synccheck")
    script = Path(tempfile.gettempdir()) / "grpo_kernels_sanitized.py"
    script.write_text(SANITIZED)
    return [
        ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)] for tool in tools
    ]


def _json_in(output: str) -> Any:
    """The JSON document that a command printed, whatever else stands around it."""
    begin, end = output.find("{"), output.rfind("}")
    listing = output.find("[\n")
    if listing != -1 and (begin == -1 or listing < begin):
        begin, end = listing, output.rfind("]")
    try:
        return json.loads(output[begin : end + 1])
    except json.JSONDecodeError:
        return None


def _test_counts(output: str) -> dict[str, int]:
    lines = [line for line in output.splitlines() if " in " in line and re.search(r"\d+ (passed|failed)", line)]
    return {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", lines[-1])} if lines else {}


def _sanitizer_summary(output: str) -> list[str]:
    return [line.strip("= ") for line in output.splitlines() if "SUMMARY" in line]


def _needs_nvcc() -> str | None:
    return None if shutil.which(os.environ.get("NVCC") or "nvcc") else "nvcc is not on the PATH"


def _csrc_commands(out: Path) -> list[list[str]]:
    """Build the extension with the CUDA kernels in place, then say which registers they take; a spill is a failure."""
    script = "import os, runpy, sys; os.environ['GRPO_KERNELS_BUILD'] = 'cuda'; sys.argv[1:] = %r; %s"
    build = script % (["-q", "build_ext", "--inplace"], "runpy.run_path('setup.py', run_name='__main__')")
    return [_python("-c", build), _python("benchmarks/cuda_registers.py", "90a")]


# In this order while there is time; names of grpo_kernels/bench/cases.py.
BENCH = ["logits/llama-3-8b/short", "logits/llama-3-8b/large", "logits/llama-3-8b/large50", "logits/qwen2.5-7b/large"]
BENCH_LINEAR = ["linear/llama-3-8b/large", "linear/llama-3-8b/large50", "linear/qwen2.5-0.5b/large"]


def _bench(out: Path, seconds: int, cases: list[str]) -> list[str]:
    options = ["--device", "cuda", "--seconds", str(seconds), "--out", str(out / "bench"), "--cases", *cases]
    return _python("-m", "grpo_kernels", "bench", *options)


STAGES = (
    Stage("csrc", 90, _csrc_commands, lambda output: re.findall(r"sm_\w+ .* registers", output), _needs_nvcc),
    Stage("facts", 20, lambda out: [_python("-m", "grpo_kernels", "doctor", "--json")], _json_in),
    Stage("kernels", 60, lambda out: [_python("-m", "grpo_kernels", "doctor", "--kernels", "--json")], _json_in),
    Stage("tests", 140, _test_commands, _test_counts, _needs_gpu),
    Stage("sanitize", 50, _sanitizer_commands, _sanitizer_summary, _needs_sanitizer),
    Stage("bench", 90, lambda out: [_bench(out, 40, BENCH)], needs=_needs_gpu),
    Stage("bench_linear", 60, lambda out: [_bench(out, 25, BENCH_LINEAR)], needs=_needs_gpu),
    Stage(
        "tune",
        30,
        lambda out: [_python("benchmarks/tune_tiles.py", "--json", "--seconds", "20")],
        _json_in,
        _needs_gpu,
    ),
)


def run_stage(stage: Stage, out: Path) -> dict[str, Any]:
    """The stage's record; never raises for what a command does."""
    reason = stage.needs()
    if reason is not None:
        return {"stage": stage.name, "outcome": "skipped", "reason": reason, "seconds": 0.0}
    began, output, outcome, commands = time.monotonic(), "", "passed", stage.commands(out)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    for command in commands:
        left = stage.limit - (time.monotonic() - began)
        text, outcome = _run(command, max(1.0, left), environment)
        output += text
        if outcome != "passed":
            break
    return {
        "stage": stage.name,
        "outcome": outcome,
        "seconds": round(time.monotonic() - began, 1),
        "commands": [" ".join(Path(part).name if i == 0 else part for i, part in enumerate(c)) for c in commands],
        "found": stage.found(output),
        "output_end": output[-TAIL:],
    }


def _run(command: list[str], limit: float, environment: dict[str, str]) -> tuple[str, str]:
    """(output, outcome) of one command; it and its children are killed when the time is over."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            outcome = "passed" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            outcome = "out of time"
        file.seek(0)
        return file.read(), outcome


def install_wheels() -> None:
    folder = os.environ.get("WHEELS")
    if folder:
        options = ["--no-index", "--no-deps", "--quiet", "--find-links", folder]
        wheels = [str(path) for path in sorted(Path(folder).glob("*.whl"))]
        subprocess.run(_python("-m", "pip", "install", *options, *wheels), check=False)


def summary(records: list[dict[str, Any]], out: Path) -> str:
    lines = ["| stage | outcome | seconds | |", "| --- | --- | --- | --- |"]
    for record in records:
        remark = record.get("reason", "")
        if record["stage"] in ("tests", "sanitize") and record.get("found"):
            remark = json.dumps(record["found"])
        lines.append(f"| {record['stage']} | {record['outcome']} | {record['seconds']} | {remark} |")
    for path in sorted((out / "bench").glob("*.json")):
        lines += ["", f"{path.stem}", "", "| contender | forward ms | backward ms | of the roof | peak MiB |"]
        lines += ["| --- | --- | --- | --- | --- |", *map(_bench_line, json.loads(path.read_text())["records"])]
    return "\n".join(lines) + "\n"


def _bench_line(record: dict[str, Any]) -> str:
    if "median_ms" not in record:
        return f"| {record['contender']} | {record.get('failed_because') or record['not_measured_because']} | | | |"
    cells = [record["contender"], record["forward_ms"], record["backward_ms"], f"{record['fraction_of_roof']:.0%}"]
    return f"| {' | '.join(map(str, [*cells, record['peak_extra_mib']]))} |"


def device_folder() -> str:
    """In a process of its own: this one never holds the GPU."""
    probe = "from grpo_kernels.bench import machine; print(machine.folder_name('cuda'))"
    ran = subprocess.run(_python("-c", probe), capture_output=True, text=True, check=False, cwd=ROOT)
    return ran.stdout.strip() or "no-gpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for the records (default: benchmarks/results/<device>)")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="default: %(default)s")
    arguments = parser.parse_args()
    wanted = [name for name in arguments.stages.split(",") if name]
    unknown = set(wanted) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"--stages: {', '.join(sorted(unknown))} not among {', '.join(stage.name for stage in STAGES)}")
    out = Path(arguments.out).resolve() if arguments.out else ROOT / "benchmarks" / "results" / device_folder()
    out.mkdir(parents=True, exist_ok=True)
    install_wheels()
    records = []
    for stage in STAGES:
        if stage.name in wanted:
            print(f"{stage.name}: at most {stage.limit} s ...", flush=True)
            record = run_stage(stage, out)
            records.append(record)
            (out / f"{stage.name}.json").write_text(json.dumps(record, indent=2) + "\n")
            print(f"{stage.name}: {record['outcome']} {record.get('reason', '')}", flush=True)
            (out / "summary.md").write_text(summary(records, out))
    print("\n" + summary(records, out))
    return int(any(record["outcome"] not in ("passed", "skipped") for record in records))


if __name__ == "__main__":
    sys.exit(main())
