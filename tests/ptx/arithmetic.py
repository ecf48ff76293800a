"""Instructions that only compute: a table from opcode to types and a function on NumPy vectors, a lane an element.

Rounding to nearest is IEEE's. Approximate instructions (ex2, lg2, rcp.approx ...) are computed better than a GPU would,
and a fused multiply-add of float32 rounds twice where its float64 result is a tie: errors far below any kernel's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx.parser import BITS, Instruction

Array = np.ndarray
F32, F64 = np.float32, np.float64
SMALLEST = F32(2.0**-126)
DTYPES = {
    **{f"{kind}{bits}": np.dtype(f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{"f16": np.dtype("float16"), "f32": np.dtype("float32"), "f64": np.dtype("float64"), "pred": np.dtype("bool")},
    **{"bf16": np.dtype("uint16"), "bf16x2": np.dtype("uint32"), "f16x2": np.dtype("uint32")},
}


@dataclass(frozen=True)
class Operation:
    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Array]
    second_result: Callable[[Array], Array] | None = None  # of setp with p|q


def decoded(instruction: Instruction) -> Operation:
    name, *modifiers = instruction.parts
    types = [one for one in modifiers if one in BITS]
    flags = [one for one in modifiers if one not in BITS]
    if name not in TABLE:
        raise instruction.unsupported()
    try:
        operation = TABLE[name](types, flags)
    except (KeyError, ValueError, IndexError) as error:
        raise instruction.unsupported("unknown modifiers of an instruction") from error
    if operation is None:
        raise instruction.unsupported("unknown modifiers of an instruction")
    return operation


# -- floating point ----------------------------------------------------------------------------------------------------


def flushed(x: Array) -> Array:
    """Subnormal float32 numbers become zeros of their sign."""
    return x * (np.abs(x) >= SMALLEST) if x.dtype == F32 else x


def round_float32(x: Array, mode: str = "rn") -> Array:
    """float64 -> float32."""
    nearest = x.astype(F32)
    if mode == "rn":
        return nearest
    inward = np.abs(nearest) > np.abs(x)
    wrong = {"rm": nearest > x, "rp": nearest < x, "rz": inward}[mode]
    toward = {"rm": F32(-np.inf), "rp": F32(np.inf), "rz": F32(0)}[mode]
    return np.where(wrong, np.nextafter(nearest, toward), nearest)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64 with one rounding but for ties: product (Dekker) and sum (Knuth) as two numbers each."""
    product = a * b
    high_a, high_b = (x * 134217729.0 - (x * 134217729.0 - x) for x in (a, b))
    low_a, low_b = a - high_a, b - high_b
    error = low_a * low_b - (((product - high_a * high_b) - low_a * high_b) - high_a * low_b)
    total = product + c
    part = total - product
    correction = (product - (total - part)) + (c - part) + error
    return np.where(np.isfinite(correction), total + correction, total)


def _floating(compute: Callable[..., Array], arity: int, allowed: str = "rn") -> Callable:
    def build(types: list[str], flags: list[str]) -> Operation | None:
        (kind,) = types
        if kind not in ("f32", "f64") or set(flags) - {"ftz", "sat", *allowed.split()}:
            return None

        def run(*x: Array) -> Array:
            if "ftz" in flags:
                x = tuple(flushed(one) for one in x)
            y = compute(*x)
            y = np.where(y == y, np.clip(y, 0, 1), 0).astype(y.dtype) if "sat" in flags else y
            return flushed(y) if "ftz" in flags else y

        return Operation(kind, (kind,) * arity, run)

    return build


def _fma(types: list[str], flags: list[str]) -> Operation | None:
    modes = [one for one in flags if one in ("rn", "rm", "rp", "rz")]
    if types == ["f64"]:
        return _floating(fused, 3)(types, flags)

    def compute(a: Array, b: Array, c: Array) -> Array:
        return round_float32(a.astype(F64) * b + c, modes[0])

    return _floating(compute, 3, "rn rm rp rz")(types, flags)


def _top_word(x: Array) -> Array:
    """What an approximate float64 result keeps."""
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(F64) if x.dtype == F64 else x


def _reciprocal(types: list[str], flags: list[str]) -> Operation | None:
    return _floating((lambda x: _top_word(1 / x)) if "approx" in flags else (lambda x: 1 / x), 1, "rn approx")(
        types, flags
    )


def _in_float64(compute: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: compute(x.astype(F64)).astype(x.dtype)


def _extremum(of_two: Callable, of_numbers: Callable) -> Callable:
    """min or max: of floats, a NaN counts only with .NaN, and -0 is less than 0."""

    def build(types: list[str], flags: list[str]) -> Operation | None:
        (kind,) = types
        if kind[0] != "f":
            return _integer(of_two, 2)(types, flags)
        combine = of_two if "NaN" in flags else of_numbers
        return _floating(combine, 2, "NaN")(types, flags)

    return build


# -- integers ----------------------------------------------------------------------------------------------------------


def _integer(compute: Callable[..., Array], arity: int, allowed: str = "", kinds: str = "usb") -> Callable:
    def build(types: list[str], flags: list[str]) -> Operation | None:
        (kind,) = types
        if (kind[0] not in kinds and kind != "pred") or set(flags) - set(allowed.split()):
            return None
        return Operation(kind, (kind,) * arity, compute)

    return build


def _either(integer: Callable, floating: Callable) -> Callable:
    return lambda types, flags: (floating if types[-1][0] == "f" else integer)(types, flags)


def _product(types: list[str], flags: list[str]) -> Operation | None:
    """mul and mad: low or high half, or all of it."""
    (kind,), (half,) = types, flags
    wide = f"{kind[0]}{2 * BITS[kind]}"
    if half == "wide":
        return Operation(wide, (kind, kind, wide), lambda a, b, c=0: a.astype(DTYPES[wide]) * b + c)
    if half == "lo":
        return Operation(kind, (kind,) * 3, lambda a, b, c=None: a * b if c is None else a * b + c)
    if half == "hi" and BITS[kind] < 64:
        shift = BITS[kind]
        return Operation(
            kind, (kind,) * 3, lambda a, b, c=0: ((a.astype(DTYPES[wide]) * b) >> shift).astype(a.dtype) + c
        )
    if half == "hi":
        exact = np.frompyfunc(lambda a, b: (int(a) * int(b)) >> 64, 2, 1)
        return Operation(kind, (kind,) * 3, lambda a, b, c=0: exact(a, b).astype(a.dtype) + c)
    return None


def _quotient(a: Array, b: Array) -> Array:
    """Toward zero; by zero anything."""
    b = np.where(b == 0, b.dtype.type(1), b)
    floor = a // b
    return floor + ((floor < 0) & (floor * b != a)).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _shift(left: bool) -> Callable:
    def build(types: list[str], flags: list[str]) -> Operation | None:
        (kind,) = types
        bits, zero = BITS[kind], DTYPES[kind].type(0)

        def compute(a: Array, by: Array) -> Array:
            inside = np.minimum(by, bits - 1).astype(a.dtype)
            if not left and kind[0] == "s":
                return a >> inside
            return np.where(by < bits, a << inside if left else a >> inside, zero)

        return None if flags else Operation(kind, (kind, "u32"), compute)

    return build


def _funnel(types: list[str], flags: list[str]) -> Operation | None:
    direction, mode = flags

    def compute(low: Array, high: Array, by: Array) -> Array:
        by = (by & 31 if mode == "wrap" else np.minimum(by, 32)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        return (both >> by if direction == "r" else (both << by) >> np.uint64(32)).astype(np.uint32)

    return Operation("b32", ("b32", "b32", "u32"), compute) if mode in ("wrap", "clamp") else None


def _permuted(types: list[str], flags: list[str]) -> Operation | None:
    def compute(a: Array, b: Array, selector: Array) -> Array:
        pool = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros_like(a)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & 15
            byte = (pool >> ((nibble & 7) * 8).astype(np.uint64)).astype(np.uint32) & 255
            byte = np.where(nibble & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
            result |= byte << np.uint32(8 * i)
        return result

    return None if flags else Operation("b32", ("b32", "b32", "b32"), compute)


def _any_logic(types: list[str], flags: list[str]) -> Operation | None:
    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a)
        for i in range(8):
            term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            result |= np.where(table >> i & 1, term, a.dtype.type(0))
        return result

    return None if flags else Operation("b32", ("b32", "b32", "b32", "b32"), compute)


def _bits_of(compute: Callable[[int, int], int]) -> Callable:
    """popc, clz, brev: one number at a time."""

    def build(types: list[str], flags: list[str]) -> Operation | None:
        (kind,) = types
        each = np.frompyfunc(lambda x: compute(int(x), BITS[kind]), 1, 1)
        return None if flags else Operation("u32", (kind,), lambda x: each(x).astype(np.uint32))

    return build


def _bit_field(types: list[str], flags: list[str]) -> Operation | None:
    (kind,) = types
    bits = BITS[kind]

    def extract(x: int, begin: int, size: int) -> int:
        begin, size = begin & 255, size & 255
        sign_at = min(begin + size - 1, bits - 1)
        field = ((x >> begin) if begin < bits else (-1 if x < 0 else 0)) & ((1 << size) - 1)
        if kind[0] == "s" and size and x >> sign_at & 1:
            field |= -1 << min(size, bits)
        return field & ((1 << bits) - 1)

    each = np.frompyfunc(lambda x, begin, size: extract(int(x), int(begin), int(size)), 3, 1)
    unsigned = DTYPES[f"u{bits}"]
    return Operation(kind, (kind, "u32", "u32"), lambda *x: each(*x).astype(unsigned).view(DTYPES[kind]))


# -- predicates, choices, conversions ----------------------------------------------------------------------------------

COMPARISONS = {
    **{"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
    # The others are true of NaN.
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    **{"ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b)},
    **{"gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b)},
}
BOOLEANS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(types: list[str], flags: list[str]) -> Operation | None:
    (kind,) = types
    flags = list(flags)
    flush = flags.pop(flags.index("ftz")) if "ftz" in flags else None
    compare = COMPARISONS[flags[0]]

    def compute(a: Array, b: Array) -> Array:
        return compare(flushed(a), flushed(b)) if flush else compare(a, b)

    if len(flags) == 1:
        return Operation("pred", (kind, kind), compute, np.logical_not)
    combine = BOOLEANS[flags[1]]
    return Operation("pred", (kind, kind, "pred"), lambda a, b, c: combine(compute(a, b), c))


def _bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _widened(x: Array) -> Array:
    return (x.astype(np.uint32) << np.uint32(16)).view(F32)


INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _conversion(types: list[str], flags: list[str]) -> Operation | None:
    target, source = types
    if set(flags) - {"rn", "rz", "rm", "rp", "ftz", "sat", *INTEGRAL}:
        return None
    if target in ("bf16x2", "f16x2"):
        narrow = _bfloat16 if target == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        return (
            Operation(target, ("f32", "f32"), lambda a, b: (narrow(a).astype(np.uint32) << np.uint32(16)) | narrow(b))
            if flags == ["rn"] and source == "f32"
            else None
        )

    integral = next((INTEGRAL[one] for one in flags if one in INTEGRAL), None)
    mode = next((one for one in flags if one in ("rn", "rz", "rm", "rp")), "rn")
    if mode != "rn" and (source, target) != ("f64", "f32"):
        return None

    def compute(x: Array) -> Array:
        if source == "bf16":
            x = _widened(x)
        x = flushed(x) if "ftz" in flags else x
        x = integral(x) if integral else x
        if target == "bf16":
            return _bfloat16(x.astype(F32))
        if target[0] == "f":
            y = round_float32(x, mode) if (source, target) == ("f64", "f32") else x.astype(DTYPES[target])
            y = np.where(y == y, np.clip(y, 0, 1), 0).astype(y.dtype) if "sat" in flags else y
            return flushed(y) if "ftz" in flags else y
        if source[0] == "f" or source == "bf16":
            limits = np.iinfo(DTYPES[target])
            inside = np.clip(np.where(x == x, x, 0).astype(F64), limits.min, limits.max)
            top = inside >= float(limits.max)
            return np.where(top, DTYPES[target].type(limits.max), np.where(top, 0, inside).astype(DTYPES[target]))
        if "sat" in flags:
            limits = np.iinfo(DTYPES[target])
            x = np.clip(x.astype(object), limits.min, limits.max)
        return x.astype(DTYPES[target])

    return Operation(target, (source,), compute)


def _pass(types: list[str], flags: list[str]) -> Operation | None:
    """mov, and cvta: global memory and generic addresses are the same here; effects.py has shared ones."""
    (kind,) = types
    return None if set(flags) - {"to", "global", "param"} else Operation(kind, (kind,), lambda x: x)


def _selected(types: list[str], flags: list[str]) -> Operation | None:
    (kind,) = types
    return None if flags else Operation(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))


TABLE: dict[str, Callable[[list[str], list[str]], Operation | None]] = {
    "add": _either(_integer(np.add, 2), _floating(np.add, 2)),
    "sub": _either(_integer(np.subtract, 2), _floating(np.subtract, 2)),
    "mul": _either(_product, _floating(np.multiply, 2)),
    "mad": _either(_product, _fma),
    "fma": _fma,
    "div": _either(_integer(_quotient, 2, kinds="us"), _floating(np.divide, 2, "rn full approx")),
    "rem": _integer(_remainder, 2, kinds="us"),
    "neg": _either(_integer(np.negative, 1), _floating(np.negative, 1)),
    "abs": _either(_integer(np.abs, 1), _floating(np.abs, 1)),
    "min": _extremum(np.minimum, np.fmin),
    "max": _extremum(np.maximum, np.fmax),
    "copysign": _floating(lambda sign, x: np.copysign(x, sign), 2),
    "rcp": _reciprocal,
    "sqrt": _floating(np.sqrt, 1, "rn approx"),
    "rsqrt": _floating(lambda x: _top_word(_in_float64(lambda y: 1 / np.sqrt(y))(x)), 1, "approx"),
    "ex2": _floating(_in_float64(np.exp2), 1, "approx"),
    "lg2": _floating(_in_float64(np.log2), 1, "approx"),
    "and": _integer(np.bitwise_and, 2),
    "or": _integer(np.bitwise_or, 2),
    "xor": _integer(np.bitwise_xor, 2),
    "not": _integer(np.invert, 1),
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "shf": _funnel,
    "prmt": _permuted,
    "lop3": _any_logic,
    "popc": _bits_of(lambda x, bits: x.bit_count()),
    "clz": _bits_of(lambda x, bits: bits - x.bit_length()),
    "brev": _bits_of(lambda x, bits: int(f"{x:0{bits}b}"[::-1], 2)),
    "bfe": _bit_field,
    "setp": _comparison,
    "selp": _selected,
    "cvt": _conversion,
    "mov": _pass,
    "cvta": _pass,
}
