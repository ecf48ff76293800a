"""What a benchmark measures with: the device's clock, rates and memory, and what a record says of the machine."""

from __future__ import annotations

import gc
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from grpo_kernels._version import __version__

RATE_BYTES = {"cpu": 2**28, "cuda": 2**31}  # what a rate of memory is measured on
MATRIX_ROWS = {"cpu": 1024, "cuda": 8192}
HEAD_START = 10_000_000  # clocks of a GPU: 5 ms at 2 GHz


class Clock:
    """Milliseconds between marks: on the device's own time line, or the host's.

    A GPU sleeps before the first mark, so that the host can enqueue what follows before it begins: laps are then the
    device's own time, and nothing of Python's.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            if not self.marks:
                torch.cuda._sleep(HEAD_START)
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


def milliseconds(operation: Callable[[], object], device: str) -> float:
    clock = Clock(device)
    clock.mark()
    operation()
    clock.mark()
    return clock.laps()[0]


def median_ms(operation: Callable[[], object], device: str, repetitions: int = 5) -> float:
    return median([milliseconds(operation, device) for _ in range(repetitions + 2)][2:])  # the first ones warm up


def copy_gbps(device: str = "cpu") -> float:
    """Bytes read and written a second by a plain copy that no cache holds."""
    source, target = (torch.ones(RATE_BYTES[device], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), device) / 1e6


def read_gbps(device: str = "cpu") -> float:
    """Bytes read a second by a plain sum: what a forward, which writes next to nothing, can come up to."""
    source = torch.ones(RATE_BYTES[device] // 4, device=device)
    return source.nbytes / median_ms(source.sum, device) / 1e6


def matrix_gflops(dtype: torch.dtype, device: str = "cpu") -> float:
    """The rate of a square matrix product."""
    size = MATRIX_ROWS[device]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / median_ms(lambda: left @ right, device) / 1e6


def available_bytes(device: str = "cpu") -> int:
    """Memory that can be had: without swapping (Linux), or free on the GPU."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def peak_extra_mib(operation: Callable[[], object], device: str = "cpu") -> float:
    """Memory at the peak of one call above what was held before it.

    On a CPU that is resident memory (Linux), which keeps what earlier calls left: ask in a fresh process.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operation()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is resident now
    before = _resident_kib("VmRSS")
    operation()
    return (_resident_kib("VmHWM") - before) / 1024


def _resident_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def operator_calls(operation: Callable[[], object], device: str = "cpu") -> int:
    """Operators that one call runs, those inside another operator not counted; on "cuda" the kernels launched."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if device == "cuda" else kinds.CPU]) as profile:
        operation()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    def inside_another(event: Any) -> bool:
        parent = event.cpu_parent
        return parent is not None and (_is_operator(parent) or inside_another(parent))

    return sum(_is_operator(event) and not inside_another(event) for event in profile.events())


def _is_operator(event: Any) -> bool:
    return "::" in event.name and not event.name.startswith("autograd::")


def device_name(device: str) -> str:
    """As records and pictures show it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def folder_name(device: str) -> str:
    """Where a device's records lie: "cpu", or the GPU's name, such as "nvidia-h200"."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower())


def commit() -> str | None:
    """Of the tree at hand; GRPO_KERNELS_COMMIT names it where there is no git."""
    named = os.environ.get("GRPO_KERNELS_COMMIT")
    if named or shutil.which("git") is None:
        return named or None
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def environment(device: str = "cpu") -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "grpo_kernels": __version__,
        "commit": commit(),
        "command": "python -m grpo_kernels bench",
    }
