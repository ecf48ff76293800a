"""What travels as one object, as the flat arguments that an operator's schema can carry, and back.

torch.library knows tensors and plain values only. The schema, the packing and the unpacking all follow the fields of
the class, so that a new one is added in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

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
    tuple[str, ...]: ("str[]{} {}",),
    tuple[float, ...]: ("float[]{} {}",),
}
Packable = TypeVar("Packable")


class Field(NamedTuple):
    name: str
    size: int
    """Arguments that it takes: two where it is a number or a tensor."""
    nested: Flat[Any] | None


class Flat(Generic[Packable]):
    """Packs objects of one class (a NamedTuple, or a dataclass), and those of such classes that they hold.

    ``mutated``: fields whose tensors an operator writes to. ``outside``: fields that no operator gets.
    """

    schema: str
    size: int

    def __init__(self, cls: type[Packable], mutated: Sequence[str] = (), outside: Sequence[str] = ()) -> None:
        self.cls = cls
        hints = get_type_hints(cls)
        of_class: Sequence[str] = getattr(cls, "_fields", ())
        names = of_class or [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        self.fields: list[Field] = []
        arguments: list[str] = []
        for name in names:
            if name in outside:
                continue
            hint = hints[name]
            if hint in SCHEMA_TYPES:
                alias = f"({'abcdefgh'[mutated.index(name)]}!)" if name in mutated else ""
                texts = [text.format(alias, name) for text in SCHEMA_TYPES[hint]]
                self.fields.append(Field(name, len(texts), None))
                arguments += texts
            else:
                nested: Flat[Any] = Flat(hint)
                self.fields.append(Field(name, nested.size, nested))
                arguments.append(nested.schema)
        self.size = sum(field.size for field in self.fields)
        self.schema = ", ".join(arguments)

    def pack(self, value: Packable) -> tuple[Any, ...]:
        packed: list[Any] = []
        for name, size, nested in self.fields:
            field = getattr(value, name)
            if nested is not None:
                packed += nested.pack(field)
            elif size == 1:
                packed.append(field)
            elif isinstance(field, Tensor):
                packed += [field, 0.0]
            else:
                packed += [None, float(field)]
        return tuple(packed)

    def unpack(self, packed: Sequence[Any]) -> Packable:
        fields, begin = {}, 0
        for name, size, nested in self.fields:
            values = packed[begin : begin + size]
            begin += size
            if nested is not None:
                fields[name] = nested.unpack(values)
            elif size == 1:  # an operator is given lists
                fields[name] = tuple(values[0]) if isinstance(values[0], list) else values[0]
            else:
                fields[name] = values[1] if values[0] is None else values[0]
        return self.cls(**fields)


def split(values: Sequence[Any], *kinds: Flat[Any]) -> tuple[Any, ...]:
    """Objects of these kinds, packed one behind the other, and a tuple of what comes after them."""
    found, begin = [], 0
    for kind in kinds:
        found.append(kind.unpack(values[begin : begin + kind.size]))
        begin += kind.size
    return (*found, tuple(values[begin:]))
