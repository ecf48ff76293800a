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

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.rows import Rows, accumulation_dtype, blocks, counted_chunks, take


class LinearHead(NamedTuple):
    """weight (V, D), bias (V,), and what the model does to their logits; a softcap of 0 is none."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float = 1.0
    softcap: float = 0.0

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
        slopes = None
        if self.softcap:
            slopes = (logits / self.softcap).square_().neg_().add_(1).mul_(self.logit_scale)
        ones = torch.ones((), dtype=accumulation_dtype(logits), device=logits.device).expand(labels.shape)
        kernels.token_logps_backward(ones, logits, labels, lse, ignore_index, logits)
        if slopes is not None:
            logits.mul_(slopes)
        elif self.logit_scale != 1:
            logits.mul_(self.logit_scale)
        return logits


def kept_shape(plan: str, hidden: Tensor, weight: Tensor, kept_rows: int) -> tuple[int, ...]:
    if plan == "frozen":
        return tuple(hidden.shape)
    return (kept_rows, weight.shape[0]) if plan == "keep" else (0, 0)


def linear_token_logps_forward(
    kernels: KernelBackend,
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    ignore_index: int,
    chunk_rows: int,
    plan: str = "none",
    kept_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_logps, lse) as `KernelBackend.token_logps_forward` has them, of the logits that are never held whole.

    The third result is what the plan keeps, of `kept_shape`.
    """
    head = head.to(hidden.dtype)
    token_logps = torch.zeros(labels.shape, dtype=accumulation_dtype(hidden), device=hidden.device)
    lse = torch.zeros(*labels.shape, 2, dtype=token_logps.dtype, device=hidden.device)
    kept = hidden.new_empty(kept_shape(plan, hidden, head.weight, kept_rows))
    states = kept.zero_() if plan == "frozen" else None
    buffer = hidden.new_empty(chunk_rows if kept_rows < labels.numel() else 0, head.weight.shape[0])
    for begin, rows, (block, block_labels, block_logps, block_lse, block_states) in _chunks(
        ignore_index, chunk_rows, hidden, labels, token_logps, lse, states
    ):
        chunk_labels = block_labels[rows]
        end = begin + chunk_labels.shape[0]
        keeps = plan == "keep" and end <= kept_rows
        logits = head.logits(take(block, rows), kept[begin:end] if keeps else buffer)
        block_logps[rows], block_lse[rows] = kernels.token_logps_forward(logits, chunk_labels, ignore_index)
        if keeps or block_states is not None:
            head.to_unit_gradient(kernels, logits, chunk_labels, block_lse[rows], ignore_index)
        if block_states is not None:
            block_states[rows] = logits @ head.weight
    return token_logps, lse, kept


def linear_token_logps_backward(
    kernels: KernelBackend,
    dtoken_logps: Tensor,
    hidden: Tensor,
    head: LinearHead,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_grad: Sequence[bool],
    chunk_rows: int,
    accumulate_dtype: torch.dtype,
    plan: str = "recompute",
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), None where ``needs_grad`` says that nobody asks for it."""
    if plan == "frozen":
        assert kept is not None
        d = dtoken_logps.masked_fill(labels == ignore_index, 0)  # which NaN would not be
        return (kept * d.unsqueeze(-1)).to(hidden.dtype), None, None
    weight_dtype, head = head.weight.dtype, head.to(hidden.dtype)
    kept_rows = kept.shape[0] if plan == "keep" and kept is not None else 0
    dhidden = torch.zeros_like(hidden) if needs_grad[0] else None
    dweight, dbias = gradient_sums(head, needs_grad, accumulate_dtype)
    buffer = hidden.new_empty(chunk_rows if kept_rows < labels.numel() else 0, head.weight.shape[0])
    for begin, rows, (block, block_labels, block_dlogps, block_lse, block_dhidden) in _chunks(
        ignore_index, chunk_rows, hidden, labels, dtoken_logps, lse, dhidden
    ):
        chunk_hidden, chunk_labels, d = take(block, rows), block_labels[rows], block_dlogps[rows].unsqueeze(1)
        end = begin + chunk_labels.shape[0]
        if kept is not None and end <= kept_rows:
            unit = kept[begin:end]
        else:
            unit = head.logits(chunk_hidden, buffer)
            head.to_unit_gradient(kernels, unit, chunk_labels, block_lse[rows], ignore_index)
        if block_dhidden is not None:
            block_dhidden[rows] = ((unit @ head.weight) * d).to(hidden.dtype)
        add_products(dweight, dbias, unit, chunk_hidden, d)
    return (
        dhidden,
        None if dweight is None else dweight.to(weight_dtype),
        None if dbias is None else dbias.to(weight_dtype),
    )


def gradient_sums(
    head: LinearHead, needs_grad: Sequence[bool], accumulate_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Zeros for dweight and dbias. In bfloat16 their error would grow with the number of chunks."""
    weight = head.weight
    dtype = torch.float64 if weight.dtype == torch.float64 else accumulate_dtype
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_grad[1] else None
    dbias = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device) if needs_grad[2] else None
    return dweight, dbias


def add_products(dweight: Tensor | None, dbias: Tensor | None, unit: Tensor, chunk_hidden: Tensor, d: Tensor) -> None:
    """dweight += G^T (d hidden) and dbias += G^T d of a chunk; d (n, 1)."""
    if dbias is not None:
        dbias += (unit * d).sum(0, dtype=dbias.dtype)
    if dweight is None:
        return
    scaled_hidden = (chunk_hidden * d).to(chunk_hidden.dtype)
    if dweight.dtype == scaled_hidden.dtype:
        dweight.addmm_(unit.t(), scaled_hidden)
    elif dweight.is_cuda:  # the library adds up in float32 anyway: do not round what it found
        dweight += torch.mm(unit.t(), scaled_hidden, out_dtype=dweight.dtype)
    else:
        dweight += unit.t() @ scaled_hidden


def _chunks(
    ignore_index: int, rows_at_most: int, rows: Tensor, labels: Tensor, *others: Tensor | None
) -> Iterator[tuple[int, Rows, tuple]]:
    """(counted tokens before it, its rows, the block and its companions) for each chunk, always in this order."""
    begin = 0
    for block, block_labels, *companions in blocks(rows, labels, *others):
        for chunk in counted_chunks(block_labels, ignore_index, rows_at_most):
            yield begin, chunk, (block, block_labels, *companions)
            begin += block_labels[chunk].shape[0]
