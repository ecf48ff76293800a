"""What travels as one object, as the flat arguments that an operator's schema can carry, and back.

torch.library knows tensors and plain values only. The schema, the packing and the unpacking all follow the fields of
the class, so that a new one is added in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, TypeVar, get_type_hints

import torch
from torch import Tensor

EITHER = float | Tensor
SCHEMA_TYPES: dict[Any, tuple[str, ...]] = {
    Tensor: ("Tensor{} {}",),
    Tensor | None: ("Tensor{}? {}",),
    EITHER: ("Tensor{}? {}_tensor", "float{} {}"),  # one of them; the number is not looked at beside a tensor
    int: ("int{} {}",),
    float: ("float{} {}",),
    bool: ("bool{} {}",),
    str: ("str{} {}",),
    torch.dtype: ("ScalarType{} {}",),
    tuple[bool, bool, bool]: ("bool[3]{} {}",),
    tuple[str, ...]: ("str[]{} {}",),
    tuple[float, ...]: ("float[]{} {}",),
}
Packable = TypeVar("Packable")


class Flat(Generic[Packable]):
    """Packs objects of one class (a NamedTuple, or a dataclass), and those of such classes that they hold.

    ``mutated``: fields whose tensors an operator writes to. ``outside``: fields that no operator gets.
    """

    def __init__(self, cls: type[Packable], mutated: Sequence[str] = (), outside: Sequence[str] = ()) -> None:
        self.cls = cls
        self.schema, self.size = "", 0
        hints = get_type_hints(cls)
        of_class: Sequence[str] = getattr(cls, "_fields", ())
        names = of_class or [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        self.fields: list[tuple[str, Any, int]] = []  # name, type (a Flat for a class), number of arguments
        arguments: list[str] = []
        for name in names:
            if name in outside:
                continue
            hint, begin = hints[name], len(arguments)
            if hint in SCHEMA_TYPES:
                alias = f"({'abcdefgh'[mutated.index(name)]}!)" if name in mutated else ""
                arguments += [text.format(alias, name) for text in SCHEMA_TYPES[hint]]
            else:
                hint = Flat(hint)
                arguments.append(hint.schema)
            self.fields.append((name, hint, hint.size if isinstance(hint, Flat) else len(arguments) - begin))
        self.size = sum(size for *_, size in self.fields)
        self.schema = ", ".join(arguments)

    def pack(self, value: Packable) -> tuple[Any, ...]:
        packed: list[Any] = []
        for name, hint, _ in self.fields:
            field = getattr(value, name)
            if isinstance(hint, Flat):
                packed += hint.pack(field)
            elif hint != EITHER:
                packed.append(field)
            elif isinstance(field, Tensor):
                packed += [field, 0.0]
            else:
                packed += [None, float(field)]
        return tuple(packed)

    def unpack(self, packed: Sequence[Any]) -> Packable:
        fields, begin = {}, 0
        for name, hint, size in self.fields:
            values = packed[begin : begin + size]
            begin += size
            if isinstance(hint, Flat):
                fields[name] = hint.unpack(values)
            elif hint == EITHER:
                fields[name] = values[1] if values[0] is None else values[0]
            else:  # an operator is given lists
                fields[name] = tuple(values[0]) if isinstance(values[0], list) else values[0]
        return self.cls(**fields)


def split(values: Sequence[Any], *kinds: Flat[Any]) -> tuple[Any, ...]:
    """Objects of these kinds, packed one behind the other, and a tuple of what comes after them."""
    found, begin = [], 0
    for kind in kinds:
        found.append(kind.unpack(values[begin : begin + kind.size]))
        begin += kind.size
    return (*found, tuple(values[begin:]))
