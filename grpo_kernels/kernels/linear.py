"""The linear path of every backend: chunks of counted tokens, logits of a chunk only, the backend's row kernels between
the matrix products.

    logits = hidden weight^T + bias         dhidden = dlogits weight         dweight = dlogits^T hidden

Ignored tokens are dropped before the first product. The backward computes each chunk's logits again: four products.
Finding the counted tokens reads the labels back: on a GPU it synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_kernels.kernels.contract import KernelBackend
from grpo_kernels.kernels.rows import accumulation_dtype, blocks, counted_chunks, take

# Logits of a chunk: 32 MiB in float32, enough rows to keep the matrix products efficient.
CHUNK_ELEMENTS = 1 << 23


def linear_token_logps_forward(
    kernels: KernelBackend, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """(token_logps, lse) as `KernelBackend.token_logps_forward` has them, of the logits that are never held whole."""
    token_logps = torch.zeros(labels.shape, dtype=accumulation_dtype(hidden), device=hidden.device)
    lse = torch.zeros(*labels.shape, 2, dtype=token_logps.dtype, device=hidden.device)
    buffer = _chunk_buffer(hidden, weight)
    for block, block_labels, block_logps, block_lse in blocks(hidden, labels, token_logps, lse):
        for rows in counted_chunks(block_labels, ignore_index, buffer.shape[0]):
            logits = _logits_of(take(block, rows), weight, bias, buffer)
            block_logps[rows], block_lse[rows] = kernels.token_logps_forward(logits, block_labels[rows], ignore_index)
    return token_logps, lse


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden, dweight, dbias), None where ``needs_grad`` says that nobody asks for it."""
    dtype = accumulation_dtype(hidden)
    dhidden = torch.zeros_like(hidden) if needs_grad[0] else None
    # Summed over chunks in the accumulation dtype: in bfloat16 the error would grow with their number.
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_grad[1] else None
    dbias = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device) if needs_grad[2] else None
    buffer = _chunk_buffer(hidden, weight)
    for block, block_labels, block_dlogps, block_lse, block_dhidden in blocks(
        hidden, labels, dtoken_logps, lse, dhidden
    ):
        for rows in counted_chunks(block_labels, ignore_index, buffer.shape[0]):
            chunk_hidden = take(block, rows)
            logits = _logits_of(chunk_hidden, weight, bias, buffer)
            chunk_labels, chunk_lse = block_labels[rows], block_lse[rows]
            kernels.token_logps_backward(block_dlogps[rows], logits, chunk_labels, chunk_lse, ignore_index, logits)
            dlogits = logits  # written over them
            if dbias is not None:
                dbias += dlogits.sum(0, dtype=dtype)
            if block_dhidden is not None:
                block_dhidden[rows] = dlogits @ weight
            if dweight is not None:
                if dweight.dtype == hidden.dtype:
                    dweight.addmm_(dlogits.t(), chunk_hidden)
                else:
                    dweight += dlogits.t() @ chunk_hidden
    return (
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None else dbias.to(weight.dtype),
    )


def _logits_of(chunk_hidden: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    logits = torch.mm(chunk_hidden, weight.t(), out=buffer[: chunk_hidden.shape[0]])
    return logits if bias is None else logits.add_(bias)


def _chunk_buffer(hidden: Tensor, weight: Tensor) -> Tensor:
    rows = max(1, min(hidden.shape[:-1].numel(), CHUNK_ELEMENTS // weight.shape[0]))
    return hidden.new_empty(rows, weight.shape[0])
