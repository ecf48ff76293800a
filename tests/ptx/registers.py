"""How operands are read and written: a register of a warp is a vector of 32 bit patterns, viewed as any type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import DTYPES
from ptx.parser import BITS, Immediate, Operand, Register, Special, Unsupported

if TYPE_CHECKING:
    from ptx.machine import Warp

Read = Callable[["Warp"], np.ndarray]
Write = Callable[["Warp", np.ndarray, np.ndarray], None]


def reader(operand: Operand, kind: str) -> Read:
    dtype, bits = DTYPES[kind], BITS[kind]
    if isinstance(operand, Register):
        index = operand.index
        if operand.negated:
            return lambda warp: ~warp.registers[index]
        if operand.bits == bits:
            return lambda warp: warp.registers[index].view(dtype)
        if operand.bits > bits:
            return lambda warp: warp.registers[index].astype(f"u{bits // 8}").view(dtype)
        raise Unsupported(f"a register of {operand.bits} bits as {kind}")
    if isinstance(operand, Immediate):
        if kind == "pred":
            constant = np.full(32, operand.value != 0)
        else:
            constant = np.full(32, operand.value & ((1 << bits) - 1), f"u{bits // 8}").view(dtype)
        return lambda warp: constant
    if isinstance(operand, Special):
        return lambda warp: warp.special(operand.name).astype(dtype)
    raise Unsupported(f"an operand {operand} where a {kind} should be")


def writer(operand: Operand | None, kind: str) -> Write:
    """Lanes outside the mask keep what they had. A number narrower than its register is extended by its sign."""
    if operand is None:
        return lambda warp, mask, values: None
    if not isinstance(operand, Register) or operand.bits < BITS[kind]:
        raise Unsupported(f"a result of type {kind} in {operand}")
    index = operand.index
    if operand.bits == BITS[kind]:
        dtype = DTYPES[kind]
    else:
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{operand.bits // 8}")

    def write(warp: Warp, mask: np.ndarray, values: np.ndarray) -> None:
        np.copyto(warp.registers[index].view(dtype), values, where=mask, casting="unsafe")

    return write
