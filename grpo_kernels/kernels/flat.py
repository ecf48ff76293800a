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

SCHEMA_TYPES: dict[Any, tuple[str, ...]] = {
    Tensor: ("Tensor{} {}",),
    Tensor | None: ("Tensor{}? {}",),
    float | Tensor: ("Tensor{}? {}_tensor", "float{} {}"),  # one of them; the number is not looked at beside a tensor
    int: ("int{} {}",),
    float: ("float{} {}",),
    bool: ("bool{} {}",),
    str: ("str{} {}",),
    torch.dtype: ("ScalarType{} {}",),
    tuple[bool, bool, bool]: ("bool[3]{} {}",),
}
Packable = TypeVar("Packable")


class Flat(Generic[Packable]):
    """Packs objects of one class (a NamedTuple, or a dataclass).

    ``mutated``: fields whose tensors an operator writes to. ``outside``: fields that no operator gets.
    """

    def __init__(self, cls: type[Packable], mutated: Sequence[str] = (), outside: Sequence[str] = ()) -> None:
        self.cls = cls
        hints = get_type_hints(cls)
        of_class: Sequence[str] = getattr(cls, "_fields", ())
        names = of_class or [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        self.names = [name for name in names if name not in outside]
        self.is_either = [hints[name] == float | Tensor for name in self.names]
        arguments = []
        for name in self.names:
            alias = f"({'abcdefgh'[mutated.index(name)]}!)" if name in mutated else ""
            arguments += [text.format(alias, name) for text in SCHEMA_TYPES[hints[name]]]
        self.size = len(arguments)
        self.schema = ", ".join(arguments)

    def pack(self, value: Packable) -> tuple[Any, ...]:
        packed: list[Any] = []
        for name, is_either in zip(self.names, self.is_either, strict=True):
            field = getattr(value, name)
            if not is_either:
                packed.append(field)
            elif isinstance(field, Tensor):
                packed += [field, 0.0]
            else:
                packed += [None, float(field)]
        return tuple(packed)

    def unpack(self, packed: Sequence[Any]) -> Packable:
        fields, values = {}, iter(packed)
        for name, is_either in zip(self.names, self.is_either, strict=True):
            field = next(values)
            if is_either:
                number = next(values)
                field = number if field is None else field
            fields[name] = field
        return self.cls(**fields)


def split(values: Sequence[Any], *kinds: Flat[Any]) -> tuple[Any, ...]:
    """Objects of these kinds, packed one behind the other, and a tuple of what comes after them."""
    found, begin = [], 0
    for kind in kinds:
        found.append(kind.unpack(values[begin : begin + kind.size]))
        begin += kind.size
    return (*found, tuple(values[begin:]))
