"""What a kernel's machine code says without a GPU: registers, spills, the hot loop, and a prediction of its bandwidth.

Counts are exact; `predicted_fraction` is a model, with its assumptions in docs/kernels.md. The tools (nvdisasm,
cuobjdump) come with Triton's wheels for Linux.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

NVIDIA_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;")
AMD_INSTRUCTION = re.compile(r"\t()([a-z][a-z0-9_]+)\s*([^;]*)")
LABEL = re.compile(r"\s*(\.L\w+):")


class Instruction(NamedTuple):
    predicate: str
    name: str
    operands: str


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and where its labels stand among them."""

    instructions: list[Instruction]
    labels: dict[str, int]

    @classmethod
    def parsed(cls, listing: str, amd: bool = False) -> Code:
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            label = LABEL.match(line)
            found = (AMD_INSTRUCTION if amd else NVIDIA_INSTRUCTION).match(line)
            if label:
                labels[label[1]] = len(instructions)
            elif found:
                instructions.append(Instruction((found[1] or "").strip(), found[2], found[3].strip()))
        return cls(instructions, labels)

    def target(self, at: int) -> int | None:
        """Where the branch at this instruction goes; None: it is no branch."""
        name, operands = self.instructions[at].name, self.instructions[at].operands
        if not name.startswith(("BRA", "s_cbranch", "s_branch")):
            return None
        found = re.search(r"\.L\w+", operands)
        return self.labels.get(found[0]) if found else None

    def loops(self) -> list[list[Instruction]]:
        """Bodies of the innermost loops."""
        spans = []
        for at in range(len(self.instructions)):
            to = self.target(at)
            if to is not None and to < at:  # an endless loop of one instruction stands behind the code
                spans.append((to, at))
        inner = [
            (begin, end)
            for begin, end in spans
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
        ]
        return [self.instructions[begin : end + 1] for begin, end in inner]

    def shortest_path(self) -> list[Instruction]:
        """From the entry to an exit: the path with the most wide loads and stores, the shortest of those.

        Loops are not gone round. In a backward without one it is a tile that is read, and does not hold the label.
        """
        best: dict[int, tuple[int, int, list[int]]] = {}  # (wide accesses, -instructions, path) from here on
        for at in reversed(range(len(self.instructions))):
            one, to = self.instructions[at], self.target(at)
            ways: list[tuple[int, int, list[int]]] = [(0, 0, [])] if one.name in ("EXIT", "s_endpgm") else []
            if to is not None and to > at and to in best:
                ways.append(best[to])
            leaves = one.name in ("EXIT", "s_endpgm", "s_branch") or (to is not None and one.operands.startswith("`("))
            if (not leaves or one.predicate) and at + 1 in best:
                ways.append(best[at + 1])
            if ways:
                wide, length, path = max(ways, key=lambda way: way[:2])
                is_wide = _is_wide(one) and (_is_load(one) or _is_store(one))
                best[at] = (wide + is_wide, length - 1, [at, *path])
        return [self.instructions[at] for at in best[0][2]] if 0 in best else []


@dataclass(frozen=True)
class HotPath:
    """Where the time goes: the loop over a row, or in a backward without loop the whole path of a tile."""

    is_loop: bool
    instructions: int
    special: int
    """Of them for the special function unit (MUFU)."""
    wide_loads: int
    """Loads of 16 bytes."""
    narrow_loads: int
    """Other loads of global memory; outside a loop they are labels, edges and numbers of the row."""
    in_flight: int
    """Wide loads that are issued before the first that is waited for."""
    wide_stores: int
    barriers: int

    def per_logit(self, count: int, itemsize: int) -> float:
        return count * itemsize / (16 * self.wide_loads) if self.wide_loads else float("inf")


def hot_path(code: Code, is_loop: bool) -> HotPath:
    """``is_loop``: whether to look at the loop with the most exponentials, else at the path of a tile.

    Of loops those that load 16 bytes at a time come first: what follows the rows has exponentials, too.
    """
    if is_loop:
        path = max(
            code.loops(), key=lambda loop: (any(_is_load(x) and _is_wide(x) for x in loop), _special(loop)), default=[]
        )
        first = next((i for i, one in enumerate(path) if _is_load(one)), 0)
        ordered = path[first:] + path[:first]
    else:
        path = ordered = code.shortest_path()
    loads = [one for one in path if _is_load(one)]
    wide = sum(_is_wide(one) for one in loads)
    return HotPath(
        is_loop=is_loop,
        instructions=len(path),
        special=_special(path),
        wide_loads=wide,
        narrow_loads=len(loads) - wide,
        in_flight=_in_flight(ordered),
        wide_stores=sum(_is_store(one) and _is_wide(one) for one in path),
        barriers=sum(one.name.startswith(("BAR", "s_barrier")) for one in path),
    )


def _special(path: list[Instruction]) -> int:
    return sum(one.name.startswith(("MUFU", "v_exp")) for one in path)


def _is_load(one: Instruction) -> bool:
    return one.name.startswith(("LDG", "global_load", "buffer_load", "flat_load"))


def _is_store(one: Instruction) -> bool:
    return one.name.startswith(("STG", "global_store", "buffer_store", "flat_store"))


def _is_wide(one: Instruction) -> bool:
    return "128" in one.name or "x4" in one.name


def _in_flight(path: list[Instruction]) -> int:
    """Wide loads before the first instruction that reads what one of them brings."""
    waiting: set[int] = set()
    count = 0
    for one in path:
        target, _, sources = one.operands.partition(",")
        if one.name.startswith("v_") or one.name.startswith("s_waitcnt"):
            touched = _amd_registers(sources)
        else:
            touched = {int(number) for number in re.findall(r"\bR(\d+)\b", sources)}
            if one.name.startswith("STG"):
                touched |= {int(number) for number in re.findall(r"\bR(\d+)\b", target)}
        if waiting & touched:
            break
        if _is_load(one) and _is_wide(one):
            count += 1
            if one.name.startswith("LDG"):
                register = re.match(r"R(\d+)", target)
                waiting |= set(range(int(register[1]), int(register[1]) + 4)) if register else set()
            else:
                waiting |= _amd_registers(target)
    return count


def _amd_registers(operands: str) -> set[int]:
    found = {int(number) for number in re.findall(r"\bv(\d+)\b", operands)}
    for first, last in re.findall(r"\bv\[(\d+):(\d+)\]", operands):
        found |= set(range(int(first), int(last) + 1))
    return found


# -- NVIDIA ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What the model knows of a GPU. Bandwidths are assumptions, the H200's a copy's as others measured it."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes a second
    shared_bytes: int  # a block may use
    max_threads: int = 2048  # of a multiprocessor


DEVICES = {
    80: Device("A100 80 GB", 108, 1.41e9, 1.75e12, 166_912),
    90: Device("H200", 132, 1.98e9, 4.3e12, 232_448),
    100: Device("B200", 148, 1.85e9, 7.0e12, 232_448),
}
REGISTERS = 65_536  # of a multiprocessor


@dataclass(frozen=True)
class Resources:
    registers: int
    spill_bytes: int
    shared_bytes: int


def blocks_per_multiprocessor(resources: Resources, threads: int, device: Device) -> int:
    of_warp = -(-resources.registers * 32 // 256) * 256
    by_registers = REGISTERS // of_warp // (threads // 32)
    by_shared = device.shared_bytes // (resources.shared_bytes + 1024)
    return min(by_registers, device.max_threads // threads, by_shared, 32)


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def kernels_of_cubin(cubin: bytes) -> dict[str, tuple[Resources, Code]]:
    """By the name of its function."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: E731
        usage = run(tool("cuobjdump"), "-res-usage", file.name)
        listing = run(tool("nvdisasm"), "-c", file.name)
    resources = {
        name: Resources(int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
    }
    found = {}
    for part in listing.split("\n\t.section\t.text.")[1:]:
        name = part.split(",")[0].strip('"')
        if name in resources:
            found[name] = (resources[name], Code.parsed(part.split("\n\t.section\t")[0]))
    return found


# -- the model ---------------------------------------------------------------------------------------------------------

LATENCY = 850  # clocks, of a load that nothing delays
ROW_LATENCIES = 4  # waits of a row outside its loop: label, then its logits; ticket and its fence
TILE_LATENCIES = 2  # of a tile of the backward: label, then its logits


@dataclass(frozen=True)
class Work:
    """What a block does before the next takes its place: ``steps`` of the hot path, and what is around them."""

    steps: int
    step: HotPath
    threads: int
    stores: bool  # whether a step writes as much as it reads
    other_instructions: int
    waits: int  # clocks


def predicted_fraction(work: Work, blocks: int, device: Device, works: int = 60) -> float:
    """The share of the bandwidth that a multiprocessor with so many blocks at once reaches.

    An in-order model: a block asks for a step's bytes, waits for the queue of the memory and its latency, then for its
    turn at the issue slots (four instructions of a warp a clock, half a one of the special function unit), and goes on.
    """
    rate = device.bandwidth / device.multiprocessors / device.clock  # bytes a clock
    warps = work.threads / 32
    bytes_a_step = 16 * work.step.wide_loads * work.threads * (2 if work.stores else 1)
    issue = max(work.step.instructions * warps / 4, work.step.special * warps * 2)
    around = work.other_instructions * warps / 4
    memory = slots = finished = 0.0
    events = [(37.0 * block, block, False, 0, 0) for block in range(blocks)]  # (clock, block, arrived, steps, works)
    while events:
        now, block, arrived, steps, done = heapq.heappop(events)
        if not arrived:
            memory = max(memory, now) + bytes_a_step / rate
            heapq.heappush(events, (memory + LATENCY, block, True, steps, done))
            continue
        slots = max(slots, now) + issue
        if steps + 1 < work.steps:
            heapq.heappush(events, (slots, block, False, steps + 1, done))
            continue
        slots += around
        finished = max(finished, slots)
        if done + 1 < works:
            heapq.heappush(events, (slots + work.waits, block, False, 0, done + 1))
    return round(min(1.0, blocks * works * work.steps * bytes_a_step / rate / finished), 3)
