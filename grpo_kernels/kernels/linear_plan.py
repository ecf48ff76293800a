"""What the linear path keeps from forward to backward, and what each choice costs.

One product is 2 * tokens * D * V flops. Forward and backward need three: logits, dhidden, dweight. The gradient's
coefficients are known only after the whole batch, so a fourth makes the logits again, unless something is kept:

    plan         what is kept                                         products
    "none"       nothing, no gradients                                1
    "frozen"     G weight, of hidden's size; a frozen head (LoRA)     2
    "sweep"      G weight and sums of dweight, pairs in one sweep     3
    "keep"       G of as many tokens as fit                           3 for those, 4 for the others
    "recompute"  nothing                                              4

A product fewer where weight or hidden needs no gradient. "sweep" is kernels/linear_pairs.py, the others are
kernels/linear.py. Of what fits in the memory, the fewest products win, then the least memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PLANS = ("none", "frozen", "sweep", "keep", "recompute")

# Logits of a chunk on a CPU: 32 MiB in float32, enough rows to keep the matrix products efficient.
CHUNK_ELEMENTS = 1 << 23
# However little memory there is: fewer rows read the weight once more for each.
MIN_CHUNK_ROWS = 64
# On a GPU fewer rows read the weight too often: a product of 2048 rows does 2048 flops for each of its bytes.
GPU_CHUNK_ROWS = 2048


@dataclass(frozen=True)
class LinearShape:
    """``longest_pair``: tokens that a sweep's chunk should hold; accumulators: (V, D) sums that a sweep needs, or 0."""

    num_rows: int
    hidden_size: int
    vocab_size: int
    itemsize: int
    needs_grad: tuple[bool, bool, bool]
    longest_pair: int = 0
    accumulators: int = 0
    accumulator_itemsize: int = 4
    on_gpu: bool = False

    @property
    def row_bytes(self) -> int:
        return self.vocab_size * self.itemsize


@dataclass(frozen=True)
class LinearPlan:
    """``chunk_rows`` at most are held as logits at a time; ``extra_bytes`` does not count gradients."""

    name: str
    chunk_rows: int
    kept_rows: int
    products: float
    extra_bytes: int


def shape_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_rows: int,
    longest_pair: int = 0,
    accumulators: int = 0,
    accumulate_dtype: torch.dtype = torch.float32,
) -> LinearShape:
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    return LinearShape(
        num_rows,
        hidden.shape[-1],
        weight.shape[0],
        hidden.element_size(),
        (needs[0], needs[1], needs[2]),
        longest_pair,
        accumulators,
        accumulate_dtype.itemsize,
        hidden.device.type != "cpu",
    )


def possible_plans(shape: LinearShape, max_extra_bytes: int) -> Sequence[LinearPlan]:
    """Every plan that fits; one that keeps nothing always may, with chunks as small as is sensible."""
    rows, row_bytes = shape.num_rows, shape.row_bytes
    chunk = _chunk_rows(shape, max_extra_bytes)
    if not any(shape.needs_grad):
        return [LinearPlan("none", chunk, 0, 1, chunk * row_bytes)]
    states_bytes = rows * shape.hidden_size * shape.itemsize
    if not (shape.needs_grad[1] or shape.needs_grad[2]):
        return [LinearPlan("frozen", chunk, 0, 2, chunk * row_bytes + states_bytes)]
    least = 1 + sum(shape.needs_grad[:2])
    plans = [LinearPlan("recompute", chunk, 0, least + 1, chunk * row_bytes)]
    kept = _kept_rows(shape, chunk, max_extra_bytes)
    if kept:
        extra = kept * row_bytes + (chunk * row_bytes if kept < rows else 0)
        plans.append(LinearPlan("keep", chunk, kept, least + 1 - kept / rows, extra))
    if shape.accumulators:
        sums_bytes = shape.vocab_size * shape.hidden_size * shape.accumulator_itemsize
        kept_bytes = shape.accumulators * sums_bytes + (states_bytes if shape.needs_grad[0] else 0)
        chunk = min(rows, max(chunk, shape.longest_pair))
        if kept_bytes + chunk * row_bytes <= max_extra_bytes:
            plans.append(LinearPlan("sweep", chunk, 0, least, kept_bytes + chunk * row_bytes))
    return plans


def plan_of(shape: LinearShape, max_extra_bytes: int, name: str = "auto") -> LinearPlan:
    """The cheapest plan, or the one that is asked for by name.

    Raises:
        ValueError: the plan asked for is not possible.
    """
    plans = possible_plans(shape, max_extra_bytes)
    if name == "auto" or plans[0].name in ("none", "frozen"):
        best = plans[0]
        for plan in plans[1:]:  # not min() with a key: Dynamo cannot trace it
            if (plan.products, plan.extra_bytes) < (best.products, best.extra_bytes):
                best = plan
        return best
    for plan in plans:
        if plan.name == name:
            return plan
    why = f"max_extra_bytes={max_extra_bytes} is too little for it"
    if name == "sweep" and not shape.accumulators:
        why = (
            "it needs the pairs' loss (LinearGroupRobustLoss) without vocab_shard or context_group, and weights of the "
            "groups that a batch's losses move by exponentiated gradient on one rank, with floor=0, chi=1 and no "
            "loss_ema, or (update='lagged') not at all"
        )
    raise ValueError(f"plan must be one that is possible here, got {name!r}: {why}")


def _chunk_rows(shape: LinearShape, max_extra_bytes: int) -> int:
    rows = GPU_CHUNK_ROWS if shape.on_gpu else CHUNK_ELEMENTS // shape.vocab_size
    return max(1, min(shape.num_rows, rows, max(MIN_CHUNK_ROWS, max_extra_bytes // shape.row_bytes)))


def _kept_rows(shape: LinearShape, chunk: int, max_extra_bytes: int) -> int:
    """Tokens whose G fits: all, or whole chunks beside the one that is worked on. Known without reading the labels."""
    fitting = max_extra_bytes // shape.row_bytes
    return shape.num_rows if fitting >= shape.num_rows else max(0, fitting // chunk - 1) * chunk
