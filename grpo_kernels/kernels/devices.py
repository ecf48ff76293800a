"""What the linear path's planner believes of a device: rates that a large product and a copy reach, and its memory.

A figure decides between plans and chunk sizes, so it must be the same from run to run: nothing is measured here.
`python -m grpo_kernels bench` measures, and `doctor --linear SHAPE --device NAME` shows what follows from a row.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    name: str
    flops: dict[int, float]
    """A second, by the bytes of an element: 2, 4 and 8."""
    bytes_a_second: float
    launch_seconds: float
    """Of one operator, host and device together."""
    memory_bytes: int
    source: str


# Data sheets give peaks. Others measured large products at 0.73 of the H200's, and copies at 0.9 of its 4.8 TB/s: the
# other rows are their data sheets' figures times these.
DEVICES = {
    "a100": Device(
        "a100", {2: 228e12, 4: 14e12, 8: 7e12}, 1.8e12, 5e-6, 80 << 30, "NVIDIA A100 80GB data sheet: 312 TFLOP/s"
    ),
    "h100": Device(
        "h100", {2: 720e12, 4: 49e12, 8: 24e12}, 3.0e12, 5e-6, 80 << 30, "NVIDIA H100 SXM data sheet: 989 TFLOP/s"
    ),
    "h200": Device(
        "h200", {2: 720e12, 4: 49e12, 8: 24e12}, 4.3e12, 5e-6, 141 * 10**9, "NVIDIA H200 data sheet; 720 by others"
    ),
    "b200": Device(
        "b200", {2: 1640e12, 4: 55e12, 8: 27e12}, 7.2e12, 5e-6, 180 * 10**9, "NVIDIA B200 data sheet: 2250 TFLOP/s"
    ),
}
# A thread of a server's processor with AVX-512 and AMX, measured: 90 GFLOP/s in float32, 270 in bfloat16, 10 GB/s. Only
# their ratio matters, so neither the number of threads nor a slower processor changes a plan.
CPU_THREAD = ({2: 270e9, 4: 90e9, 8: 40e9}, 10e9, 2e-5)
UNKNOWN_GPU = "h100"  # whose ratio of flops to bytes is about that of its neighbours


def of(device: torch.device) -> Device:
    """The row of a device that is here."""
    if device.type == "cpu":
        return _cpu()
    if device.type != "cuda":
        return DEVICES[UNKNOWN_GPU]
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def named(name: str) -> Device:
    """
    Raises:
        ValueError: no such row.
    """
    if name == "cpu":
        return _cpu()
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(['cpu', *DEVICES])}, got {name!r}")
    return DEVICES[name]


@functools.cache
def _cpu() -> Device:
    flops, bytes_a_second, launch_seconds = CPU_THREAD
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", flops, bytes_a_second, launch_seconds, memory, "one thread, measured")


@functools.cache
def _gpu(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    known = next((row for name, row in DEVICES.items() if name in found.name.lower()), DEVICES[UNKNOWN_GPU])
    return Device(found.name, known.flops, known.bytes_a_second, known.launch_seconds, found.total_memory, known.source)


# torch.compile cannot trace it. This is what torch.compiler.assume_constant_result does, which takes seconds to import.
of._dynamo_marked_constant = True  # type: ignore[attr-defined]
