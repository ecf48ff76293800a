"""A CPU's large temporaries on huge pages.

A step's logits and gradients are memory that the system gives anew each time, in pages of 4 KiB, whose faults cost it
several times what clearing them does (docs/kernels/linear.md has a measurement). Linux gives pages of 2 MiB to those
who ask, where transparent_hugepage is set to "madvise".
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

LEAST_BYTES = 4 << 20  # of less the system's own allocator keeps the pages from step to step


def on_huge_pages(x: Tensor) -> Tensor:
    """``x``, new and not filled yet, after asking for huge pages; as it is elsewhere than on a CPU under Linux."""
    if type(x) is Tensor and x.device.type == "cpu" and x.nbytes >= LEAST_BYTES and sys.platform == "linux":
        begin = -(-x.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        whole_pages = (x.data_ptr() + x.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        _madvise()(begin, whole_pages, mmap.MADV_HUGEPAGE)  # a kernel without them refuses, and nothing is lost
    return x


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise: Callable[[int, int, int], int] = function
    return madvise
