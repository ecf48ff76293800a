"""Faults to plant: changes to a kernel's PTX, found by what the source says where an instruction comes from."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

from ptx import parser

ROOT = Path(__file__).resolve().parent.parent.parent
Mutate = Callable[[str, str], str]


@functools.lru_cache(maxsize=1)
def _sources() -> dict[str, list[str]]:
    """Lines of each kernel file, by its name."""
    paths = [*(ROOT / "grpo_kernels" / "kernels" / "triton").glob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    return {path.name: path.read_text().splitlines() for path in paths if path.is_file()}


@functools.lru_cache(maxsize=16)
def instructions_by_source(text: str, name: str, opcode: str) -> dict[str, list[int]]:
    """Source line "file:number  what it says" -> PTX lines (from 0) of the instructions that begin with ``opcode``."""
    found: dict[str, list[int]] = {}
    for one in parser.kernel(text, name).statements:
        if not re.match(rf"(?:@!?\S+\s+)?{re.escape(opcode)}", one.text):
            continue
        file, _, number = one.source.partition(":")
        lines = _sources().get(file, [])
        said = lines[int(number) - 1].strip() if number and lines else ""
        found.setdefault(f"{one.source}  {said}", []).append(one.line - 1)
    return found


def without_barriers_before(kernel: str, pattern: str) -> Mutate:
    """Drops the barriers, ours and the compiler's, between the first match of ``pattern`` and the store before it."""

    def mutate(name: str, text: str) -> str:
        if kernel not in name:
            return text
        lines = text.split("\n")
        end = next((line for line, said in enumerate(lines) if re.search(pattern, said)), 0)
        begin = max((line for line in range(end) if "st.global" in lines[line]), default=0)
        barriers = [line for line in range(begin, end) if "bar.sync" in lines[line]]
        if not barriers:
            raise LookupError(f"{name} has no barrier before {pattern!r}")
        for line in barriers:
            lines[line] = ""
        return "\n".join(lines)

    return mutate


def without(kernel: str, opcode: str, says: str) -> Mutate:
    """Drops the instructions that come from source lines with ``says``: what a programmer would have forgotten."""

    def mutate(name: str, text: str) -> str:
        if kernel not in name:
            return text
        lines = text.split("\n")
        chosen = [
            line
            for source, numbers in instructions_by_source(text, name, opcode).items()
            if says in source
            for line in numbers
        ]
        if not chosen:
            raise LookupError(f"{name} has no {opcode} from a line that says {says!r}")
        for line in chosen:
            lines[line] = re.sub(rf"(@!?\S+\s+)?{re.escape(opcode)}[^;]*;", "", lines[line])
        return "\n".join(lines)

    return mutate


def replaced(kernel: str, pattern: str, replacement: str) -> Mutate:
    """Changes all that matches ``pattern``."""

    def mutate(name: str, text: str) -> str:
        if kernel not in name:
            return text
        changed, found = re.subn(pattern, replacement, text)
        if not found:
            raise LookupError(f"{name} has nothing like {pattern!r}")
        return changed

    return mutate


ONE_MORE = {"lt": "le", "ge": "gt"}


def _one_more_until_0(counter: str, loop: list[str]) -> str:
    """For a counter that is compared with 0 for not being equal: by the direction in which it goes there."""
    step = re.search(rf"add\.[su]32\s+{counter},\s*{counter},\s*(-?)\d+", "\n".join(loop))
    return "ge.s" if step and step[1] else "le.s"


def one_tile_more(kernel: str) -> Mutate:
    """Loops over whole tiles go on for one more: the comparisons before backward branches around vector loads."""

    def mutate(name: str, text: str) -> str:
        if kernel not in name:
            return text
        body = parser.kernel(text, name)
        lines, changed = text.split("\n"), 0
        for end, statement in enumerate(body.statements):
            branch = re.fullmatch(r"@(!?)(\S+)\s+bra\s+(\S+)", " ".join(statement.text.split()))
            loop = body.statements[body.labels.get(branch[3], end) : end + 1] if branch else []
            if not any(re.match(r"ld\.global\S*\.v[24]\.", one.text) for one in loop):
                continue
            for one in loop:
                compared = re.match(rf"setp\.(lt|ge|ne\.[bs])\S*\s+{re.escape(branch[2])}\b,\s*(%\w+)", one.text)
                if compared:
                    more = ONE_MORE.get(compared[1]) or _one_more_until_0(compared[2], [one.text for one in loop])
                    lines[one.line - 1] = lines[one.line - 1].replace(compared[1], more, 1)
                    changed += 1
        if not changed:
            raise LookupError(f"{name} has no loop over tiles")
        return "\n".join(lines)

    return mutate
