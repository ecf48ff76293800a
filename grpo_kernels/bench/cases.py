"""What is measured: shapes of known models, cases by name, and what each operation costs at least.

`cost` is the one model of bytes and flops: records and pictures divide by it, whichever backend ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch


def _groups(num_groups: int, usual: int) -> str:
    return "" if num_groups == usual else f"_groups{num_groups}"


@dataclass(frozen=True)
class Case:
    """Logits of ``num_sequences`` x ``length`` x ``vocab_size``; the first ``ignored`` of each sequence is prompt."""

    num_sequences: int
    length: int
    vocab_size: int
    dtype: str
    ignored: float = 0.0
    num_groups: int = 3

    @property
    def name(self) -> str:
        shape = f"{self.num_sequences}x{self.length}x{self.vocab_size}"
        return f"logits_{shape}_{self.dtype}_ignored{round(100 * self.ignored)}{_groups(self.num_groups, 3)}"


@dataclass(frozen=True)
class LinearCase:
    """Hidden states of ``num_sequences`` x ``length`` x ``hidden_size``; the first ``ignored`` of each is prompt.

    With ``reference`` the reference policy's log-probabilities are computed, too, from hidden states and a head of its
    own; without, the loss is reference-free.
    """

    num_sequences: int
    length: int
    hidden_size: int
    vocab_size: int
    dtype: str = "float32"
    ignored: float = 0.0
    reference: bool = False
    num_groups: int = 2

    @property
    def name(self) -> str:
        shape = f"{self.num_sequences}x{self.length}x{self.hidden_size}x{self.vocab_size}"
        suffix = ("_reference" if self.reference else "") + _groups(self.num_groups, 2)
        return f"linear_{shape}_{self.dtype}_ignored{round(100 * self.ignored)}{suffix}"

    @property
    def counted(self) -> int:
        return counted_tokens(self)


class Cost(NamedTuple):
    """The least that an operation moves and computes."""

    bytes: int
    flops: int

    def milliseconds(self, copy_gbps: float, matrix_gflops: float) -> float:
        """At the machine's measured rates, the slower of the two: the roof."""
        return max(self.bytes / copy_gbps, self.flops / matrix_gflops) / 1e6


def counted_tokens(case: Case | LinearCase) -> int:
    return case.num_sequences * (case.length - int(case.length * case.ignored))


def cost(case: Case | LinearCase) -> dict[str, Cost]:
    """Of "forward", "backward" and "both".

    Logits: counted rows are read forward, read and written backward; ignored rows' gradients are written. Linear: one
    product forward (logits), two backward (dhidden, dweight), over counted tokens; hidden and weight are read in each
    pass and their gradients written. The reference policy's logits are one more product forward.
    """
    counted, itemsize = counted_tokens(case), getattr(torch, case.dtype).itemsize
    if isinstance(case, Case):
        row = case.vocab_size * itemsize
        prompt = case.num_sequences * case.length - counted
        forward, backward = Cost(row * counted, 0), Cost(row * (2 * counted + prompt), 0)
    else:
        operands = (counted + case.vocab_size) * case.hidden_size * itemsize
        product = 2 * counted * case.hidden_size * case.vocab_size
        policies = 2 if case.reference else 1
        forward, backward = Cost(policies * operands, policies * product), Cost(2 * operands, 2 * product)
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return {"forward": forward, "backward": backward, "both": both}


def needed_bytes(case: Case | LinearCase) -> int:
    """What measuring holds at its peak: the eager contender's copies beside the inputs, or the float64 gate."""
    itemsize = getattr(torch, case.dtype).itemsize
    logits = case.num_sequences * case.length * case.vocab_size
    if isinstance(case, Case):
        return logits * (3 * itemsize + 3 * 4)  # logits, pristine copy, gradient; eager's float32 copies
    tokens = case.num_sequences * case.length
    operands = (tokens + case.vocab_size) * case.hidden_size
    return operands * (3 * itemsize + 2 * 8) + logits * (2 * itemsize + 3 * 4)  # gate: float64 operands and gradients


def why_not(case: Case | LinearCase, available_bytes: int) -> str | None:
    """The reason why this machine cannot measure the case, or None."""
    needed = needed_bytes(case)
    if needed <= available_bytes:
        return None
    return f"needs about {needed / 2**30:.1f} GiB of memory, {available_bytes / 2**30:.1f} GiB are available"


# (D, V) of the head, as in the models' published configurations.
HEADS = {
    "llama-3-8b": (4096, 128_256),
    "llama-3-70b": (8192, 128_256),
    "qwen2.5-0.5b": (896, 151_936),
    "qwen2.5-7b": (3584, 152_064),
    "gemma-2-2b": (2304, 256_000),
}
GROUPS = (2, 32, 1_000_000)

# What `bench` measures unless told otherwise.
DEFAULT: tuple[Case | LinearCase, ...] = (
    Case(8, 512, 32_000, "float32"),
    Case(8, 512, 32_000, "float32", ignored=0.5),
    Case(8, 512, 32_000, "bfloat16"),
    LinearCase(8, 512, 512, 32_000, ignored=0.5),
    LinearCase(8, 512, 512, 32_000, ignored=0.5, reference=True),
    LinearCase(8, 512, 512, 32_000, reference=True),
)
QUICK: tuple[Case | LinearCase, ...] = (Case(4, 128, 8000, "float32"), LinearCase(4, 64, 128, 8000))


def _named() -> dict[str, Case | LinearCase]:
    cases: dict[str, Case | LinearCase] = {}
    for head, (hidden_size, vocab_size) in HEADS.items():
        for ignored in (0.0, 0.5, 0.9):
            part = f"{head}/ignored{round(100 * ignored)}"
            cases[f"logits/{part}"] = Case(4, 256, vocab_size, "bfloat16", ignored)
            cases[f"linear/{part}"] = LinearCase(4, 256, hidden_size, vocab_size, "bfloat16", ignored)
        for label, num_sequences, length, ignored in (
            ("short", 4, 64, 0.0),
            ("32k", 2, 32_768, 0.0),
            ("large", 16, 512, 0.0),
            ("large50", 16, 512, 0.5),
        ):
            sizes = (num_sequences, length)
            cases[f"logits/{head}/{label}"] = Case(*sizes, vocab_size, "bfloat16", ignored)
            cases[f"linear/{head}/{label}"] = LinearCase(*sizes, hidden_size, vocab_size, "bfloat16", ignored)
        for groups in GROUPS:
            cases[f"logits/{head}/groups{groups}"] = Case(4, 64, vocab_size, "bfloat16", num_groups=groups)
            linear = LinearCase(4, 64, hidden_size, vocab_size, "bfloat16", num_groups=groups)
            cases[f"linear/{head}/groups{groups}"] = linear
    for hidden_size in (512, 2048):
        for dtype in ("float32", "bfloat16"):
            cases[f"linear/width{hidden_size}/{dtype}"] = LinearCase(8, 512, hidden_size, 32_000, dtype, 0.5)
    for length in (32, 64, 128, 256, 512, 1024):
        cases[f"logits/growth/tokens{8 * length}"] = Case(8, length, 32_000, "float32")
        cases[f"linear/growth/tokens{8 * length}"] = LinearCase(8, length, 512, 32_000)
    for vocab_size in (8_000, 32_000, 128_000):
        cases[f"logits/growth/vocabulary{vocab_size}"] = Case(8, 48, vocab_size, "float32")
        cases[f"linear/growth/vocabulary{vocab_size}"] = LinearCase(8, 48, 512, vocab_size)
    for hidden_size in (128, 512, 2048):
        cases[f"linear/growth/width{hidden_size}"] = LinearCase(8, 48, hidden_size, 32_000)
    for groups in GROUPS:
        cases[f"logits/growth/groups{groups}"] = Case(8, 128, 32_000, "float32", num_groups=groups)
        cases[f"linear/growth/groups{groups}"] = LinearCase(8, 128, 512, 32_000, num_groups=groups)
    return cases | {case.name: case for case in (*DEFAULT, *QUICK)}


NAMED = _named()


def select(patterns: Sequence[str]) -> dict[str, Case | LinearCase]:
    """Named cases that match any of the patterns, in the table's order.

    Raises:
        ValueError: a pattern matches none.

    Example:
        >>> list(select(["linear/qwen2.5-7b/ignored*"]))[-1]
        'linear/qwen2.5-7b/ignored90'
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in NAMED):
            near = ", ".join(get_close_matches(pattern, NAMED, n=5, cutoff=0.0))
            raise ValueError(f"no case is named {pattern!r}; near to it are {near}. benchmarks/README.md has the table")
    return {name: case for name, case in NAMED.items() if any(fnmatchcase(name, pattern) for pattern in patterns)}
