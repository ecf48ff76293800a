"""The linear path of every backend: chunks of counted tokens, logits of a chunk only, the backend's row kernels between
the matrix products.

    z = scale * (hidden weight^T + bias)        logits = z, or softcap * tanh(z / softcap)
    G = onehot(label) - softmax(logits), times dlogits/dz and the scale        d = dtoken_logps
    dhidden = d (G weight)                      dweight = G^T (d hidden)                    dbias = G^T d

Ignored tokens are dropped before the first product. G does not depend on d, so the forward may already make it, in
place over a chunk's logits; linear_plan.py says what is kept of it for the backward, and what that costs.

Finding the counted tokens reads the labels back: on a GPU it synchronises.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.batch import Rows
from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.memory import on_huge_pages
from grpo_kernels.kernels.rows import RowIndex, accumulation_dtype, blocks, counted_chunks, new_token_outputs, take
from grpo_kernels.kernels.token_metrics import metrics_of_chunk

if TYPE_CHECKING:
    from grpo_kernels.kernels.linear_plan import LinearPlan


ROWS_AT_ONCE = 64
# Logits that the first levels of a CPU's cache hold between two readings.
CACHED_BYTES = 8 << 20


class LinearHead(NamedTuple):
    """weight (V, D), bias (V,), and what the model does to their logits; a softcap of 0 is none."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    softcap: float = 0.0

    @property
    def num_columns(self) -> int:
        return self.weight.shape[0]

    def to(self, dtype: torch.dtype) -> LinearHead:
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def logits(self, chunk_hidden: Tensor, buffer: Tensor) -> Tensor:
        """(n, V) of (n, D), in the first rows of the buffer."""
        logits = torch.mm(chunk_hidden, self.weight.t(), out=buffer[: chunk_hidden.shape[0]])
        if self.bias is not None:
            logits.add_(self.bias)
        if self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def to_unit_gradient(
        self, kernels: KernelBackend, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int
    ) -> Tensor:
        """G of a chunk, over its logits."""
        slopes = self._slopes(logits)
        _to_gradient(kernels, logits, labels, lse, ignore_index)
        return logits if slopes is None else logits.mul_(slopes)

    def _slopes(self, logits: Tensor) -> Tensor | float | None:
        """Of the logits by what the product gives; None: 1."""
        if self.softcap:
            return (logits / self.softcap).square_().neg_().add_(1).mul_(self.logit_scale)
        return None if self.logit_scale == 1 else self.logit_scale

    def token_logps_and_unit_gradient(
        self, kernels: KernelBackend, logits: Tensor, labels: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """token_logps (n,) and lse (n, 2) of a chunk whose labels all count, and whose logits become G.

        On a CPU a few rows at a time, so that the second reading is from the cache. On a GPU the whole chunk, which is
        read from memory twice: docs/kernels/linear.md has the arithmetic.
        """
        num_rows = rows = logits.shape[0]
        if logits.device.type == "cpu":
            rows = max(1, CACHED_BYTES // (logits.shape[1] * logits.itemsize))
        token_logps, lse = new_token_outputs(logits, labels)
        of_some = getattr(kernels, "token_logps_and_unit_gradient", None)
        of_some = of_some or functools.partial(_one_after_other, kernels)
        for begin in range(0, num_rows, rows):
            some = slice(begin, begin + rows)
            slopes = self._slopes(logits[some])
            token_logps[some], lse[some] = of_some(logits[some], labels[some], ignore_index)
            if slopes is not None:
                logits[some].mul_(slopes)
        return token_logps, lse


def _one_after_other(
    kernels: KernelBackend, logits: Tensor, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """`UnitGradientBackend.token_logps_and_unit_gradient` of a backend that has it not."""
    token_logps, lse = kernels.token_logps_forward(logits, labels, ignore_index)
    _to_gradient(kernels, logits, labels, lse, ignore_index)
    return token_logps, lse


def _to_gradient(kernels: KernelBackend, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> None:
    """onehot(label) - softmax(logits) over the logits."""
    ones = torch.ones((), dtype=accumulation_dtype(logits), device=logits.device).expand(labels.shape)
    kernels.token_logps_backward(ones, logits, labels, lse, ignore_index, logits)


def kept_shape(plan: LinearPlan, hidden: Tensor, weight: Tensor) -> tuple[int, ...]:
    if plan.name == "frozen":
        return tuple(hidden.shape)
    return (plan.kept_rows, weight.shape[0]) if plan.name == "keep" else (0, 0)


def linear_token_logps_forward(
    kernels: KernelBackend,
    hidden: Tensor,
    head: LinearHead,
    rows: Rows,
    plan: LinearPlan,
    metrics: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_logps, lse) as `KernelBackend.token_logps_forward` has them, of the logits that are never held whole.

    The third result is what the plan keeps, of `kept_shape`. ``metrics``: `new_metrics`, to be filled.
    """
    head = head.to(hidden.dtype)
    token_logps, lse = (x.zero_() for x in new_token_outputs(hidden, rows.labels))
    kept = on_huge_pages(hidden.new_empty(kept_shape(plan, hidden, head.weight)))
    states = kept.zero_() if plan.name == "frozen" else None
    buffer = _chunk_buffer(hidden, head, rows, plan)
    for begin, chunk, (block, block_labels, block_logps, block_lse, block_states, block_metrics) in _chunks(
        rows.ignore_index, plan.chunk_rows, hidden, rows.labels, token_logps, lse, states, metrics
    ):
        chunk_labels = block_labels[chunk]
        end = begin + chunk_labels.shape[0]
        keeps = plan.name == "keep" and end <= plan.kept_rows
        logits = head.logits(take(block, chunk), kept[begin:end] if keeps else buffer)
        if block_metrics is not None:  # before the gradient is written over the logits
            block_metrics[chunk] = metrics_of_chunk(logits, chunk_labels)
        arguments = (logits, chunk_labels, rows.ignore_index)
        if keeps or block_states is not None:
            block_logps[chunk], block_lse[chunk] = head.token_logps_and_unit_gradient(kernels, *arguments)
        else:
            block_logps[chunk], block_lse[chunk] = kernels.token_logps_forward(*arguments)
        if block_states is not None:
            block_states[chunk] = logits @ head.weight
    return token_logps, lse, kept


def linear_token_logps_backward(
    kernels: KernelBackend,
    dtoken_logps: Tensor,
    hidden: Tensor,
    head: LinearHead,
    rows: Rows,
    lse: Tensor,
    plan: LinearPlan,
    kept: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), contiguous; None where ``plan.needs_grad`` says that nobody asks for it.

    ``kept`` is what the forward's third result was; it has no rows where the plan keeps nothing.
    """
    if plan.name == "frozen":
        d = dtoken_logps.masked_fill(~rows.counted, 0)  # which NaN would not be
        of_rows = scaled(kept.flatten(0, -2), d.reshape(-1, 1), hidden.dtype)
        return of_rows.view(hidden.shape), None, None
    weight_dtype, head = head.weight.dtype, head.to(hidden.dtype)
    dhidden = on_huge_pages(hidden.new_empty(hidden.shape)).zero_() if plan.needs_grad[0] else None
    chunks = list(_chunks(rows.ignore_index, plan.chunk_rows, hidden, rows.labels, dtoken_logps, lse, dhidden))
    # A single chunk's product is the weight's gradient: there is nothing to sum up.
    is_sum = len(chunks) != 1 or weight_dtype != hidden.dtype
    dweight, dbias = gradient_sums(hidden, head.weight, plan, is_sum)
    buffer = _chunk_buffer(hidden, head, rows, plan)
    for begin, chunk, (block, block_labels, block_dlogps, block_lse, block_dhidden) in chunks:
        chunk_hidden, chunk_labels, d = take(block, chunk), block_labels[chunk], block_dlogps[chunk].unsqueeze(1)
        end = begin + chunk_labels.shape[0]
        if end <= plan.kept_rows:
            unit = kept[begin:end]
        else:
            unit = head.logits(chunk_hidden, buffer)
            head.to_unit_gradient(kernels, unit, chunk_labels, block_lse[chunk], rows.ignore_index)
        if block_dhidden is not None:
            block_dhidden[chunk] = ((unit @ head.weight) * d).to(hidden.dtype)
        add_products(dweight, dbias, unit, chunk_hidden, d, is_sum)
    return (
        dhidden,
        None if dweight is None else dweight.to(weight_dtype),
        None if dbias is None else dbias.to(weight_dtype),
    )


def _chunk_buffer(hidden: Tensor, head: LinearHead, rows: Rows, plan: LinearPlan) -> Tensor:
    """(chunk_rows, V) for the logits of a chunk; no rows where all that counts is kept."""
    num_rows = plan.chunk_rows if plan.kept_rows < rows.labels.numel() else 0
    return on_huge_pages(hidden.new_empty(num_rows, head.weight.shape[0]))


def gradient_sums(
    hidden: Tensor, weight: Tensor, plan: LinearPlan, is_sum: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """Zeros for dweight and dbias. In bfloat16 their error would grow with the number of chunks.

    Where the weight's is no sum, it is as yet not filled, and in the dtype of hidden.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else plan.accumulate_dtype
    dweight = None
    if plan.needs_grad[1]:
        dweight = on_huge_pages(hidden.new_empty(weight.shape, dtype=dtype if is_sum else hidden.dtype))
        if is_sum:
            dweight.zero_()
    dbias = hidden.new_zeros(weight.shape[:1], dtype=dtype) if plan.needs_grad[2] else None
    return dweight, dbias


def scaled(rows: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """rows * factors in ``dtype``, factors () or (n, 1), with no temporary of their size."""
    out = on_huge_pages(torch.empty(rows.shape, dtype=dtype, device=rows.device))
    if rows.is_cuda or torch.result_type(rows, factors) == dtype:
        return torch.mul(rows, factors, out=out)
    of_some = factors.split(ROWS_AT_ONCE) if factors.dim() else itertools.repeat(factors)
    for some, of_rows, of_factors in zip(out.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), of_some, strict=False):
        some.copy_(of_rows * of_factors)  # several times as fast on a CPU as a product of two dtypes
    return out


# Of a product that is added to wider sums on a CPU: as much as a thread's cache holds, and what a product does at once.
WIDENED_ELEMENTS, PRODUCT_ELEMENTS = 1 << 17, 1 << 22


def add_products(
    dweight: Tensor | None, dbias: Tensor | None, unit: Tensor, chunk_hidden: Tensor, d: Tensor, is_sum: bool = True
) -> None:
    """dweight += G^T (d hidden), or = where it is no sum, and dbias += G^T d of a chunk; d (n, 1)."""
    if dbias is not None:
        dbias += (unit * d).sum(0, dtype=dbias.dtype)
    if dweight is None:
        return
    scaled_hidden = (chunk_hidden * d).to(chunk_hidden.dtype)
    if not is_sum:
        torch.mm(unit.t(), scaled_hidden, out=dweight)
    elif dweight.dtype == scaled_hidden.dtype:
        dweight.addmm_(unit.t(), scaled_hidden)
    elif not dweight.is_cuda:
        _add_widened(dweight, unit.t(), scaled_hidden)
    elif dweight.dtype != torch.float32:  # the library's products come in their own dtype or in float32
        dweight += unit.t() @ scaled_hidden
    elif _adds_in_product(unit.dtype):
        torch.addmm(dweight, unit.t(), scaled_hidden, out_dtype=torch.float32, out=dweight)
    else:  # the library adds up in float32 anyway: do not round what it found
        dweight += torch.mm(unit.t(), scaled_hidden, out_dtype=torch.float32)


def _add_widened(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left @ right, of a narrower dtype, with no temporary of their size: some rows of the sums at a time."""
    rows = max(1, PRODUCT_ELEMENTS // sums.shape[1])
    product = right.new_empty(min(rows, sums.shape[0]), sums.shape[1])
    few = max(1, WIDENED_ELEMENTS // sums.shape[1])
    wide = sums.new_empty(min(few, product.shape[0]), sums.shape[1])
    for begin in range(0, sums.shape[0], rows):
        part = sums[begin : begin + rows]
        found = torch.mm(left[begin : begin + rows], right, out=product[: part.shape[0]])
        # copy_ widens several times as fast as an addition of two dtypes.
        for some, of_product in zip(part.split(few), found.split(few), strict=True):
            some.add_(wide[: some.shape[0]].copy_(of_product))


@functools.cache
def _adds_in_product(dtype: torch.dtype) -> bool:
    """Whether this PyTorch's product adds to float32 sums; some versions ask for one dtype of all."""
    ones = torch.ones(16, 16, dtype=dtype, device="cuda")
    sums = torch.zeros(16, 16, device="cuda")
    try:
        torch.addmm(sums, ones, ones, out_dtype=torch.float32, out=sums)
    except RuntimeError:
        return False
    return True


def _chunks(
    ignore_index: int, rows_at_most: int, rows: Tensor, labels: Tensor, *others: Tensor | None
) -> Iterator[tuple[int, RowIndex, tuple]]:
    """(counted tokens before it, its rows, the block and its companions) for each chunk, always in this order."""
    begin = 0
    for block, block_labels, *companions in blocks(rows, labels, *others):
        for chunk in counted_chunks(block_labels, ignore_index, rows_at_most):
            yield begin, chunk, (block, block_labels, *companions)
            begin += block_labels[chunk].shape[0]
