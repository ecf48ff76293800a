"""Compile the Triton kernels for GPUs that are not here: NVIDIA's to a cubin, AMD's to assembly. What came out is read
by kernels/machine_code.py.

Needs the compilers that Triton's Linux wheels carry, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from grpo_kernels.kernels.gate import SHAPE_CLASSES, Report
from grpo_kernels.kernels.machine_code import Code, Resources, kernels_of_cubin
from grpo_kernels.kernels.triton.tiles import Tile, tile_for

TARGETS = (80, 90, 100, "gfx942", "gfx950")
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


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one use."""

    kernel: str
    dtype: str
    edges: bool
    strided: bool
    packed: bool
    splits: int = 1


def variant_of(kernel: str, dtype: str, shape_class: str, splits: int = 1) -> Variant:
    """What a launch with logits of this class is compiled as."""
    from grpo_kernels.kernels.triton.launch import layout

    logits = SHAPE_CLASSES[shape_class](getattr(torch, dtype))
    of_rows = layout(logits, skipped=0)
    packed = logits.dim() == 2 and kernel != "_logps_fwd_kernel"  # to which packed rows are like others
    return Variant(kernel, dtype, of_rows["EDGES"], of_rows["STRIDED"], packed, splits)


def tile_of(variant: Variant) -> Tile:
    pass_name = "backward" if "bwd" in variant.kernel else "forward"
    return tile_for(pass_name, getattr(torch, variant.dtype).itemsize, 128_256, variant.strided)


def variants() -> Iterator[tuple[Variant, list[str]]]:
    """Every variant, with the shape classes that it serves."""
    for dtype in ("bfloat16", "float16", "float32"):
        for kernel in ("_logps_fwd_kernel", "_logps_bwd_kernel", "_group_robust_fwd_kernel"):
            served: dict[Variant, list[str]] = {}
            for shape_class in SHAPE_CLASSES:
                served.setdefault(variant_of(kernel, dtype, shape_class), []).append(shape_class)
            yield from served.items()
    for kernel in ("_logps_fwd_kernel", "_merge_splits_kernel", "_group_robust_fwd_kernel"):
        yield variant_of(kernel, "bfloat16", "V odd", splits=8), ["V odd"]


def compile_variant(variant: Variant, target: int | str, serves: list[str]) -> Report:
    """
    Args:
        target: 90 for sm_90, or the name of an AMD architecture.

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
    signature, constants = _specialisation(variant, kernel.arg_names)
    names = list(signature)
    tile = tile_of(variant)
    lanes = 32 if isinstance(target, int) else 64
    options = {"num_warps": 4} if variant.kernel == "_merge_splits_kernel" else tile.launch_options(lanes)
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name.endswith("_ptr")},
        ),
        target=GPUTarget("cuda", target, 32) if isinstance(target, int) else GPUTarget("hip", target, 64),
        options=options,
    )
    if isinstance(target, int):
        ((resources, code),) = kernels_of_cubin(compiled.asm["cubin"]).values()
    else:
        resources, code = _amd_resources(compiled.asm["amdgcn"]), Code.parsed(compiled.asm["amdgcn"], amd=True)
    name = f"{variant.kernel}, splits {variant.splits}" if variant.splits > 1 else variant.kernel
    return Report.of("triton", name, variant.dtype, serves, target, tile.threads, resources, code)


def _specialisation(variant: Variant, names: list[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """(signature, constants) as a launch of the kernel would have them."""
    import triton.language as tl

    from grpo_kernels.kernels.triton import group_robust, logps

    tile = tile_of(variant)
    values = {
        "BLOCK": tile.block,
        "THREADS": tile.threads,
        "SPLITS": variant.splits,
        "EDGES": variant.edges,
        "STRIDED": variant.strided,
        "ALIKE": not variant.strided,
        "ACC": tl.float32,
        "MERGED_ROWS": logps.MERGED_ROWS,
        "HAS_FACTOR": True,
        "PACKED": variant.packed,
        # The fused forward with everything that a user may ask for at once.
        **dict.fromkeys(("ROWS", "PAIRS", "ALPHA", "AVERAGE", "IMPORTANCE", "CLEAR"), True),
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
    return signature, {name: values[name] for name in names if name in values}


def _amd_resources(assembly: str) -> Resources:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    # Scalar registers are spilled to vector registers, not to memory.
    spilled = max(4 * number("vgpr_spill_count"), number("private_segment_fixed_size"))
    return Resources(number("vgpr_count"), spilled, number("group_segment_fixed_size"))


def report(targets: tuple[int | str, ...] = TARGETS) -> list[Report]:
    """Every variant for every target, in order."""
    return [compile_variant(variant, target, serves) for variant, serves in variants() for target in targets]
