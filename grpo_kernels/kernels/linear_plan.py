"""What the linear path keeps from forward to backward, what each choice costs, and which is taken.

One product is 2 * tokens * D * V flops. Forward and backward need three: logits, dhidden, dweight. The gradient's
coefficients are known only after the whole batch, so a fourth makes the logits again, unless something is kept:

    plan         what is kept                                         products
    "none"       nothing, no gradients                                1
    "frozen"     G weight, of hidden's size; a frozen head (LoRA)     2
    "sweep"      G weight and sums of dweight, pairs in one sweep     3
    "keep"       G of as many tokens as fit                           3 for those, 4 for the others
    "recompute"  nothing                                              4

A product fewer where weight or hidden needs no gradient. "sweep" is kernels/linear_pairs.py, the others are
kernels/linear.py. The plan taken is the one predicted to be done first, of those whose memory fits: products at the
device's rate or as fast as their operands can be read (on a CPU one after the other), row kernels, sums and new memory
at its bandwidth, and launches. Within a hundredth of the best time a plan that saves memory wins, not one that saves
next to none with smaller chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.batch import Rows
from grpo_kernels.kernels import devices
from grpo_kernels.kernels.devices import Device
from grpo_kernels.kernels.linear import LinearHead

BUDGET_OPTIONS = ("max_extra_bytes", "plan", "accumulate_dtype")
PLANS = ("auto", "sweep", "keep", "recompute")  # to ask for
# The largest chunk's logits: more do not make a product faster. On a CPU 256 MiB in float32.
CHUNK_ELEMENTS = 1 << 26
GPU_CHUNK_ELEMENTS = 1 << 31
# However little memory there is: fewer rows read the weight once more for each.
MIN_CHUNK_ROWS = 64
LAUNCHES_A_CHUNK = 12
# Shares of the device's memory that max_extra_bytes="auto" allows.
GPU_SHARE, CPU_SHARE = 16, 32
NEARLY_THE_BEST = 1.01
WORTH_SAVING = 0.9  # of the memory of a plan with larger chunks


@dataclass(frozen=True)
class LinearShape:
    """``longest_pair``: tokens that a sweep's chunk should hold; accumulators: (V, D) sums that a sweep needs, or 0.

    ``itemsize``: of hidden and of the products' operands; ``weight_itemsize``: of the weight and its gradient.
    ``in_one_block``: chunks of rows may cross from a sequence to the next (see `rows.blocks`).
    """

    num_rows: int
    hidden_size: int
    vocab_size: int
    itemsize: int
    needs_grad: tuple[bool, bool, bool]
    device: Device
    longest_pair: int = 0
    accumulators: int = 0
    accumulate_dtype: torch.dtype = torch.float32
    weight_itemsize: int = 0
    has_softcap: bool = False
    in_one_block: bool = True

    @property
    def head_elements(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def sum_itemsize(self) -> int:
        return 8 if self.itemsize == 8 else self.accumulate_dtype.itemsize

    @property
    def on_cpu(self) -> bool:
        return self.device.name == "cpu"

    def sums_up(self, name: str, chunk_rows: int) -> bool:
        """Whether the weight's gradient is a sum over chunks: a single one's product is the gradient itself."""
        one_chunk = name != "sweep" and self.in_one_block and chunk_rows >= self.num_rows
        return self.needs_grad[1] and not (one_chunk and self.weight_itemsize in (0, self.itemsize))


@dataclass(frozen=True)
class Budget:
    """What the caller of the linear path allows: see `grpo_kernels.linear_sequence_logps`."""

    max_extra_bytes: int | str = "auto"
    plan: str = "auto"
    accumulate_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.max_extra_bytes != "auto":
            validation.check_whole_number("max_extra_bytes", self.max_extra_bytes, 0, "'auto' or ")
        validation.check_choice("plan", self.plan, PLANS)
        if self.accumulate_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"accumulate_dtype must be torch.float32 or torch.bfloat16, got {self.accumulate_dtype}")

    def bytes_on(self, device: Device) -> int:
        if isinstance(self.max_extra_bytes, str):
            return device.memory_bytes // (CPU_SHARE if device.name == "cpu" else GPU_SHARE)
        return self.max_extra_bytes


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
    seconds: float = 0.0


def plan_for(hidden: Tensor, head: LinearHead, rows: Rows, budget: Budget, accumulators: int = 0) -> LinearPlan:
    """The plan for these inputs. ``accumulators``: sums that a sweep would need; 0: it has no forecast of the loss."""
    whole = rows.vocab_shard is None and rows.context_group is None
    num_rows = rows.labels.numel()
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)]
    shape = LinearShape(
        num_rows,
        hidden.shape[-1],
        max(1, head.num_columns),  # a shard of the vocabulary may be empty
        hidden.element_size(),
        (needs[0], needs[1], needs[2]),
        devices.of(hidden.device),
        # Of packed rows twice the mean, for their lengths are on the device; a longer pair is computed again.
        2 * rows.labels.shape[1] if rows.cu_seqlens is None else 4 * num_rows // max(1, rows.num_sequences),
        accumulators if whole else 0,
        budget.accumulate_dtype,
        head.weight.element_size(),
        bool(head.softcap),
        hidden.is_contiguous() and rows.labels.is_contiguous(),
    )
    if rows.vocab_shard is None:
        return plan_of(shape, budget.bytes_on(shape.device), budget.plan)
    # A shard's G needs the other shards' log-sum-exp, which are there in the backward only.
    if budget.plan not in ("auto", "recompute"):
        raise ValueError(f"plan must be 'auto' or 'recompute' with vocab_shard, got {budget.plan!r}")
    return replace(plan_of(shape, budget.bytes_on(shape.device), "recompute"), name="recompute")


def plan_of(shape: LinearShape, max_extra_bytes: int, name: str = "auto") -> LinearPlan:
    """The fastest plan, or the one that is asked for by name.

    Raises:
        ValueError: the plan asked for is not possible.
    """
    plans = best_plans(shape, max_extra_bytes)
    if name == "auto" or plans[0].name in ("none", "frozen"):
        return _best(plans)
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


def best_plans(shape: LinearShape, max_extra_bytes: int) -> list[LinearPlan]:
    """The best of each kind that fits; one that keeps nothing is always there, with chunks as small as is sensible."""
    if not any(shape.needs_grad):
        names: tuple[str, ...] = ("none",)
    elif not (shape.needs_grad[1] or shape.needs_grad[2]):
        names = ("frozen",)
    else:
        names = ("recompute", "keep", "sweep") if shape.accumulators else ("recompute", "keep")
    plans = []
    for name in names:
        fitting = [plan for plan in _plans(shape, name, max_extra_bytes) if plan.extra_bytes <= max_extra_bytes]
        if not fitting and name == names[0]:
            # What cannot be done without does not fit: chunks of the memory that was allowed, then, or the smallest.
            every = list(_plans(shape, name, max_extra_bytes))
            needed = {plan.chunk_rows: _needed_bytes(shape, name, plan.chunk_rows) for plan in every}
            fitting = [plan for plan in every if plan.extra_bytes - needed[plan.chunk_rows] <= max_extra_bytes]
            fitting = fitting or every[-1:]
        if fitting:
            plans.append(_best(fitting))
    return plans


def _best(plans: list[LinearPlan]) -> LinearPlan:
    """Not min() with a key: Dynamo cannot trace it."""
    fastest = plans[0].seconds
    for plan in plans:
        if plan.seconds < fastest:
            fastest = plan.seconds
    best = None
    for plan in plans:
        near = plan.seconds <= NEARLY_THE_BEST * fastest
        if near and (best is None or plan.extra_bytes < WORTH_SAVING * best.extra_bytes):
            best = plan
    assert best is not None
    return best


def _largest_chunk(shape: LinearShape) -> int:
    elements = CHUNK_ELEMENTS if shape.on_cpu else GPU_CHUNK_ELEMENTS
    return max(1, min(shape.num_rows, elements // shape.vocab_size))


def _plans(shape: LinearShape, name: str, max_extra_bytes: int) -> Iterator[LinearPlan]:
    """Of one kind, with chunks of the largest size, half of it, and so on."""
    chunk = _largest_chunk(shape)
    while True:
        rows = max(chunk, min(shape.num_rows, shape.longest_pair)) if name == "sweep" else chunk
        if name != "keep":
            yield _plan(shape, name, rows, 0)
        else:
            yield _plan(shape, name, rows, shape.num_rows)
            spare = max_extra_bytes - _plan(shape, name, rows, 0).extra_bytes
            kept = spare // (shape.vocab_size * shape.itemsize) // rows * rows  # whole chunks
            if 0 < kept < shape.num_rows:
                yield _plan(shape, name, rows, kept)
        if chunk <= MIN_CHUNK_ROWS:
            return
        chunk = max(MIN_CHUNK_ROWS, chunk // 2)


def _needed_bytes(shape: LinearShape, name: str, chunk_rows: int) -> int:
    """The head in hidden's dtype, hidden's unit gradient, and sums that are not the gradient themselves."""
    needed, weight_itemsize = 0, shape.weight_itemsize or shape.itemsize
    if weight_itemsize != shape.itemsize:
        needed += shape.head_elements * shape.itemsize
    if name in ("frozen", "sweep") and shape.needs_grad[0]:
        needed += shape.num_rows * shape.hidden_size * shape.itemsize
    if shape.needs_grad[1] and name == "sweep":
        needed += shape.accumulators * shape.head_elements * shape.sum_itemsize
    elif shape.sums_up(name, chunk_rows) and shape.sum_itemsize != weight_itemsize:
        needed += shape.head_elements * shape.sum_itemsize
    return needed


def _plan(shape: LinearShape, name: str, chunk_rows: int, kept_rows: int) -> LinearPlan:
    """One plan, with its products, its memory and its time."""
    rows, needs = shape.num_rows, shape.needs_grad
    logits_row = shape.vocab_size * shape.itemsize
    chunks = -(-rows // chunk_rows) if rows else 0

    again = {"recompute": 1.0, "keep": 1 - kept_rows / rows if rows else 0.0}.get(name, 0.0)
    products = 1 + sum(needs[:2]) + again

    # Memory: a chunk's logits (twice with a softcap) and its rows, what is kept, and what is needed whatever the chunk.
    extra = chunk_rows * (logits_row * (1 + shape.has_softcap) + 3 * shape.hidden_size * shape.itemsize)
    if kept_rows >= rows and name == "keep":
        extra -= chunk_rows * logits_row
    extra += kept_rows * logits_row + _needed_bytes(shape, name, chunk_rows)

    # Time. On a GPU a product of few rows is as slow as its operands are read; a CPU reads them before it multiplies.
    device = shape.device
    operands = (shape.head_elements + chunk_rows * (shape.hidden_size + shape.vocab_size)) * shape.itemsize
    flops = 2 * chunk_rows * shape.head_elements
    multiplied, read = flops / device.flops[shape.itemsize], operands / device.bytes_a_second
    one_product = multiplied + read if shape.on_cpu else max(multiplied, read)
    seconds = products * (rows / chunk_rows) * one_product
    passes = 1 if name == "none" else 3  # the forward reads, the gradient reads and writes
    traffic = passes * rows * logits_row
    if shape.sums_up(name, chunk_rows):
        # Into the sum: it is read and written. On a CPU a narrower product is written, read and widened first.
        narrower = shape.on_cpu and shape.itemsize < shape.sum_itemsize
        traffic += chunks * shape.head_elements * (2 * shape.sum_itemsize + 2 * shape.itemsize * narrower)
        if name == "sweep":
            traffic += 3 * (shape.accumulators - 1) * shape.head_elements * shape.sum_itemsize
            # In the end the sums and the states are multiplied by what the forecast lacked.
            traffic += shape.head_elements * (shape.sum_itemsize + (shape.weight_itemsize or shape.itemsize))
            traffic += 2 * rows * shape.hidden_size * shape.itemsize
    traffic += int(extra) * shape.on_cpu  # memory that the system clears first
    seconds += traffic / device.bytes_a_second + chunks * LAUNCHES_A_CHUNK * device.launch_seconds
    return LinearPlan(name, chunk_rows, kept_rows, needs, shape.accumulate_dtype, products, int(extra), seconds)
