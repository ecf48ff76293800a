"""What the loss costs a rank of a mesh, by arithmetic: `doctor --linear 2x8192x70B --mesh dp=32,tp=8` prints it.

The linear path's memory and time are its planner's (kernels/linear_plan.py) for the part of hidden states and head that
a rank has; bytes of collectives are those of scale.py. Nothing is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from grpo_kernels.distributed import scale
from grpo_kernels.kernels.devices import Device
from grpo_kernels.kernels.linear_plan import Budget, LinearPlan, LinearShape, plan_of

NUM_GROUPS = 32  # of the group statistics
MAX_DIGITS = 12  # products of four such numbers, and seconds made of them, are far from what a float can hold
WHOLE_NUMBERS = f"whole numbers of at most {MAX_DIGITS} digits"


@dataclass(frozen=True)
class Mesh:
    """Numbers of ranks: data, tensor, context and pipeline parallel; ``ep`` of the first and third share experts.

    The loss is on the last pipeline stage and knows no experts: ``pp`` and ``ep`` leave its cost as it is.
    """

    dp: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1

    @classmethod
    def of(cls, text: str) -> Mesh:
        """Of "dp=32,tp=8"; what is not named is 1.

        Raises:
            ValueError: another name, no whole number from 1 on, or experts that do not divide dp * cp.

        Example:
            >>> Mesh.of("dp=128,tp=8,pp=16").gpus
            16384
        """
        names = [field.name for field in fields(cls)]
        parts = [part.partition("=")[::2] for part in text.split(",")]
        given = {name: _whole(number) for name, number in parts}
        if not set(given) <= set(names) or len(given) < len(parts) or not all(given.values()):
            raise ValueError(
                f"mesh must be like dp=32,tp=8, of {', '.join(names)}, each once, and {WHOLE_NUMBERS}, got {text!r}"
            )
        mesh = cls(**given)
        if mesh.dp * mesh.cp % mesh.ep:
            raise ValueError(f"mesh must have an ep that divides dp * cp = {mesh.dp * mesh.cp}, got ep={mesh.ep}")
        return mesh

    @property
    def gpus(self) -> int:
        return self.dp * self.tp * self.cp * self.pp

    def __str__(self) -> str:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={number}" for name, number in named.items() if number > 1) or "dp=1"


@dataclass(frozen=True)
class RankCost:
    """Of a forward and a backward on a rank of the last pipeline stage: bytes, and seconds as the planner predicts."""

    tokens: int
    vocab_columns: int
    logits_bytes: int
    """The logits path: its logits, over which the gradient is written, and what it saves."""
    plan: LinearPlan
    """The linear path; its ``extra_bytes`` are beside the gradients of hidden states and head."""
    dhidden_bytes: int
    dweight_bytes: int
    gathered_bytes: int
    """A sharded vocabulary: the rank's part of the all-gather."""
    summed_bytes: int
    """All-reduces: hidden's gradient (sharded vocabulary), sums of sequences (sharded positions), group statistics."""


def cost_of_rank(sizes: tuple[int, int, int, int], mesh: Mesh, dtype: torch.dtype, device: Device) -> RankCost:
    """
    Args:
        sizes: (S, T, D, V): sequences of a data-parallel rank's forward, and their positions before they are split.

    Raises:
        ValueError: positions or vocabulary are fewer than the ranks that share them.
    """
    sequences, length, hidden_size, vocab_size = sizes
    if length < mesh.cp or vocab_size < mesh.tp:
        raise ValueError(f"mesh must leave each rank a position and a column, got {mesh} for {length} x {vocab_size}")
    tokens, columns = sequences * -(-length // mesh.cp), -(-vocab_size // mesh.tp)
    whole = mesh.tp == mesh.cp == 1
    shape = LinearShape(
        tokens,
        hidden_size,
        columns,
        dtype.itemsize,
        (True, True, False),
        device,
        longest_pair=2 * length,
        accumulators=(1 if mesh.dp > 1 else 2) if whole else 0,  # over several ranks with update="lagged"
    )
    plan = plan_of(shape, Budget().bytes_on(device), "auto" if mesh.tp == 1 else "recompute")
    dhidden = tokens * hidden_size * dtype.itemsize
    sums = scale.group_statistics_bytes(NUM_GROUPS) if mesh.dp > 1 else 0
    sums += dhidden if mesh.tp > 1 else 0
    sums += scale.context_sum_bytes(sequences) if mesh.cp > 1 else 0
    return RankCost(
        tokens,
        columns,
        scale.logits_bytes(tokens, columns, itemsize=dtype.itemsize) + scale.saved_bytes_a_token() * tokens,
        plan,
        dhidden,
        columns * hidden_size * dtype.itemsize,
        scale.vocabulary_gather_bytes(tokens) if mesh.tp > 1 else 0,
        sums,
    )


def sizes_of(text: str) -> tuple[int, int, int, int]:
    """(S, T, D, V) of "SxTxDxV", or of "SxTx8B" with the head of a model of `scale.HEADS`.

    Raises:
        ValueError: not four positive whole numbers, or another model.
    """
    heads = {head.name: (head.hidden_size, head.vocab_size) for head in scale.HEADS}
    *first, last = text.split("x")
    parts: list[Any] = [*first, *heads[last]] if last in heads else [*first, last]
    numbers = [_whole(part) for part in parts]
    if len(numbers) != 4 or min(numbers) < 1:
        raise ValueError(
            f"linear must be SEQUENCESxLENGTHxHIDDENxVOCABULARY, {WHOLE_NUMBERS}, or SEQUENCESxLENGTHx and one of "
            f"{', '.join(heads)}, got {text!r}"
        )
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _whole(text: str | int) -> int:
    """0 for what is no whole number, or too long a one."""
    text = str(text)
    return int(text) if text.isdecimal() and len(text) <= MAX_DIGITS else 0


# Llama 3's layouts, about: short and long sequences, up to 16,384 GPUs.
LAYOUTS = (
    ("2x8192x8B", "dp=8"),
    ("2x8192x8B", "dp=1024"),
    ("2x8192x70B", "dp=16,tp=8"),
    ("2x8192x70B", "dp=256,tp=8,pp=4"),
    ("2x8192x405B", "dp=64,tp=8,pp=16"),
    ("2x8192x405B", "dp=128,tp=8,pp=16"),
    ("2x131072x405B", "dp=8,tp=8,cp=16,pp=16"),
)


def table(device: Device) -> str:
    """Markdown: a row for each of `LAYOUTS`, in bfloat16."""
    lines = [
        "| batch of a data-parallel rank | mesh | GPUs | tokens a rank | logits path | linear path: plan | beside the "
        "gradients | head's gradient | time | gathered | summed |",
        f"|{' --- |' * 11}",
    ]
    for text, of_mesh in LAYOUTS:
        mesh = Mesh.of(of_mesh)
        cost = cost_of_rank(sizes_of(text), mesh, torch.bfloat16, device)
        cells = [text, of_mesh, f"{mesh.gpus:,}", f"{cost.tokens:,}", mib(cost.logits_bytes), cost.plan.name]
        cells += [mib(cost.plan.extra_bytes), mib(cost.dweight_bytes), f"{1e3 * cost.plan.seconds:,.0f} ms"]
        cells += [mib(cost.gathered_bytes), mib(cost.summed_bytes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def mib(number: int) -> str:
    size = number / scale.MIB
    return f"{size:,.0f} MiB" if size >= 10 or size == 0 else f"{size:.2g} MiB"
