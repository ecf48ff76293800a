"""Triton's launches, as Triton makes them for sm_90, handed to the interpreter: a driver for a GPU that is not there.

The specialisation on divisible pointers and sizes, the compiler and its options are the real ones; ptxas is not called.
Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from ptx.device import Device

CACHE = Path(__file__).resolve().parent.parent.parent / "build" / "ptx" / "triton"
CAPABILITY = 90
SHARED_MEMORY = 232_448
FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}


class _Launcher:
    """What a compiled kernel calls to be launched."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: Any, *rest: Any) -> None:
        arguments = rest[4:]  # behind the metadata and hooks
        params = bytearray()
        for kind, value in zip(self.types, arguments, strict=True):
            if kind == "constexpr":
                continue
            code = "Q" if kind.startswith("*") else FORMATS[kind]
            size = struct.calcsize(code)
            params.extend(bytes(-len(params) % size))
            params.extend(struct.pack(code, value.data_ptr() if isinstance(value, torch.Tensor) else value))
        params.extend(bytes(-len(params) % 8 + 16))  # two pointers to scratch memory that no kernel here wants
        name, text = kernel
        if self.metadata.global_scratch_size:
            raise NotImplementedError(f"{name} wants scratch memory")
        _driver.device.launch(text, name, (x, y, z), 32 * self.metadata.num_warps, bytes(params), self.metadata.shared)


class _Driver:
    launcher_cls = _Launcher

    def __init__(self) -> None:
        self.device: Device | None = None
        self.ptx: dict[bytes, str] = {}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY},
            load_binary=lambda name, binary, shared, device: (name, (name, binary.decode()), 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


_driver = _Driver()


@contextmanager
def on(device: Device) -> Iterator[None]:
    """Inside, launches of Triton kernels run on ``device``."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("Triton's own interpreter was chosen: start a process with TRITON_INTERPRET=0")
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)  # its entries have no cubin, so that no other program may use them
    CUDABackend.make_cubin = lambda self, source, *rest: source.encode()  # the "binary" is the PTX
    triton.runtime.driver.set_active(_driver)
    _driver.device = device
    try:
        yield
    finally:
        _driver.device = None
