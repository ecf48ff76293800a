"""Compile every kernel to a cubin without a GPU, and say what came out: registers, spills, shared memory, load widths.

Needs Triton's NVIDIA compiler, which its Linux wheels carry, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may use
POINTER = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "float64": "*fp64"}
LOGITS = ("logits_ptr", "out_ptr")
INT64 = (
    "labels_ptr",
    "counts_ptr",
    "cu_seqlens_ptr",
    "group_ids_ptr",
    "sizes_ptr",
    "pending_counts_ptr",
    "skipped_ptr",
)
FLOAT64 = ("logps_ptr", "group_ptr", "log_alpha_ptr", "pending_sums_ptr")
POINTERS = {
    **dict.fromkeys(INT64, "*i64"),
    **dict.fromkeys(FLOAT64, "*fp64"),
    **dict.fromkeys(("tickets_ptr", "row_sequence_ptr"), "*i32"),
}
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one use."""

    kernel: str
    dtype: str
    aligned: bool  # rows begin at 16-byte boundaries (V a multiple of 16)
    splits: int = 1

    @property
    def name(self) -> str:
        return f"{self.kernel}[{self.dtype}, V {'% 16 == 0' if self.aligned else 'odd'}, splits {self.splits}]"


@dataclass(frozen=True)
class Compiled:
    variant: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    global_access: dict[str, int]
    """How often each width of global load (LDG) and store (STG) stands in the machine code, e.g. {"LDG.128": 2}."""


def variants() -> Iterator[Variant]:
    for dtype in ("bfloat16", "float16", "float32"):
        for aligned in (True, False):
            yield Variant("_logps_fwd_kernel", dtype, aligned)
            yield Variant("_logps_bwd_kernel", dtype, aligned)
    yield Variant("_logps_fwd_kernel", "bfloat16", True, splits=8)
    yield Variant("_merge_splits_kernel", "bfloat16", True, splits=8)
    for aligned in (True, False):
        yield Variant("_group_robust_fwd_kernel", "bfloat16", aligned)
    yield Variant("_group_robust_fwd_kernel", "float32", True)
    yield Variant("_group_robust_fwd_kernel", "bfloat16", True, splits=8)


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """
    Raises:
        RuntimeError: the process has TRITON_INTERPRET set, so there is nothing to compile.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: start a process without it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from grpo_kernels.kernels.triton import group_robust, logps

    kernel = getattr(group_robust if "group_robust" in variant.kernel else logps, variant.kernel)
    signature, constants, options = _specialisation(variant, kernel.arg_names)
    names = list(signature)
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in _divisible(variant, signature)},
        ),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    registers, spills = _resources(compiled.asm["ptx"], capability)
    widths = _global_access(compiled.asm["cubin"])
    return Compiled(variant.name, capability, registers, spills, compiled.metadata.shared, widths)


def _specialisation(variant: Variant, names: list[str]) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """(signature, constants, options) as a launch of the kernel on contiguous logits would have them."""
    import triton.language as tl

    from grpo_kernels.kernels.triton import group_robust, logps, tiles

    itemsize = ITEMSIZE[variant.dtype]
    tile = tiles.TILES["backward" if "bwd" in variant.kernel else "forward", itemsize]
    values = {
        "stride_v": 1,
        "out_stride_v": 1,
        "BLOCK": tile.block,
        "SPLITS": variant.splits,
        "ALIGN": 1 if variant.aligned else logps.BYTES_A_LOAD // itemsize,
        "ACC": tl.float64 if variant.dtype == "float64" else tl.float32,
        "MERGED_ROWS": logps.MERGED_ROWS,
        "HAS_FACTOR": True,
        # The fused forward with everything that a user may ask for at once.
        **dict.fromkeys(("ROWS", "PAIRS", "ALPHA", "PACKED", "AVERAGE", "IMPORTANCE"), True),
        **dict.fromkeys(("HAS_REF", "HAS_BETA", "HAS_MARGIN", "HAS_WEIGHTS"), True),
        **{"LOSS": "sigmoid", "ADJUSTMENT": 1.0, "FLOOR": 0.1, "CHI": 0.5, "UPDATE": "inline"},
        **{name: getattr(group_robust, name) for name in ("BLOCK_T", "BLOCK_B", "BLOCK_K")},
    }
    signature = {}
    for name in names:
        if name in values:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name) or POINTER[variant.dtype if name in LOGITS else "float32"]
        else:
            signature[name] = "fp32" if name.endswith(("_high", "_low", "gradient_scale")) else "i32"
    num_warps = 4 if variant.kernel == "_merge_splits_kernel" else tile.num_warps
    return signature, {name: values[name] for name in names if name in values}, {"num_warps": num_warps}


def _divisible(variant: Variant, signature: dict[str, str]) -> list[str]:
    """Pointers of PyTorch's allocator are, and so are V and the strides of aligned rows."""
    sizes = {"V", "stride_s", "stride_t", "out_stride_s", "out_stride_t"} if variant.aligned else set()
    return [name for name, kind in signature.items() if kind.startswith("*") or name in sizes]


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """(registers a thread, bytes spilled) by ptxas."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    # Triton 3.4 has one assembler for all architectures, and later versions choose in different ways.
    ptxas = get_ptxas(capability) if inspect.signature(get_ptxas).parameters else get_ptxas()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas.path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        said = subprocess.run(
            [*command, str(source), "-o", str(Path(folder) / "kernel.o")], capture_output=True, text=True, check=True
        ).stderr
    registers = int(re.search(r"Used (\d+) registers", said)[1])  # type: ignore[index]
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))


def _global_access(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    widths: Counter[str] = Counter()
    for kind, modifiers in re.findall(r"\b(LDG|STG)((?:\.\w+)*)", listing):
        width = re.search(r"\.(128|64|U16|S16|U8|S8)\b", modifiers)
        widths[f"{kind}.{width[1] if width else '32'}"] += 1
    return dict(sorted(widths.items()))


def report(capabilities: tuple[int, ...] = CAPABILITIES) -> list[Compiled]:
    """Every variant for every capability, in order."""
    return [compile_variant(variant, capability) for variant in variants() for capability in capabilities]


def problems(compiled: list[Compiled]) -> list[str]:
    """What must not be: spilled registers, more shared memory than a block may use."""
    found = []
    for one in compiled:
        where = f"{one.variant} for sm_{one.capability}"
        if one.spill_bytes:
            found.append(f"{where} spills {one.spill_bytes} bytes")
        if one.shared_bytes > SHARED_MEMORY_LIMIT[one.capability]:
            found.append(f"{where} wants {one.shared_bytes} bytes of shared memory")
    return found
