"""Memory that checks each access: bounds, alignment, whether it was written before, and data races.

Global memory is that of CPU tensors, at their own addresses. What is remembered is kept for each grain: the itemsize of
a tensor, a byte of shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ptx.clocks import Clocks
from ptx.parser import Instruction


class Fault(Exception):
    """What a kernel must not do. ``kind``: out of bounds, misaligned, uninitialised, race, deadlock."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass
class Access:
    """Lanes of a warp that load or store ``size`` bytes each at once."""

    instruction: Instruction
    threads: np.ndarray  # numbers in the launch
    addresses: np.ndarray
    size: int
    strong: bool = False  # an atomic, or .relaxed, .acquire, .release, .volatile: such accesses may race each other
    read_only: bool = False  # .nc: what it reads must not be written in this launch

    def part(self, chosen: np.ndarray) -> Access:
        return replace(self, threads=self.threads[chosen], addresses=self.addresses[chosen])

    def fault(self, kind: str, lane: int, what: str) -> Fault:
        return Fault(kind, f"thread {self.threads[lane]} {what}, {self.instruction.place}")


@dataclass
class Allocation:
    name: str
    base: int
    data: np.ndarray  # bytes
    grain: int
    initialised: np.ndarray  # by grain
    allowed: np.ndarray | None = None  # by grain, None where all of it is
    keep: object = None
    # Of this launch, by grain: the last write and read, as thread, epoch (0: none) and line; reads beside that one.
    writes: np.ndarray = field(init=False)
    reads: np.ndarray = field(init=False)
    many_read: np.ndarray = field(init=False)
    more_reads: np.ndarray = field(init=False)  # (grain, thread, epoch, line) of each
    strong: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.begin_launch()

    def begin_launch(self) -> None:
        grains = len(self.initialised)
        self.writes, self.reads = np.zeros((2, 3, grains), np.int32)
        self.more_reads = np.zeros((4, 0), np.int64)
        self.many_read, self.strong = np.zeros((2, grains), bool)

    @property
    def end(self) -> int:
        return self.base + len(self.data)

    def grains(self, access: Access) -> np.ndarray:
        """(lanes, grains of one access)"""
        first = (access.addresses - self.base) // self.grain
        return first[:, None] + np.arange(max(1, access.size // self.grain))

    def at(self, grain: int) -> str:
        return f"{self.name}, element {grain}" if self.grain > 1 else f"{self.name}, byte {grain}"

    # -- checks

    def load(self, access: Access, clocks: Clocks) -> np.ndarray:
        """(lanes, size) bytes."""
        grains = self.grains(access)
        self._check_place(access, grains)
        raw = ~self.initialised[grains]
        if raw.any():
            lane, part = np.argwhere(raw)[0]
            raise access.fault("uninitialised", lane, f"reads {self.at(grains[lane, part])}, which nobody has written")
        if access.read_only and self.writes[1][grains].any():
            raise access.fault("race", 0, f"reads {self.name} as read-only, but this launch writes to it")
        self._check_order(access, grains, clocks, self.writes, "write")
        if not access.strong:
            self._remember_read(access, grains, clocks)
        return self._bytes(access)

    def store(self, access: Access, values: np.ndarray, clocks: Clocks) -> None:
        """``values``: (lanes, size) bytes."""
        grains = self.grains(access)
        self._check_place(access, grains)
        before = self._bytes(access)
        same = (before == values).reshape(*grains.shape, -1).all(-1)
        # Two threads that write the same number to one place are no fault: nobody can tell which came last.
        harmless = same & self.initialised[grains]
        self._check_order(access, grains, clocks, self.writes, "write", harmless)
        self._check_order(access, grains, clocks, self.reads, "read")
        if self.many_read[grains].any():
            self._check_more_reads(access, grains, clocks)
        offsets = (access.addresses - self.base)[:, None] + np.arange(access.size)
        self.data[offsets] = values
        if (self.data[offsets] != values).any():
            lane = np.argwhere(self.data[offsets] != values)[0][0]
            raise access.fault("race", lane, f"and another lane write different values to {self.at(grains[lane, 0])}")
        self.initialised[grains] = True
        self.writes[:, grains] = np.stack(
            np.broadcast_arrays(
                access.threads[:, None], clocks.epochs(access.threads)[:, None], access.instruction.line, grains
            )[:3]
        )
        self.reads[1, grains] = 0
        self.strong[grains] = access.strong

    def _bytes(self, access: Access) -> np.ndarray:
        return self.data[(access.addresses - self.base)[:, None] + np.arange(access.size)]

    def _check_place(self, access: Access, grains: np.ndarray) -> None:
        if self.allowed is not None and not self.allowed[grains].all():
            lane, part = np.argwhere(~self.allowed[grains])[0]
            raise access.fault("out of bounds", lane, f"leaves its view of {self.at(grains[lane, part])}")

    def _check_order(
        self,
        access: Access,
        grains: np.ndarray,
        clocks: Clocks,
        earlier: np.ndarray,
        kind: str,
        harmless: np.ndarray | None = None,
    ) -> None:
        others, epochs = earlier[0][grains], earlier[1][grains]
        mine = access.threads[:, None]
        wrong = (others != mine) & ~clocks.ordered(mine, others, epochs)
        if harmless is not None:
            wrong &= ~harmless
        if access.strong and kind == "write":
            wrong &= ~self.strong[grains]
        if wrong.any():
            lane, part = np.argwhere(wrong)[0]
            grain = int(grains[lane, part])
            raise self._race(access, lane, grain, kind, int(others[lane, part]), int(earlier[2][grain]))

    def _race(self, access: Access, lane: int, grain: int, kind: str, thread: int, line: int) -> Fault:
        return access.fault(
            "race", lane, f"is not ordered behind the {kind} of {self.at(grain)} by thread {thread} at line {line}"
        )

    def _remember_read(self, access: Access, grains: np.ndarray, clocks: Clocks) -> None:
        """The last reader has a place of its own; readers that it is not ordered behind are kept beside it."""
        mine = np.broadcast_to(access.threads[:, None], grains.shape)
        epochs = np.broadcast_to(clocks.epochs(access.threads)[:, None], grains.shape)
        others = self.reads[:, grains]
        beside = (others[0] != mine) & ~clocks.ordered(mine, others[0], others[1])
        self._keep(grains[beside], *others[:, beside])
        self.reads[:, grains] = mine, epochs, np.full_like(mine, access.instruction.line)
        # Of lanes that read the same grain at once only one is in that place.
        beside = self.reads[0][grains] != mine
        self._keep(grains[beside], mine[beside], epochs[beside], np.full(beside.sum(), access.instruction.line))

    def _keep(self, grains: np.ndarray, *read: np.ndarray) -> None:
        if len(grains):
            self.more_reads = np.concatenate([self.more_reads, np.stack([grains, *read])], 1)
            self.many_read[grains] = True

    def _check_more_reads(self, access: Access, grains: np.ndarray, clocks: Clocks) -> None:
        """Then the write is the last that later accesses need be ordered behind."""
        touched = np.isin(self.more_reads[0], grains)
        for grain, thread, epoch, line in self.more_reads[:, touched].T.tolist():
            lane = int(np.argwhere(grains == grain)[0][0])
            mine = access.threads[lane]
            if thread != mine and clocks.known[mine, thread] < epoch:
                raise self._race(access, lane, grain, "read", thread, line)
        self.more_reads = self.more_reads[:, ~touched]
        self.many_read[grains] = False


class Memory:
    """Global memory: every tensor that a kernel may touch."""

    def __init__(self) -> None:
        self._allocations: list[Allocation] = []
        self._bases = np.empty(0, np.int64)

    def add(self, tensor: Tensor, name: str, initialised: bool = True) -> Allocation | None:
        """The whole storage of a tensor. One that is known already keeps what is known of it."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0 or tensor.device.type != "cpu":
            return None
        known = self._at(storage.data_ptr())
        if known is not None:
            return known
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        grains = np.full(len(data) // tensor.itemsize, initialised)
        return self.put(Allocation(name, storage.data_ptr(), data, tensor.itemsize, grains, keep=storage))

    def add_pieces(self, tensor: Tensor, name: str) -> None:
        """The elements of a tensor that begins its storage, neighbours together: all else is out of bounds.

        For storages larger than the machine's memory, of which little is touched.
        """
        data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        elements = np.unique(self._elements(tensor))
        for piece in np.split(elements, np.flatnonzero(np.diff(elements) > 1) + 1):
            begin, end = (int(x) * tensor.itemsize for x in (piece[0], piece[-1] + 1))
            initialised = np.ones(len(piece), bool)
            whole = f"{name} from element {piece[0]} on"
            self.put(Allocation(whole, tensor.data_ptr() + begin, data[begin:end], tensor.itemsize, initialised))

    def put(self, allocation: Allocation) -> Allocation:
        self._allocations.append(allocation)
        self._allocations.sort(key=lambda one: one.base)
        self._bases = np.array([one.base for one in self._allocations])
        return allocation

    def of(self, tensor: Tensor) -> tuple[Allocation, np.ndarray]:
        """A tensor's allocation and the grains of its elements."""
        allocation = self._at(tensor.untyped_storage().data_ptr())
        if allocation is None:
            raise KeyError("a tensor that was never added")
        return allocation, self._elements(tensor)

    @staticmethod
    def _elements(tensor: Tensor) -> np.ndarray:
        """Places in its storage, counted in elements."""
        steps = [np.arange(size) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return np.array(tensor.storage_offset()) + (sum(np.ix_(*steps)) if steps else 0)

    def guard(self, tensor: Tensor) -> None:
        """From now on only this view of its storage may be accessed."""
        allocation, grains = self.of(tensor)
        allocation.allowed = np.zeros(len(allocation.initialised), bool)
        allocation.allowed[grains] = True

    def is_written(self, tensor: Tensor) -> bool:
        allocation, grains = self.of(tensor)
        return bool(allocation.initialised[grains].all())

    def begin_launch(self) -> None:
        for one in self._allocations:
            one.begin_launch()

    def split(self, access: Access) -> Iterator[tuple[Allocation, np.ndarray]]:
        """(allocation, lanes): raises Fault where an access is misaligned or in none."""
        crooked = access.addresses % access.size != 0
        if crooked.any():
            lane = int(np.argmax(crooked))
            raise access.fault("misaligned", lane, f"accesses {access.size} bytes at {hex(access.addresses[lane])}")
        index = np.searchsorted(self._bases, access.addresses, side="right") - 1
        for i in np.unique(index):
            lanes = index == i
            one = self._allocations[max(i, 0)]
            outside = lanes & ((access.addresses < one.base) | (access.addresses + access.size > one.end))
            if outside.any():
                lane = int(np.argmax(outside))
                distance = int(access.addresses[lane]) - one.base
                raise access.fault(
                    "out of bounds", lane, f"is at byte {distance} of {one.name}, which has {len(one.data)}"
                )
            yield one, lanes

    def _at(self, base: int) -> Allocation | None:
        i = int(np.searchsorted(self._bases, base))
        return self._allocations[i] if i < len(self._bases) and self._bases[i] == base else None
