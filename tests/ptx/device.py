"""A device made of CPU tensors: of all that a backend's function allocates it is known what was written to it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptx import machine, parser
from ptx.memory import Memory

EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
GARBAGE = 0xA5


class _Allocations(TorchDispatchMode):
    """Makes every tensor that PyTorch creates or writes to known to a Memory."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        empty = function.overloadpacket.__name__ in EMPTY
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes():
                found = self.memory.add(tensor, f"{function.overloadpacket.__name__}{tuple(tensor.shape)}", not empty)
                if empty:
                    found.data[:] = GARBAGE
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                allocation, grains = self.memory.of(value)
                allocation.initialised[grains] = True
        return result


@dataclass
class Device:
    """``mutate`` changes the PTX of a kernel, given its name, before it is run; ``seed`` chooses the interleavings."""

    seed: int = 0
    mutate: Callable[[str, str], str] = lambda name, text: text
    memory: Memory = field(default_factory=Memory)
    launched: list[str] = field(default_factory=list)

    def call(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Of a backend, whose launchers come to `launch`."""
        for name, value in _tensors([*enumerate(args), *kwargs.items()]):
            self.memory.add(value, f"argument {name} {tuple(value.shape)}")
        with _Allocations(self.memory):
            return function(*args, **kwargs)

    def launch(self, text: str, name: str, grid: tuple, block_size: int, params: bytes, dynamic_shared: int) -> None:
        program = _program(self.mutate(name, text), name)
        seed = int(np.random.SeedSequence([self.seed, len(self.launched)]).generate_state(1)[0])
        self.launched.append(name)
        machine.launch(program, grid, block_size, params, dynamic_shared, self.memory, seed)


def _tensors(named: list[tuple[Any, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Those of arguments, and of objects that travel with several."""
    for name, value in named:
        if isinstance(value, Tensor):
            yield str(name), value
        elif dataclasses.is_dataclass(value):
            yield from _tensors(list(vars(value).items()))


@functools.lru_cache(maxsize=64)
def _program(text: str, name: str) -> machine.Program:
    return machine.Program(parser.kernel(text, name))
