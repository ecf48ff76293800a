"""What a benchmark record says of the machine, and how much memory a process holds."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from grpo_kernels._version import __version__


def resident_kib(field: str) -> int:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def available_bytes() -> int:
    """Memory that can be had without swapping (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def median_seconds(operation: Callable[[], object], repetitions: int = 5) -> float:
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        operation()
        times.append(time.perf_counter() - began)
    return median(times[1:])  # the first warms up


def copy_gbps(nbytes: int = 256 * 2**20) -> float:
    """Bytes read and written a second by a plain copy that no cache holds."""
    source, target = (torch.ones(nbytes, dtype=torch.uint8) for _ in range(2))
    return 2 * nbytes / median_seconds(lambda: target.copy_(source)) / 1e9


def matrix_gflops(dtype: torch.dtype, size: int = 1024) -> float:
    """The rate of a square matrix product."""
    left, right = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right) / 1e9


def operator_calls(operation: Callable[[], object], device: str = "cpu") -> int:
    """Operators that one call runs, those inside another operator not counted; on "cuda" the kernels launched."""
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


def environment() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "date": date.today().isoformat(),
        "device": f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "grpo_kernels": __version__,
        "commit": commit.strip() or None,
        "command": "python -m grpo_kernels bench",
    }
