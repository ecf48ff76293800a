"""Triton's interpreter without what took it most of its time, and changed nothing; and a repair.

A launch replaces the functions of triton.language by interpreted ones and puts them back, and does it again at each
call of one jitted function by another: here it is done once, for nothing in such a process compiles. Integers are
computed twice, for a check that asserts in debug mode only. And each operation makes the types of its operands anew.

A comparison of scalars has the type of what it compares. Spread over a block, as a part of a mask, it turns into such
numbers, and loads of Triton 3.9's interpreter refuse a mask of numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
from types import SimpleNamespace
from typing import Any


def install() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    _remember_types(tl, interpreter)
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})  # what a kernel names, and Triton's own functions
    interpreter._patch_lang(both)
    nothing_to_restore = interpreter._LangPatchScope()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = lambda _: nothing_to_restore
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    splat = builder.create_splat

    def splat_of_its_own_type(block: Any, scalar: Any) -> Any:
        is_bool = scalar.data.dtype == bool
        return splat(block, interpreter.TensorHandle(scalar.data, tl.int1) if is_bool else scalar)

    builder.create_splat = splat_of_its_own_type


def _remember_types(tl: Any, interpreter: Any) -> None:
    """The few types and shapes that a kernel has."""
    numpy_type, with_element_type, are_equal = (
        interpreter._get_np_dtype,
        tl.block_type.with_element_ty,
        tl.dtype.__eq__,
    )
    numpy_types: dict[str, Any] = {}

    def numpy_type_once(of: Any) -> Any:
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(of)
        return numpy_types[name]

    def with_element_type_once(self: Any, element: Any) -> Any:
        known = self.__dict__.setdefault("with_element_types", {})
        if element.name not in known:
            known[element.name] = with_element_type(self, element)
        return known[element.name]

    @functools.cache
    def of_shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.core.constexpr(math.prod(sizes)), tl.core.tuple([tl.core.constexpr(size) for size in sizes])

    def init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_shape(tuple(type.shape) if type.is_block() else ())

    interpreter._get_np_dtype = numpy_type_once
    tl.block_type.with_element_ty = with_element_type_once
    tl.dtype.__eq__ = lambda self, other: self is other or are_equal(self, other)
    tl.tensor.__init__ = init
