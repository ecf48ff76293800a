"""PTX as text -> kernels: parameters, shared variables and a list of instructions with their operands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

BITS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32} | {
    f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)
}
SHARED_ALIGNMENT = 128


class Unsupported(Exception):
    """The text has something that this interpreter does not know."""


@dataclass(frozen=True)
class Register:
    index: int
    bits: int
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    value: int  # the bits; negative for a negative integer
    is_float: bool = False


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x and its like


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class Several:
    parts: tuple[Operand | None, ...]  # {a, b} or p|q; None for _


Operand = Register | Immediate | Special | Address | Several


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    target: str | None  # of a branch
    line: int
    text: str
    source: str  # file and line that the compiler says it comes from

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")

    @property
    def place(self) -> str:
        return f"at line {self.line} of the PTX{f', {self.source}' if self.source else ''}: {self.text}"

    def unsupported(self, why: str = "unknown instruction") -> Unsupported:
        return Unsupported(f"{why} {self.place}")


@dataclass
class _Names:
    """What a name in a kernel's body means."""

    symbols: dict[str, int]  # offsets in the parameters or in shared memory
    ranges: dict[str, int] = field(default_factory=dict)  # %r<9> -> {"%r": 32}
    scopes: tuple[dict[str, Register], ...] = field(default_factory=lambda: ({},))
    bits: list[int] = field(default_factory=list)  # of registers, by their index

    def inside(self, scopes: tuple[dict[str, Register], ...]) -> _Names:
        return replace(self, scopes=scopes)

    def declare(self, statement: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        for name in re.split(r"\s*,\s*", names.strip()):
            prefix = re.fullmatch(r"(.*)<\d+>", name)
            if prefix:
                self.ranges[prefix[1]] = BITS[kind]
            else:
                self.scopes[-1][name] = self._new(BITS[kind])

    def _new(self, bits: int) -> Register:
        self.bits.append(bits)
        return Register(len(self.bits) - 1, bits)

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        prefix = name.rstrip("0123456789")
        if prefix == name or prefix not in self.ranges:
            return None
        self.scopes[0][name] = self._new(self.ranges[prefix])
        return self.scopes[0][name]

    def operand(self, text: str) -> Operand | None:
        text = text.strip()
        if text == "_":
            return None
        if text.startswith("{") or "|" in text:
            return Several(tuple(self.operand(part) for part in re.split(r"[,|]", text.strip("{}"))))
        if text.startswith("["):
            base, _, offset = re.sub(r"\s", "", text.strip("[]")).partition("+")
            return Address(self.operand(base), int(offset or "0", 0))
        if text.startswith("!"):
            return Register(**{**vars(self.operand(text[1:])), "negated": True})
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
            return Immediate(int(text[2:], 16), is_float=True)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        found = self.register(text)
        if found is not None:
            return found
        if text in self.symbols:
            return Immediate(self.symbols[text])
        if text.startswith("%"):
            return Special(text)
        raise KeyError(text)


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.S)


def entries(text: str) -> list[str]:
    """Names of a module's kernels."""
    return [found[1] for found in ENTRY.finditer(text)]


def kernel_params(text: str, name: str) -> list[tuple[int, int]]:
    """(offset, bytes) of a kernel's parameters."""
    entry = next(found for found in ENTRY.finditer(text) if found[1] == name)
    return list(_layout(re.findall(r"\.param\s+([^,]*)", entry[2]))[0].values())


def kernel(text: str, name: str) -> Kernel:
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"\n]*/)?([^"\n/]+)"', text, re.M))
    entry = next(found for found in ENTRY.finditer(text) if found[1] == name)
    end = _end_of_block(text, entry.end())
    # Variables of the module, then nvcc's that belong to one kernel and stand inside it, then those of the launch.
    module = re.findall(r"^\.shared\s+(.*?);", text, re.M)
    inner = re.findall(r"^\s*\.shared\s+(.*?);", text[entry.end() : end], re.M)
    shared, shared_bytes = _layout(module + inner)
    shared_bytes = -(-shared_bytes // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
    dynamic = re.findall(r"\.extern\s+\.shared\s[^;]*?([\w$]+)\[\s*\]\s*;", text)
    params, _ = _layout(re.findall(r"\.param\s+([^,]*)", entry[2]))
    symbols = {symbol: place[0] for symbol, place in {**params, **shared}.items()}
    names = _Names({**symbols, **dict.fromkeys(dynamic, shared_bytes)})
    statements, labels = _body(text, entry.end(), end, names, files)
    return Kernel(name, list(params.values()), shared_bytes, labels, statements, names)


def _end_of_block(text: str, begin: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return begin + brace.start()
    raise Unsupported("a kernel's body that does not end")


def _layout(declarations: list[str], begin: int = 0) -> tuple[dict[str, tuple[int, int]], int]:
    """Name -> (offset, bytes) of variables one after another, and where they end."""
    places = {}
    for declaration in declarations:
        kind, name, count = re.search(
            r"\.([bsuf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?\s*$", declaration.strip(), re.S
        ).groups()
        aligned = re.match(r"\.align\s+(\d+)", declaration.strip())
        size = BITS[kind] // 8
        alignment = int(aligned[1]) if aligned else size
        begin = -(-begin // alignment) * alignment
        places[name] = (begin, size * int(count or 1))
        begin += places[name][1]
    return places, begin


STATEMENT = re.compile(r"\s*(?:([{}])|([\w$%]+:)(?!:)|(\.(?:loc|pragma)[^\n;]*;?)|([^;\s][^;]*);)", re.S)


def _statements(text: str, begin: int, end: int) -> Iterator[tuple[int, str]]:
    """(position, statement): braces of a scope, labels with their colon, .loc lines, and what ends in a semicolon."""
    while found := STATEMENT.match(text, begin, end):
        begin = found.end()
        yield found.start(found.lastindex), found[found.lastindex].strip()
    if text[begin:end].strip():
        raise Unsupported(f"what is this: {text[begin : begin + 80]!r}")


@dataclass
class _Statement:
    text: str
    line: int
    source: str
    scopes: tuple[dict[str, Register], ...]


@dataclass
class Kernel:
    name: str
    params: list[tuple[int, int]]  # (offset, bytes)
    shared_bytes: int  # without what the launch adds
    labels: dict[str, int]
    statements: list[_Statement]
    names: _Names

    @property
    def param_bytes(self) -> int:
        return max((offset + size for offset, size in self.params), default=0)

    def __len__(self) -> int:
        return len(self.statements)

    def instruction(self, index: int) -> Instruction:
        """Read when it is asked for: most of a large kernel is never run."""
        one = self.statements[index]
        return _instruction(one.text, self.names.inside(one.scopes), one.line, one.source)


def _body(
    text: str, begin: int, end: int, names: _Names, files: dict[str, str]
) -> tuple[list[_Statement], dict[str, int]]:
    code: list[_Statement] = []
    labels: dict[str, int] = {}
    source, line, counted = "", text.count("\n", 0, begin) + 1, begin
    for position, statement in _statements(text, begin, end):
        line, counted = line + text.count("\n", counted, position), position
        if statement == "{":
            names.scopes = (*names.scopes, {})
        elif statement == "}":
            names.scopes = names.scopes[:-1]
        elif statement.endswith(":"):
            labels[statement[:-1]] = len(code)
        elif statement.startswith(".loc"):
            file, number = statement.split()[1:3]
            source = f"{files.get(file, '?')}:{number}" if number != "0" else source
        elif statement.startswith(".reg"):
            names.declare(statement)
        elif not statement.startswith((".pragma", ".shared")):
            code.append(_Statement(statement, line, source, names.scopes))
    return code, labels


def _instruction(statement: str, names: _Names, line: int, source: str) -> Instruction:
    text = " ".join(statement.split())
    found = re.fullmatch(r"(?:@(!?)(\S+)\s+)?([a-z][\w.:]*)\s*(.*)", text)
    if found is None:
        raise Unsupported(f"what is this in line {line} of the PTX: {text}")
    negated, guard, opcode, rest = found.groups()
    predicate = None
    if guard is not None:
        predicate = Register(**{**vars(names.register(guard)), "negated": bool(negated)})
    target = rest if opcode in ("bra", "bra.uni") else None
    try:
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", rest) if target is None else []
        operands = tuple(names.operand(part) for part in parts if part.strip())
    except (KeyError, TypeError) as error:
        raise Unsupported(f"unknown name {error} in line {line} of the PTX: {text}") from error
    return Instruction(opcode, operands, predicate, target, line, text, source)
