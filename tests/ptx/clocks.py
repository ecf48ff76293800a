"""Which accesses are ordered: vector clocks of every thread of a launch.

`known[t, u]` is the last epoch of thread u whose accesses happen before what thread t does next. An epoch ends where
its thread releases: at a barrier, a fence, or an atomic with release. As in the PTX memory model, a release pattern is
a fence and then a strong write; an acquire pattern a strong read of it and then a fence; an atomic add continues the
chain of those before it.
"""

from __future__ import annotations

import numpy as np


class Clocks:
    def __init__(self, num_threads: int) -> None:
        self.known = np.zeros((num_threads, num_threads), np.int32)
        np.fill_diagonal(self.known, 1)
        self._fenced: dict[int, np.ndarray] = {}  # what a thread's relaxed write releases: all before its last fence
        self._pending: dict[int, np.ndarray] = {}  # what a thread's next fence acquires
        self._released: dict[int, np.ndarray] = {}  # by address

    def epochs(self, threads: np.ndarray) -> np.ndarray:
        return self.known[threads, threads]

    def ordered(self, threads: np.ndarray, others: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Of accesses by ``others`` in ``epochs`` (0: none): whether they happen before what ``threads`` do now."""
        return self.known[threads, others] >= epochs

    def barrier(self, threads: np.ndarray) -> None:
        self.known[threads] = self.known[threads].max(0)
        self.known[threads, threads] += 1

    def fence(self, thread: int) -> None:
        acquired = self._pending.pop(thread, None)
        if acquired is not None:
            np.maximum(self.known[thread], acquired, out=self.known[thread])
        self._fenced[thread] = self.known[thread].copy()
        self.known[thread, thread] += 1

    def strong_read(self, thread: int, address: int, acquire: bool) -> None:
        released = self._released.get(address)
        if released is None:
            return
        if acquire:
            np.maximum(self.known[thread], released, out=self.known[thread])
        else:
            pending = self._pending.get(thread)
            self._pending[thread] = released.copy() if pending is None else np.maximum(pending, released)

    def strong_write(self, thread: int, address: int, release: bool, chained: bool) -> None:
        """``chained``: by an atomic, which passes on what earlier writes released."""
        mine = self.known[thread].copy() if release else self._fenced.get(thread)
        before = self._released.get(address) if chained else None
        parts = [one for one in (mine, before) if one is not None]
        self._released.pop(address, None)
        if parts:
            self._released[address] = np.maximum(*parts) if len(parts) == 2 else parts[0]
        if release:
            self.known[thread, thread] += 1
