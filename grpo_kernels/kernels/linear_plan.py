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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.batch import Rows
from grpo_kernels.kernels.linear import LinearHead

MAX_EXTRA_BYTES = 512 << 20
BUDGET_OPTIONS = ("max_extra_bytes", "plan", "accumulate_dtype")
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
    accumulate_dtype: torch.dtype = torch.float32
    on_gpu: bool = False

    @property
    def row_bytes(self) -> int:
        return self.vocab_size * self.itemsize


@dataclass(frozen=True)
class Budget:
    """What the caller of the linear path allows: see `grpo_kernels.linear_sequence_logps`."""

    max_extra_bytes: int = MAX_EXTRA_BYTES
    plan: str = "auto"
    accumulate_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        validation.check_number("max_extra_bytes", self.max_extra_bytes, 0)
        validation.check_choice("plan", self.plan, ("auto", "sweep", "keep", "recompute"))
        if self.accumulate_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"accumulate_dtype must be torch.float32 or torch.bfloat16, got {self.accumulate_dtype}")


@dataclass(frozen=True)
class LinearPlan:
    """``chunk_rows`` at most are held as logits at a time; ``extra_bytes`` does not count gradients.

    ``needs_grad``: of hidden, weight and bias. ``accumulate_dtype``: of the weight's gradient while it is summed.
    """

    name: str
    chunk_rows: int
    kept_rows: int
    needs_grad: tuple[bool, bool, bool]
    accumulate_dtype: torch.dtype
    products: float = 0
    extra_bytes: int = 0


def plan_for(hidden: Tensor, head: LinearHead, rows: Rows, budget: Budget, accumulators: int = 0) -> LinearPlan:
    """The plan for these inputs. ``accumulators``: sums that a sweep would need; 0: it has no forecast of the loss."""
    whole = rows.vocab_shard is None and rows.context_group is None
    num_rows = rows.labels.numel()
    # Of packed rows twice the mean, for their lengths are on the device; a longer pair is computed again.
    longest_pair = 2 * rows.labels.shape[1] if rows.cu_seqlens is None else 4 * num_rows // max(1, rows.num_sequences)
    shape = shape_of(hidden, head, num_rows, longest_pair, accumulators if whole else 0, budget.accumulate_dtype)
    if rows.vocab_shard is None:
        return plan_of(shape, budget.max_extra_bytes, budget.plan)
    # A shard's G needs the other shards' log-sum-exp, which are there in the backward only.
    return replace(plan_of(shape, budget.max_extra_bytes, "recompute"), name="recompute")


def shape_of(
    hidden: Tensor,
    head: LinearHead,
    num_rows: int,
    longest_pair: int = 0,
    accumulators: int = 0,
    accumulate_dtype: torch.dtype = torch.float32,
) -> LinearShape:
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    return LinearShape(
        num_rows,
        hidden.shape[-1],
        head.weight.shape[0],
        hidden.element_size(),
        (needs[0], needs[1], needs[2]),
        longest_pair,
        accumulators,
        accumulate_dtype,
        hidden.device.type != "cpu",
    )


def possible_plans(shape: LinearShape, max_extra_bytes: int) -> Sequence[LinearPlan]:
    """Every plan that fits; one that keeps nothing always may, with chunks as small as is sensible."""
    rows, row_bytes = shape.num_rows, shape.row_bytes
    chunk = _chunk_rows(shape, max_extra_bytes)

    def plan(name: str, chunk: int, products: float, extra_bytes: int, kept: int = 0) -> LinearPlan:
        return LinearPlan(name, chunk, kept, shape.needs_grad, shape.accumulate_dtype, products, extra_bytes)

    if not any(shape.needs_grad):
        return [plan("none", chunk, 1, chunk * row_bytes)]
    states_bytes = rows * shape.hidden_size * shape.itemsize
    if not (shape.needs_grad[1] or shape.needs_grad[2]):
        return [plan("frozen", chunk, 2, chunk * row_bytes + states_bytes)]
    least = 1 + sum(shape.needs_grad[:2])
    plans = [plan("recompute", chunk, least + 1, chunk * row_bytes)]
    kept = _kept_rows(shape, chunk, max_extra_bytes)
    if kept:
        extra = kept * row_bytes + (chunk * row_bytes if kept < rows else 0)
        plans.append(plan("keep", chunk, least + 1 - kept / rows, extra, kept))
    if shape.accumulators:
        sums_bytes = shape.vocab_size * shape.hidden_size * shape.accumulate_dtype.itemsize
        kept_bytes = shape.accumulators * sums_bytes + (states_bytes if shape.needs_grad[0] else 0)
        chunk = min(rows, max(chunk, shape.longest_pair))
        if kept_bytes + chunk * row_bytes <= max_extra_bytes:
            plans.append(plan("sweep", chunk, least, kept_bytes + chunk * row_bytes))
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
