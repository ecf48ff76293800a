"""The launches of kernels/cuda.py, handed to the interpreter with the PTX that nvcc makes of csrc/cuda.

The launchers' own C++ runs, compiled for the block simulator (tests/simulator), which passes each launch on.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import simulated_cuda

from grpo_kernels.kernels import cuda
from ptx import parser
from ptx.device import Device

ROOT = Path(__file__).resolve().parent.parent.parent
NVCC = os.environ.get("NVCC") or "nvcc"
ARCHITECTURE = "sm_90a"
QUALIFIER = re.compile(r"(?:\w+|\{anonymous\}|\(anonymous namespace\))::")


def missing() -> str | None:
    """What is lacking here."""
    if shutil.which(NVCC) is None:
        return "needs nvcc"
    return simulated_cuda.missing() or (None if shutil.which("c++filt") else "needs c++filt")


@functools.lru_cache(maxsize=1)
def _flags() -> list[str]:
    """Those of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CUDA_FLAGS":
            return eval(compile(ast.Expression(node.value), "setup.py", "eval"))
    raise RuntimeError("setup.py has no CUDA_FLAGS")


@functools.lru_cache(maxsize=4)
def compiled(csrc: Path = ROOT / "csrc") -> dict[str, tuple[str, str]]:
    """Kernel with its template arguments -> (PTX, name in it). Kept until a source changes."""
    command = [NVCC, *_flags(), f"-DGRPO_THREADS={simulated_cuda.THREADS}", f"-arch={ARCHITECTURE}", "-ptx"]
    read = [path for path in sorted(csrc.rglob("*")) if path.is_file()]
    version = subprocess.run([NVCC, "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read) + version + repr(command).encode())
    folder = ROOT / "build" / "ptx" / digest.hexdigest()[:16]
    kernels = {}
    for source in sorted((csrc / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.ptx"
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as made:
                subprocess.run([*command, str(source), "-o", f"{made}/{target.name}"], check=True)
                os.replace(f"{made}/{target.name}", target)  # another session may be doing the same
        text = target.read_text()
        names = parser.entries(text)
        readable = subprocess.run(["c++filt", *names], check=True, capture_output=True, text=True).stdout.splitlines()
        for name, long in zip(names, readable, strict=True):
            kernels[_short(long.partition("(")[0] if "(anon" not in long else long)] = (text, name)
    return kernels


def _short(name: str) -> str:
    """kernel<arguments>, without namespaces, result and parameters."""
    return re.search(r"(\w+(?:<[^()]*>)?)\s*(?:[;(\]]|$)", QUALIFIER.sub("", name).removeprefix("void "))[1]


@contextmanager
def on(device: Device, csrc: Path = ROOT / "csrc") -> Iterator[None]:
    """Inside, launches of CUDA kernels run on ``device``."""
    module, kernels, before = simulated_cuda.simulated(), compiled(csrc), cuda.launches

    def take(name: str, grid: tuple[int, int, int], threads: int, arguments: list[bytes]) -> None:
        text, symbol = kernels[_short(name.partition("Kernel = ")[2])]
        places = parser.kernel_params(text, symbol)
        params = bytearray(max(offset + size for offset, size in places))
        for (offset, size), argument in zip(places, arguments, strict=True):
            if len(argument) != size:
                raise ValueError(f"{name} takes {size} bytes at {offset}, got {len(argument)}")
            params[offset : offset + size] = argument
        device.launch(text, symbol, grid, threads, bytes(params), 0)

    module.hand_launches_to(take)
    cuda.launches = module
    try:
        yield
    finally:
        cuda.launches = before
        module.hand_launches_to(None)
