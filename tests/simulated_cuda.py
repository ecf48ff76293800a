"""The `cuda` backend's functions over the block simulator (tests/simulator): its kernels compiled by g++ for the CPU.

Compiled once and kept until a source changes. `KernelBackend` and `FusedKernelBackend`, as grpo_kernels.kernels.cuda.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_kernels.kernels import cuda

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-Wno-psabi", "-Wno-attributes"]
THREADS = 64  # two warps: enough for what goes wrong between warps


def missing() -> str | None:
    """What the simulator lacks here."""
    if os.uname().machine != "x86_64" or shutil.which(COMPILER) is None:
        return "the simulator needs g++ on x86-64"
    return None if importlib.util.find_spec("pybind11") else "the simulator needs pybind11"


@functools.lru_cache(maxsize=1)
def simulated(csrc: Path = ROOT / "csrc") -> ModuleType:
    return load(compiled(csrc))


def compiled(csrc: Path) -> Path:
    import pybind11

    simulator = ROOT / "tests" / "simulator"
    sources = [simulator / "module.cpp", *sorted((csrc / "cuda").glob("*.cu"))]
    read = [path for folder in (simulator, csrc) for path in sorted(folder.rglob("*")) if path.is_file()]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read) + repr((FLAGS, THREADS)).encode())
    target = (
        ROOT / "build" / "simulator" / digest.hexdigest()[:16] / f"_simulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (simulator, pybind11.get_include(), sysconfig.get_paths()["include"])]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        common = [COMPILER, *FLAGS, *includes, f"-DGRPO_THREADS={THREADS}"]
        objects = [str(Path(folder) / f"{path.stem}.o") for path in sources]
        started = [
            subprocess.Popen([*common, "-c", "-x", "c++", str(path), "-o", made])
            for path, made in zip(sources, objects, strict=True)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise RuntimeError("the simulated kernels do not compile")
        subprocess.run([*common, *objects, "-o", f"{folder}/{target.name}"], check=True)
        os.replace(f"{folder}/{target.name}", target)  # another session may be doing the same
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_simulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _over_the_simulator(name: str) -> Any:
    def function(*arguments: Any, **options: Any) -> Any:
        before, cuda.launches = cuda.launches, simulated()
        try:
            return getattr(cuda, name)(*arguments, **options)
        finally:
            cuda.launches = before

    return function


token_logps_forward = _over_the_simulator("token_logps_forward")
token_logps_backward = _over_the_simulator("token_logps_backward")
group_robust_forward = _over_the_simulator("group_robust_forward")
