"""The linear path of every backend: chunks of counted tokens, logits of a chunk only, the backend's row kernels between
the matrix products.

    logits = hidden weight^T + bias         G = onehot(label) - softmax(logits)         d = dtoken_logps
    dhidden = d (G weight)                  dweight = G^T (d hidden)                    dbias = G^T d

Ignored tokens are dropped before the first product. G does not depend on d, so the forward may already make it, in
place over a chunk's logits; `plan_of` says what it keeps for the backward:

    plan         what is kept                           products, forward + backward
    "none"       nothing (no gradients)                 1 + 0
    "frozen"     G weight, of hidden's size             2 + 0    weight and bias need no gradient (LoRA)
    "keep"       G of as many tokens as fit             1 + 2    for those tokens, 1 + 3 for the others
    "recompute"  nothing                                1 + 3

Finding the counted tokens reads the labels back: on a GPU it synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.rows import Rows, accumulation_dtype, blocks, counted_chunks, take

# Logits of a chunk: 32 MiB in float32, enough rows to keep the matrix products efficient.
CHUNK_ELEMENTS = 1 << 23
PLANS = ("none", "frozen", "keep", "recompute")


def plan_of(needs_grad: Sequence[bool], kept_rows: int) -> str:
    """The plan for which of (hidden, weight, bias) need gradients, and how many tokens' G may be kept."""
    if not any(needs_grad):
        return "none"
    if not (needs_grad[1] or needs_grad[2]):
        return "frozen"
    return "keep" if kept_rows else "recompute"


def kept_rows_of(num_rows: int, weight: Tensor, max_kept_bytes: int) -> int:
    """Tokens whose G fits: whole chunks, or all tokens. Known without reading the labels."""
    fitting = max_kept_bytes // (weight.shape[0] * weight.element_size())
    chunk = rows_a_chunk(num_rows, weight)
    return num_rows if fitting >= num_rows else fitting // chunk * chunk


def rows_a_chunk(num_rows: int, weight: Tensor) -> int:
    return max(1, min(num_rows, CHUNK_ELEMENTS // weight.shape[0]))


def kept_shape(plan: str, hidden: Tensor, weight: Tensor, kept_rows: int) -> tuple[int, ...]:
    if plan == "frozen":
        return tuple(hidden.shape)
    return (kept_rows, weight.shape[0]) if plan == "keep" else (0, 0)


def linear_token_logps_forward(
    kernels: KernelBackend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    plan: str = "none",
    kept_rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_logps, lse) as `KernelBackend.token_logps_forward` has them, of the logits that are never held whole.

    The third result is what the plan keeps, of `kept_shape`.
    """
    num_rows = labels.numel()
    token_logps = torch.zeros(labels.shape, dtype=accumulation_dtype(hidden), device=hidden.device)
    lse = torch.zeros(*labels.shape, 2, dtype=token_logps.dtype, device=hidden.device)
    kept = hidden.new_empty(kept_shape(plan, hidden, weight, kept_rows))
    states = kept.zero_() if plan == "frozen" else None
    buffer = hidden.new_empty(rows_a_chunk(num_rows, weight), weight.shape[0])
    for begin, rows, (block, block_labels, block_logps, block_lse, block_states) in _chunks(
        ignore_index, buffer.shape[0], hidden, labels, token_logps, lse, states
    ):
        chunk_labels = block_labels[rows]
        end = begin + chunk_labels.shape[0]
        keeps = plan == "keep" and end <= kept_rows
        logits = _logits_of(take(block, rows), weight, bias, kept[begin:end] if keeps else buffer)
        block_logps[rows], block_lse[rows] = kernels.token_logps_forward(logits, chunk_labels, ignore_index)
        if keeps or block_states is not None:
            _to_unit_gradient(kernels, logits, chunk_labels, block_lse[rows], ignore_index)
        if block_states is not None:
            block_states[rows] = logits @ weight
    return token_logps, lse, kept


def linear_token_logps_backward(
    kernels: KernelBackend,
    dtoken_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_grad: Sequence[bool],
    plan: str = "recompute",
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), None where ``needs_grad`` says that nobody asks for it."""
    dtype = accumulation_dtype(hidden)
    if plan == "frozen":
        assert kept is not None
        return (kept * dtoken_logps.unsqueeze(-1)).to(hidden.dtype), None, None
    kept_rows = kept.shape[0] if plan == "keep" and kept is not None else 0
    dhidden = torch.zeros_like(hidden) if needs_grad[0] else None
    # Summed over chunks in the accumulation dtype: in bfloat16 the error would grow with their number.
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_grad[1] else None
    dbias = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device) if needs_grad[2] else None
    chunk_rows = rows_a_chunk(labels.numel(), weight)
    buffer = hidden.new_empty(chunk_rows if kept_rows < labels.numel() else 0, weight.shape[0])
    for begin, rows, (block, block_labels, block_dlogps, block_lse, block_dhidden) in _chunks(
        ignore_index, chunk_rows, hidden, labels, dtoken_logps, lse, dhidden
    ):
        chunk_hidden, chunk_labels, d = take(block, rows), block_labels[rows], block_dlogps[rows].unsqueeze(1)
        end = begin + chunk_labels.shape[0]
        if kept is not None and end <= kept_rows:
            unit = kept[begin:end]
        else:
            unit = _logits_of(chunk_hidden, weight, bias, buffer)
            _to_unit_gradient(kernels, unit, chunk_labels, block_lse[rows], ignore_index)
        if block_dhidden is not None:
            block_dhidden[rows] = ((unit @ weight) * d).to(hidden.dtype)
        if dbias is not None:
            dbias += (unit * d).sum(0, dtype=dtype)
        if dweight is not None:
            scaled_hidden = (chunk_hidden * d).to(hidden.dtype)
            if dweight.dtype == hidden.dtype:
                dweight.addmm_(unit.t(), scaled_hidden)
            else:
                dweight += unit.t() @ scaled_hidden
    return (
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None else dbias.to(weight.dtype),
    )


def _chunks(
    ignore_index: int, rows_at_most: int, rows: Tensor, labels: Tensor, *others: Tensor | None
) -> Iterator[tuple[int, Rows, tuple]]:
    """(counted tokens before it, its rows, the block and its companions) for each chunk, always in this order."""
    begin = 0
    for block, block_labels, *companions in blocks(rows, labels, *others):
        for chunk in counted_chunks(block_labels, ignore_index, rows_at_most):
            yield begin, chunk, (block, block_labels, *companions)
            begin += block_labels[chunk].shape[0]


def _to_unit_gradient(kernels: KernelBackend, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int) -> None:
    """G of a chunk, over its logits."""
    ones = torch.ones((), dtype=accumulation_dtype(logits), device=logits.device).expand(labels.shape)
    kernels.token_logps_backward(ones, logits, labels, lse, ignore_index, logits)


def _logits_of(chunk_hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    logits = torch.mm(chunk_hidden, weight.t(), out=buffer[: chunk_hidden.shape[0]])
    return logits if bias is None else logits.add_(bias)
