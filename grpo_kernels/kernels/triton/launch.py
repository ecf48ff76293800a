"""What a launch says of its tensors: strides, where rows begin in memory, the device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from grpo_kernels.kernels.rows import strides_of

BYTES_A_LOAD = 16


def positions(logits: Tensor) -> int:
    """T: row number r is position r % T of sequence r // T. Packed rows are one sequence."""
    return logits.shape[-2]


def aligned_origin(logits: Tensor) -> tuple[Tensor, int]:
    """(a tensor that begins at the 16-byte boundary at or before the first logit, elements from there to it).

    Triton loads 16 bytes at a time only from a pointer that it finds aligned. Where another library's memory begins off
    such a boundary the logits stay as they are, and loads are narrow.
    """
    skipped = logits.data_ptr() % BYTES_A_LOAD // logits.itemsize
    if skipped == 0 or skipped > logits.storage_offset():
        return logits, 0
    extent = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True))
    return logits.as_strided((skipped + max(extent, 0),), (1,), logits.storage_offset() - skipped), skipped


def layout(logits: Tensor, skipped: int) -> dict[str, bool]:
    """The kernels' EDGES and STRIDED."""
    elements = BYTES_A_LOAD // logits.itemsize
    stride_s, stride_t, stride_v = strides_of(logits)
    whole = not any(x % elements for x in (skipped, stride_s, stride_t, logits.shape[-1]))
    return {"EDGES": stride_v != 1 or not whole, "STRIDED": stride_v != 1}


def alike(logits: Tensor, out: Tensor, skipped: int, out_skipped: int) -> bool:
    """The kernels' ALIKE."""
    elements = BYTES_A_LOAD // logits.itemsize
    (*strides, stride_v), (*out_strides, out_stride_v) = strides_of(logits), strides_of(out)
    differences = (a - b for a, b in zip((skipped, *strides), (out_skipped, *out_strides), strict=True))
    return stride_v == out_stride_v == 1 and not any(x % elements for x in differences)


def triton_dtype(acc: torch.dtype) -> tl.dtype:
    return tl.float64 if acc == torch.float64 else tl.float32


@functools.lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, which runs programs one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
