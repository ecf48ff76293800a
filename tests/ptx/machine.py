"""Runs a kernel: blocks of warps in random interleavings, lanes of a warp with a program counter each.

Of a warp's lanes those with the lowest counter go on together, so that lanes that parted meet again. Warps change at
memory accesses, fences and barriers only, for nothing else can be seen from outside. Two interleavings differ in who
comes first and last; that an order was enforced, and not luck, is what the vector clocks of every run show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ptx import arithmetic, effects
from ptx.clocks import Clocks
from ptx.memory import Access, Allocation, Fault, Memory
from ptx.parser import BITS, Instruction, Kernel, Several
from ptx.registers import reader, writer

WARP = 32
GARBAGE = 0xA5  # what registers and shared memory hold before anything is written to them
TURNS = (1, 4, 32, 1 << 30)  # memory accesses that a warp may make before another one may go on
COMPUTES, REACHES_OUT, BRANCHES, ENDS = range(4)


def _compute(instruction: Instruction) -> Callable[[Warp, np.ndarray], None]:
    if instruction.parts[0] == "mov" and any(isinstance(one, Several) for one in instruction.operands):
        return _split_or_join(instruction)
    operation = arithmetic.decoded(instruction)
    target, *operands = instruction.operands
    targets = target.parts if isinstance(target, Several) else (target,)
    write = writer(targets[0], operation.result)
    readers = [reader(*pair) for pair in zip(operands, operation.sources, strict=False)]
    compute = operation.compute
    if len(targets) == 1:
        return lambda warp, mask: write(warp, mask, compute(*[read(warp) for read in readers]))
    if operation.second_result is None:
        raise instruction.unsupported("two results of an instruction")
    write_second = writer(targets[1], operation.result)

    def run(warp: Warp, mask: np.ndarray) -> None:
        found = compute(*[read(warp) for read in readers])
        write(warp, mask, found)
        write_second(warp, mask, operation.second_result(found))

    return run


def _split_or_join(instruction: Instruction) -> Callable[[Warp, np.ndarray], None]:
    """mov.b64 {low, high}, x; and the other way."""
    target, source = instruction.operands
    whole = instruction.parts[-1]
    parts = target.parts if isinstance(target, Several) else source.parts
    part = f"b{BITS[whole] // len(parts)}"
    if isinstance(target, Several):
        read, writers = reader(source, whole), [writer(one, part) for one in parts]

        def split(warp: Warp, mask: np.ndarray) -> None:
            pieces = read(warp).view(arithmetic.DTYPES[part]).reshape(WARP, -1)
            for i, write in enumerate(writers):
                write(warp, mask, pieces[:, i])

        return split
    readers, write = [reader(one, part) for one in parts], writer(target, whole)

    def join(warp: Warp, mask: np.ndarray) -> None:
        pieces = np.stack([read(warp) for read in readers], 1)
        write(warp, mask, pieces.view(arithmetic.DTYPES[whole])[:, 0])

    return join


class Program:
    """A kernel whose instructions are decoded when they are first met."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._steps: list[tuple | None] = [None] * len(kernel)

    def step(self, pc: int) -> tuple:
        """(kind, function or branch target, guard)"""
        found = self._steps[pc]
        if found is None:
            found = self._steps[pc] = self.decoded(self.kernel.instruction(pc))
        return found

    def decoded(self, instruction: Instruction) -> tuple:
        guard = reader(instruction.guard, "pred") if instruction.guard else None
        if instruction.opcode in ("ret", "exit"):
            return ENDS, None, guard
        if instruction.target is not None:
            if instruction.target not in self.kernel.labels:
                raise instruction.unsupported("unknown label")
            return BRANCHES, self.kernel.labels[instruction.target], guard
        run = effects.decoded(instruction)
        if run is not None:
            return REACHES_OUT, run, guard
        return COMPUTES, _compute(instruction), guard


class Registers(dict[int, np.ndarray]):
    """Made when they are first used: a kernel has thousands, and most of its code is never run."""

    def __init__(self, bits: list[int]) -> None:
        self.bits = bits

    def __missing__(self, index: int) -> np.ndarray:
        size = self.bits[index] // 8
        self[index] = np.full(WARP * size, GARBAGE, np.uint8).view(f"u{size}") if size else np.zeros(WARP, bool)
        return self[index]


class Warp:
    def __init__(self, block: Block, number: int) -> None:
        self.block, self.launch = block, block.launch
        lanes = number * WARP + np.arange(WARP)
        self.threads = block.number * self.launch.block_size + lanes
        self.registers = Registers(self.launch.program.kernel.names.bits)
        self.live = lanes < self.launch.block_size
        self.waiting = np.zeros(WARP, bool)
        self.pcs = np.zeros(WARP, np.int64)
        self.pc = 0
        self.can_run = True
        self.barrier: tuple[int, Instruction] | None = None
        self._special = {
            "%tid.x": lanes,
            "%laneid": np.arange(WARP),
            "%warpid": np.full(WARP, number),
            **{f"%{name}.{axis}": np.full(WARP, 0) for name in ("tid", "ctaid") for axis in "yz"},
            **{f"%ctaid.{axis}": np.full(WARP, at) for axis, at in zip("xyz", block.index, strict=True)},
            **{f"%nctaid.{axis}": np.full(WARP, size) for axis, size in zip("xyz", self.launch.grid, strict=True)},
            **{f"%ntid.{axis}": np.full(WARP, self.launch.block_size if axis == "x" else 1) for axis in "xyz"},
        }

    def special(self, name: str) -> np.ndarray:
        return self._special[name]

    def run(self, turns: int) -> None:
        """Until that many accesses are made, or no lane can go on."""
        step = self.launch.program.step
        while turns > 0:
            ready = self.live & ~self.waiting
            self.can_run = bool(ready.any())
            if not self.can_run:
                return
            pc = int(self.pcs[ready].min())
            group = ready & (self.pcs == pc)
            later = self.pcs[self.live & (self.pcs > pc)]
            meeting = int(later.min()) if later.size else -1
            while True:
                kind, run, guard = step(pc)
                mask = group if guard is None else group & guard(self)
                if kind == COMPUTES:
                    run(self, mask)
                elif kind == REACHES_OUT:
                    self.pc = pc
                    turns -= 1
                    done = run(self, mask) if mask.any() else None
                    if done is not None:  # lanes that wait, or waited, have new counters of their own
                        if done is False:
                            self.waiting[mask], self.pcs[mask] = True, pc
                        self.pcs[group & ~mask] = pc + 1
                        break
                else:
                    self.pcs[group] = pc + 1
                    if kind == ENDS:
                        self.live &= ~mask
                    else:
                        self.pcs[mask] = run
                    break
                pc += 1
                if pc == meeting or turns <= 0:
                    self.pcs[group] = pc
                    break

    def arrived(self, mask: np.ndarray) -> np.ndarray:
        """Lanes at this instruction, those that waited for the others included."""
        return mask | (self.waiting & (self.pcs == self.pc) & (self.barrier is None))

    def go_on(self, lanes: np.ndarray) -> None:
        self.waiting[lanes], self.pcs[lanes] = False, self.pc + 1

    def wait_for_block(self, number: int, instruction: Instruction) -> None:
        self.waiting[self.live], self.pcs[self.live] = True, self.pc + 1
        self.barrier = (number, instruction)


class Block:
    def __init__(self, launch: Launch, number: int) -> None:
        self.launch, self.number = launch, number
        x, y, _ = launch.grid
        self.index = (number % x, number // x % y, number // x // y)
        size = launch.program.kernel.shared_bytes + launch.dynamic_shared
        data = np.full(size, GARBAGE, np.uint8)
        self.shared = Memory()
        self.shared.put(Allocation(f"shared memory of block {number}", 0, data, 1, np.zeros(size, bool)))
        self.warps = [Warp(self, i) for i in range(-(-launch.block_size // WARP))]

    def release(self) -> None:
        """Lets the warps go on if all that have not ended wait at the same barrier."""
        waiting = [warp for warp in self.warps if warp.live.any()]
        numbers = {warp.barrier[0] if warp.barrier else None for warp in waiting}
        if len(numbers) != 1 or None in numbers:
            return
        self.launch.clocks.barrier(np.concatenate([warp.threads[warp.live] for warp in waiting]))
        for warp in waiting:
            warp.barrier, warp.can_run = None, True
            warp.waiting[:] = False

    @property
    def stuck_at(self) -> list[str]:
        """Where lanes of a block wait."""
        kernel = self.launch.program.kernel
        places = set()
        for warp in self.warps:
            for lane in np.flatnonzero(warp.live & warp.waiting):
                places.add((warp.barrier[1] if warp.barrier else kernel.instruction(warp.pcs[lane])).place)
        return sorted(places)


@dataclass
class Launch:
    program: Program
    grid: tuple[int, int, int]
    block_size: int
    params: np.ndarray  # bytes
    dynamic_shared: int
    memory: Memory
    random: np.random.Generator

    def __post_init__(self) -> None:
        self.num_blocks = int(np.prod(self.grid))
        self.clocks = Clocks(self.num_blocks * self.block_size)
        self._scopes: dict[tuple[str, int], tuple[int, str]] = {}

    def run(self) -> None:
        self.memory.begin_launch()
        waiting = [int(one) for one in self.random.permutation(self.num_blocks)]
        at_once = int(self.random.integers(min(2, self.num_blocks), self.num_blocks + 1))
        blocks: list[Block] = []
        with np.errstate(all="ignore"):
            while waiting or blocks:
                while waiting and len(blocks) < at_once:
                    blocks.append(Block(self, waiting.pop()))
                ready = [warp for block in blocks for warp in block.warps if warp.can_run]
                if not ready:
                    raise Fault("deadlock", "; ".join(place for block in blocks for place in block.stuck_at))
                warp = ready[self.random.integers(len(ready))]
                warp.run(int(self.random.choice(TURNS)))
                if not warp.can_run:
                    warp.block.release()
                    blocks = [block for block in blocks if any(warp.live.any() for warp in block.warps)]

    def check_scope(self, warp: Warp, access: Access, key: tuple[str, int], scope: str) -> None:
        """An atomic of block scope is one for its own block only."""
        block, before = self._scopes.setdefault(key, (warp.block.number, scope))
        if block != warp.block.number and "cta" in (scope, before):
            raise access.fault(
                "race", 0, "meets an atomic of another block, and one of the two has the scope of its block"
            )
        self._scopes[key] = (warp.block.number, scope)


def launch(
    program: Program,
    grid: tuple[int, int, int],
    block_size: int,
    params: bytes,
    dynamic_shared: int,
    memory: Memory,
    seed: int,
) -> None:
    """
    Raises:
        Fault: the kernel does what it must not.
        Unsupported: it has an instruction that the interpreter does not know.
    """
    if len(params) < program.kernel.param_bytes:
        raise ValueError(f"params must have {program.kernel.param_bytes} bytes, got {len(params)}")
    arguments = np.frombuffer(params, np.uint8)
    Launch(program, grid, block_size, arguments, dynamic_shared, memory, np.random.default_rng(seed)).run()
