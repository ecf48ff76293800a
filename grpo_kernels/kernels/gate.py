"""What the machine code of the kernels must be like, for both backends: `python -m grpo_kernels doctor --kernels`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo_kernels.kernels import machine_code
from grpo_kernels.kernels.machine_code import DEVICES, Code, HotPath, Resources, Work

VOCABULARY = 128_256  # of the predictions
CSRC = Path(__file__).parents[2] / "csrc" / "cuda"
NVCC_FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ftz=true")  # those of setup.py
NVCC_TARGETS = ("80", "90a", "100")


def _meta(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: torch.empty(shape, dtype=dtype, device="meta")


# Logits as users have them. All but the last have neighbouring columns, and so must be read 16 bytes at a time.
STRIDED = "transposed"
SHAPE_CLASSES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "V % 16 == 0": _meta(2, 8, 128_256),
    "V % 16 == 8": _meta(2, 8, 50_280),
    "V odd": _meta(2, 8, 50_257),
    "V 32001": _meta(2, 8, 32_001),
    "[:, :-1]": lambda dtype: _meta(2, 9, 50_257)(dtype)[:, :-1],
    "packed": _meta(16, 50_257),
    "packed, V % 16 == 0": _meta(16, 128_256),
    STRIDED: lambda dtype: _meta(50_257, 16)(dtype).t(),
}

# Limits for each logit of bfloat16, and for blocks on a multiprocessor at once. The forward's bandwidth allows 15.6
# instructions on an H200, the backward's 31: what is below leaves room for the rest of the kernels.
FORWARD_INSTRUCTIONS, BACKWARD_INSTRUCTIONS = 7.5, 14.0
LOADS_IN_FLIGHT = 4
FORWARD_BLOCKS = 4


@dataclass(frozen=True)
class Report:
    """A kernel, compiled for one target."""

    backend: str
    kernel: str
    dtype: str
    serves: list[str]
    """Names of SHAPE_CLASSES."""
    target: str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_per_multiprocessor: int | None
    """None for AMD, where it is not computed."""
    hot: HotPath | None
    """None for kernels that do not read logits."""
    instructions_per_logit: float | None
    special_per_logit: float | None
    predicted_fraction: float | None
    """Of a GPU's bandwidth, by machine_code's model; not measured."""

    @classmethod
    def of(
        cls,
        backend: str,
        kernel: str,
        dtype: str,
        serves: list[str],
        target: int | str,
        threads: int,
        resources: Resources,
        code: Code,
    ) -> Report:
        """Reads ``code`` of a kernel for ``target``: 90 for sm_90, or an AMD architecture's name."""
        itemsize = getattr(torch, dtype).itemsize
        device = DEVICES[target] if isinstance(target, int) else None
        blocks = machine_code.blocks_per_multiprocessor(resources, threads, device) if device else None
        hot = None
        if "fwd" in kernel or "bwd" in kernel:
            hot = machine_code.hot_path(code, is_loop="fwd" in kernel or backend == "cuda")
        wide = hot is not None and hot.wide_loads > 0 and serves != [STRIDED]
        fraction = None
        if hot is not None and wide and device is not None and blocks:
            fraction = machine_code.predicted_fraction(
                _work(hot, len(code.shortest_path()), threads, itemsize), blocks, device
            )
        return cls(
            backend,
            kernel,
            dtype,
            serves,
            f"sm_{target}" if device else str(target),
            threads,
            resources.registers,
            resources.spill_bytes,
            resources.shared_bytes,
            blocks,
            hot,
            round(hot.per_logit(hot.instructions, itemsize), 2) if hot and wide else None,
            round(hot.per_logit(hot.special, itemsize), 2) if hot and wide else None,
            fraction,
        )

    @property
    def summary(self) -> str:
        said = f"{self.registers} registers, {self.spill_bytes} bytes spilled"
        if self.blocks_per_multiprocessor is not None:
            said += f", {self.blocks_per_multiprocessor} blocks a multiprocessor"
        if self.hot is not None:
            said += f", {self.hot.wide_loads} loads of 16 bytes ({self.hot.in_flight} in flight)"
        if self.instructions_per_logit is not None:
            said += f", {self.instructions_per_logit} instructions and {self.special_per_logit} MUFU a logit"
        if self.predicted_fraction is not None:
            said += f", predicted {self.predicted_fraction:.2f} of the bandwidth"
        return said

    @property
    def where(self) -> str:
        return f"{self.backend} {self.kernel}[{self.dtype}; {', '.join(self.serves)}] for {self.target}"


def _work(hot: HotPath, around: int, threads: int, itemsize: int) -> Work:
    """A block's work at the predictions' vocabulary: a row of the forward, or the tiles of a block of the backward."""
    stores = hot.wide_stores > 0
    bytes_a_step = 16 * hot.wide_loads * threads
    steps = -(-VOCABULARY * itemsize // bytes_a_step) if not stores else 2 if hot.is_loop else 1
    latencies = machine_code.TILE_LATENCIES if stores else machine_code.ROW_LATENCIES
    # The loads of a step have the last of the latencies themselves.
    waits = (latencies - 1) * machine_code.LATENCY
    return Work(steps, hot, threads, stores, around if hot.is_loop else 0, waits)


def problems(reports: list[Report]) -> list[str]:
    """What must not be, in words."""
    found = []
    for one in reports:
        found += [f"{one.where} {problem}" for problem in _problems(one)]
    return found


def _problems(one: Report) -> list[str]:
    found = []
    if one.spill_bytes:
        found.append(f"spills {one.spill_bytes} bytes")
    if one.blocks_per_multiprocessor is not None and one.blocks_per_multiprocessor < 1:
        found.append(f"wants {one.shared_bytes} bytes of shared memory")
    if one.hot is None:
        return found
    forward = "fwd" in one.kernel
    if one.hot.barriers:
        found.append(f"has {one.hot.barriers} barriers in its hot loop")
    if one.dtype == "float64":  # for tests of gradients, not for speed
        return found
    if one.serves != [STRIDED]:
        found += _width_problems(one.hot)
    if one.blocks_per_multiprocessor is None:
        return found
    if forward and one.blocks_per_multiprocessor < FORWARD_BLOCKS:
        found.append(f"fits {one.blocks_per_multiprocessor} blocks on a multiprocessor, must be {FORWARD_BLOCKS}")
    limit = FORWARD_INSTRUCTIONS if forward else BACKWARD_INSTRUCTIONS
    if one.dtype == "bfloat16" and one.instructions_per_logit is not None and one.instructions_per_logit > limit:
        found.append(f"takes {one.instructions_per_logit} instructions a logit, at most {limit}")
    return found


def _width_problems(hot: HotPath) -> list[str]:
    found = []
    if hot.wide_loads < LOADS_IN_FLIGHT or (hot.is_loop and hot.narrow_loads):
        found.append(f"reads logits by {hot.wide_loads} loads of 16 bytes and {hot.narrow_loads} narrower ones")
    if hot.in_flight < LOADS_IN_FLIGHT:
        found.append(f"has {hot.in_flight} loads in flight, must be {LOADS_IN_FLIGHT}")
    return found


# -- nvcc's output -----------------------------------------------------------------------------------------------------


def nvcc_missing() -> str | None:
    """Why the CUDA kernels cannot be looked at here."""
    if not CSRC.is_dir():
        return "the CUDA kernels' source is not here: they are read from a checkout"
    return None if shutil.which(_nvcc()) else "there is no nvcc"


def _nvcc() -> str:
    return os.environ.get("NVCC") or "nvcc"


def nvcc_reports(targets: tuple[str, ...] = NVCC_TARGETS, sources: tuple[str, ...] = ("*.cu",)) -> list[Report]:
    """Every CUDA kernel, for each architecture. One code serves all shapes.

    Raises:
        RuntimeError: nvcc's errors.
    """
    found = []
    for target in targets:
        for source in sorted(path for pattern in sources for path in CSRC.glob(pattern)):
            for name, (resources, code) in machine_code.kernels_of_cubin(_cubin(source, target)).items():
                kernel, dtype = _kernel_and_dtype(name)
                number = int(re.sub(r"\D", "", target))
                found.append(Report.of("cuda", kernel, dtype, ["any shape"], number, 256, resources, code))
    return found


def _cubin(source: Path, target: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.cubin"
        architecture = f"-gencode=arch=compute_{target},code=sm_{target}"
        command = [_nvcc(), *NVCC_FLAGS, architecture, "-cubin", str(source), "-o", str(made)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        return made.read_bytes()


def _kernel_and_dtype(mangled: str) -> tuple[str, str]:
    """From the mangled name of a kernel, whose one template argument is a format or a number's type."""
    found = re.search(
        r"\d((?:group_robust|logps|merge)\w*?_kernel)I(?:\w*?\d(Float32|Bfloat16|Float16|Float64)E|([fd])E)", mangled
    )
    if found is None:
        raise RuntimeError(f"what is kernel {mangled}?")
    return found[1], (found[2] or {"f": "float32", "d": "float64"}[found[3]]).lower()
