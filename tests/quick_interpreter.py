"""Triton's interpreter without two things that took it over half of its time, and changed nothing; and a repair.

A launch replaces the functions of triton.language by interpreted ones, and does it again at each call of one jitted
function by another. And integers are computed twice, for a check that asserts in debug mode only.

A comparison of scalars has the type of what it compares. Spread over a block, as a part of a mask, it turns into such
numbers, and loads of Triton 3.9's interpreter refuse a mask of numbers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from types import SimpleNamespace
from typing import Any


def install() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what a kernel names, and Triton's own functions

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda _: replace(both)
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    splat = builder.create_splat

    def splat_of_its_own_type(block: Any, scalar: Any) -> Any:
        is_bool = scalar.data.dtype == bool
        return splat(block, interpreter.TensorHandle(scalar.data, tl.int1) if is_bool else scalar)

    builder.create_splat = splat_of_its_own_type
