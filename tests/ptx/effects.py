"""Instructions that reach beyond a thread's registers: memory, atomics, fences, barriers, exchange within a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import DTYPES
from ptx.memory import Access, Allocation, Fault
from ptx.parser import BITS, Address, Immediate, Instruction, Several
from ptx.registers import reader, writer

if TYPE_CHECKING:
    from ptx.machine import Warp

Run = Callable[["Warp", np.ndarray], "bool | None"]  # False: the lanes wait

SHARED_WINDOW = 1 << 60  # generic addresses of shared memory
SPACES = ("global", "shared", "shared::cta", "param")
SCOPES = ("cta", "cluster", "gpu", "sys")
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
CACHE_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt"}
STRONG = {"relaxed", "acquire", "release", "acq_rel", "volatile"}


def _modifiers(instruction: Instruction, allowed: set[str]) -> tuple[list[str], str, str]:
    """(all, space, type); unknown ones are an error, hints to caches are not."""
    flags = instruction.parts[1:-1]
    for one in flags:
        if one not in allowed and one not in (*SPACES, *SCOPES) and not one.startswith(("L1::", "L2::")):
            raise instruction.unsupported("unknown modifiers of an instruction")
    space = next((one for one in flags if one in SPACES), "generic")
    return flags, space.removesuffix("::cta"), instruction.parts[-1]


def _addresses(operand: Address) -> Callable[[Warp], np.ndarray]:
    if isinstance(operand.base, Immediate):
        return lambda warp: np.full(32, operand.base.value + operand.offset, np.int64)
    base = reader(operand.base, f"u{operand.base.bits}")
    return lambda warp: base(warp).astype(np.int64) + operand.offset


def _places(warp: Warp, access: Access, space: str) -> list[tuple[Allocation, np.ndarray]]:
    """The allocations that an access falls in, with the lanes of each."""
    if space == "generic" and len(access.addresses) and access.addresses[0] >= SHARED_WINDOW:
        access.addresses -= SHARED_WINDOW
        space = "shared"
    memory = warp.block.shared if space == "shared" else warp.launch.memory
    return list(memory.split(access))


def _load(instruction: Instruction) -> Run:
    flags, space, kind = _modifiers(instruction, {*STRONG, *VECTORS, *CACHE_HINTS, "weak", "nc"})
    target, source = instruction.operands[:2]  # behind them: a cache policy
    targets = target.parts if isinstance(target, Several) else (target,)
    size = BITS[kind] // 8 * len(targets)
    addresses, writers = _addresses(source), [writer(one, kind) for one in targets]
    strong, acquire = bool(STRONG & set(flags)), "acquire" in flags

    def run(warp: Warp, mask: np.ndarray) -> None:
        where = addresses(warp)[mask]
        if space == "param":
            found = warp.launch.params[where[:, None] + np.arange(size)]
        else:
            access = Access(instruction, warp.threads[mask], where, size, strong, "nc" in flags)
            found = np.empty((len(where), size), np.uint8)
            for allocation, lanes in _places(warp, access, space):
                found[lanes] = allocation.load(access.part(lanes), warp.launch.clocks)
            for thread, address in zip(access.threads, where, strict=True) if strong else ():
                warp.launch.clocks.strong_read(int(thread), (space, int(address)), acquire)
        values = found.view(DTYPES[kind])
        whole = np.zeros(32, DTYPES[kind])
        for i, write in enumerate(writers):
            whole[mask] = values[:, i]
            write(warp, mask, whole)

    return run


def _store(instruction: Instruction) -> Run:
    flags, space, kind = _modifiers(instruction, {*STRONG, *VECTORS, *CACHE_HINTS, "weak"})
    target, source = instruction.operands[:2]
    sources = source.parts if isinstance(source, Several) else (source,)
    addresses, readers = _addresses(target), [reader(one, kind) for one in sources]
    size = BITS[kind] // 8 * len(sources)
    strong, release = bool(STRONG & set(flags)), "release" in flags

    def run(warp: Warp, mask: np.ndarray) -> None:
        where = addresses(warp)[mask]
        values = np.ascontiguousarray(np.stack([read(warp)[mask] for read in readers], 1)).view(np.uint8)
        access = Access(instruction, warp.threads[mask], where, size, strong)
        for allocation, lanes in _places(warp, access, space):
            allocation.store(access.part(lanes), values[lanes], warp.launch.clocks)
        for thread, address in zip(access.threads, where, strict=True) if strong else ():
            warp.launch.clocks.strong_write(int(thread), (space, int(address)), release, chained=False)

    return run


UPDATES = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda old, new: new},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
    "inc": lambda old, new: np.where(old >= new, old.dtype.type(0), old + old.dtype.type(1)),
    "cas": lambda old, compared, new: np.where(old == compared, new, old),
}


def _atomic(instruction: Instruction) -> Run:
    flags, space, kind = _modifiers(instruction, {*STRONG, *UPDATES})
    update = next((one for one in flags if one in UPDATES), None)
    returns = instruction.parts[0] == "atom"
    place, *sources = instruction.operands[returns:]
    if update is None or DTYPES.get(kind) is None or isinstance(sources[0], Several):
        raise instruction.unsupported("unknown modifiers of an instruction")
    addresses, readers = _addresses(place), [reader(one, kind) for one in sources if not isinstance(one, Address)]
    write = writer(instruction.operands[0], kind) if returns else None
    scope = next((one for one in flags if one in SCOPES), "gpu")
    acquire, release = (bool({one, "acq_rel"} & set(flags)) for one in ("acquire", "release"))

    def run(warp: Warp, mask: np.ndarray) -> None:
        clocks, where = warp.launch.clocks, addresses(warp)
        values, whole = [read(warp) for read in readers], np.zeros(32, DTYPES[kind])
        for lane in warp.launch.random.permutation(np.flatnonzero(mask)):
            access = Access(instruction, warp.threads[[lane]], where[[lane]], BITS[kind] // 8, strong=True)
            ((allocation, _),) = _places(warp, access, space)
            key = (space, int(access.addresses[0]))
            warp.launch.check_scope(warp, access, key, scope)
            old = allocation.load(access, clocks).view(DTYPES[kind])[0]
            whole[lane] = old[0]
            new = np.asarray(UPDATES[update](old, *(one[[lane]] for one in values)), DTYPES[kind])
            clocks.strong_read(int(access.threads[0]), key, acquire)
            allocation.store(access, new.view(np.uint8)[None], clocks)
            clocks.strong_write(int(access.threads[0]), key, release, chained=True)
        if write is not None:
            write(warp, mask, whole)

    return run


def _fence(instruction: Instruction) -> Run:
    """A fence of block scope orders nothing between blocks. Here not even within one, which is too strict."""
    kinds = set(instruction.parts[1:])
    if kinds - {"sc", "acq_rel", "gl", *SCOPES}:
        raise instruction.unsupported("unknown modifiers of an instruction")

    def run(warp: Warp, mask: np.ndarray) -> None:
        for thread in warp.threads[mask] if "cta" not in kinds else ():
            warp.launch.clocks.fence(int(thread))

    return run


# -- what lanes or warps do together: they wait for each other ---------------------------------------------------------


def _block_barrier(instruction: Instruction) -> Run:
    if set(instruction.parts[1:]) - {"sync", "aligned", "cta"} or len(instruction.operands) > 1:
        raise instruction.unsupported("unknown modifiers of an instruction")
    number = reader(instruction.operands[0], "u32")

    def run(warp: Warp, mask: np.ndarray) -> bool:
        arrived = warp.arrived(mask)
        if (warp.live & ~arrived).any():
            return False
        warp.wait_for_block(int(number(warp)[mask][0]), instruction)
        return True

    return run


def _together(compute: Callable[[Warp, np.ndarray], None], members: Callable[[Warp], np.ndarray]) -> Run:
    def run(warp: Warp, mask: np.ndarray) -> bool:
        lanes = (members(warp)[np.flatnonzero(mask)[0]] >> np.arange(32, dtype=np.uint32)) & 1 != 0
        arrived = warp.arrived(mask)
        if (lanes & warp.live & ~arrived).any():
            return False
        together = arrived & lanes
        compute(warp, together)
        warp.go_on(together)
        return True

    return run


def _barrier(instruction: Instruction) -> Run:
    if instruction.parts[1] != "warp":
        return _block_barrier(instruction)
    members = reader(instruction.operands[0], "u32")
    return _together(lambda warp, mask: warp.launch.clocks.barrier(warp.threads[mask]), members)


def _shuffle(instruction: Instruction) -> Run:
    _, sync, mode, kind = instruction.parts
    target, *operands = instruction.operands
    if sync != "sync" or kind != "b32" or mode not in ("up", "down", "bfly", "idx"):
        raise instruction.unsupported("unknown modifiers of an instruction")
    targets = target.parts if isinstance(target, Several) else (target, None)
    write, write_inside = writer(targets[0], "b32"), writer(targets[1], "pred") if targets[1] else None
    value, by, clamp, members = (reader(one, "u32") for one in operands)
    lane = np.arange(32)

    def compute(warp: Warp, mask: np.ndarray) -> None:
        distance, limit = by(warp).astype(int) & 31, clamp(warp).astype(int)
        segment = limit >> 8 & 31
        last = (lane & segment) | (limit & 31 & ~segment)
        start = (lane & segment) | (distance & ~segment)
        source = {"up": lane - distance, "down": lane + distance, "bfly": lane ^ distance, "idx": start}[mode]
        inside = source >= last if mode == "up" else source <= last
        source = np.where(inside, source, lane)
        absent = mask & ~mask[source]
        if absent.any():
            raise Fault("divergence", f"lane {np.argmax(absent)} reads a lane that is not there, {instruction.place}")
        write(warp, mask, value(warp)[source])
        if write_inside is not None:
            write_inside(warp, mask, inside)

    return _together(compute, members)


REDUCTIONS = {
    **{"add": np.add, "min": np.minimum, "max": np.maximum},
    **{"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor},
}


def _reduction(instruction: Instruction) -> Run:
    """redux.sync"""
    _, sync, name, kind = instruction.parts
    if sync != "sync" or name not in REDUCTIONS or BITS.get(kind) != 32:
        raise instruction.unsupported("unknown modifiers of an instruction")
    target, source, members = instruction.operands
    write, read = writer(target, kind), reader(source, kind)

    def compute(warp: Warp, mask: np.ndarray) -> None:
        total = REDUCTIONS[name].reduce(read(warp)[mask], dtype=DTYPES[kind])
        write(warp, mask, np.full(32, total, DTYPES[kind]))

    return _together(compute, reader(members, "u32"))


def _vote(instruction: Instruction) -> Run:
    _, sync, mode, kind = instruction.parts
    if sync != "sync" or mode not in ("all", "any", "uni", "ballot"):
        raise instruction.unsupported("unknown modifiers of an instruction")
    target, source, members = instruction.operands
    write, read = writer(target, kind), reader(source, "pred")

    def compute(warp: Warp, mask: np.ndarray) -> None:
        voted = read(warp) & mask
        ballot = int((voted << np.arange(32, dtype=np.uint64)).sum())
        count, everyone = int(voted.sum()), int(mask.sum())
        result = {"all": count == everyone, "any": count > 0, "uni": count in (0, everyone), "ballot": ballot}[mode]
        write(warp, mask, np.full(32, result, DTYPES[kind]))

    return _together(compute, reader(members, "u32"))


def _to_shared(instruction: Instruction) -> Run:
    """cvta of shared memory, either way."""
    kind = instruction.parts[-1]
    write, read = writer(instruction.operands[0], kind), reader(instruction.operands[1], kind)
    step = np.array(SHARED_WINDOW, DTYPES[kind]) * (-1 if "to" in instruction.parts else 1)
    return lambda warp, mask: write(warp, mask, read(warp) + step.astype(DTYPES[kind]))


def _nothing(instruction: Instruction) -> Run:
    return lambda warp, mask: None


def _cache_policy(instruction: Instruction) -> Run:
    write = writer(instruction.operands[0], "b64")
    return lambda warp, mask: write(warp, mask, np.zeros(32, np.uint64))


def _trap(instruction: Instruction) -> Run:
    def run(warp: Warp, mask: np.ndarray) -> None:
        raise Fault("trap", instruction.place)

    return run


TABLE: dict[str, Callable[[Instruction], Run]] = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "fence": _fence,
    "membar": _fence,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "redux": _reduction,
    "vote": _vote,
    "createpolicy": _cache_policy,
    "prefetch": _nothing,
    "nanosleep": _nothing,
    "griddepcontrol": _nothing,
    "trap": _trap,
}


def decoded(instruction: Instruction) -> Run | None:
    """None where an instruction has no such effect."""
    if instruction.parts[0] == "cvta" and "shared" in instruction.parts:
        return _to_shared(instruction)
    build = TABLE.get(instruction.parts[0])
    return None if build is None else build(instruction)
