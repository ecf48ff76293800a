"""What row kernels give, and walking over rows: flat views without copies, and chunks of the rows that count."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels.validation import LOGITS_DTYPES

RowIndex = slice | Tensor
DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in LOGITS_DTYPES}
"""What the extension calls the dtypes of logits."""


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def new_token_outputs(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """token_logps (...) and lse (..., 2) of logits or hidden states, not filled yet."""
    token_logps = x.new_empty(labels.shape, dtype=accumulation_dtype(x))
    return token_logps, token_logps.new_empty((*labels.shape, 2))


def strides_of(logits: Tensor) -> tuple[int, int, int]:
    """(sequence, position, vocabulary) strides in elements; packed rows are one sequence."""
    return (0, *logits.stride()) if logits.dim() == 2 else logits.stride()  # type: ignore[return-value]


def row_strides_of(values: Tensor) -> tuple[int, int]:
    """(sequence, position) strides of a tensor with one number a row; 0 where it was expanded."""
    return (0, *values.stride()) if values.dim() == 1 else values.stride()  # type: ignore[return-value]


def empty_gradient(logits: Tensor) -> Tensor:
    """Not filled. With the strides of the logits its rows begin where theirs do between two 16-byte boundaries, so that
    both are reached 16 bytes at a time; logits[:, :-1] of an odd vocabulary is the case in point.

    Contiguous where those strides would overlap, or leave more memory unused than they use.
    """
    sizes = sorted(zip(logits.stride(), logits.shape, strict=True))
    used = 1
    for stride, size in sizes:
        if size > 1 and stride < used:
            return logits.new_empty(logits.shape)
        used += (size - 1) * stride
    if used > 2 * logits.numel():
        return logits.new_empty(logits.shape)
    return logits.new_empty_strided(logits.shape, logits.stride())


def blocks(rows: Tensor, *others: Tensor | None) -> Iterator[tuple]:
    """2-D views that together cover ``rows`` (..., W), with the matching pieces of the ``others``; copies nothing.

    One block where every tensor can be viewed flat; otherwise (a slice of each sequence, say) one for each sequence.
    """
    batch_dims = rows.dim() - 1
    tensors = (rows, *others)
    flat = [None if x is None else _flattened(x, batch_dims) for x in tensors]
    if all((x is None) == (y is None) for x, y in zip(tensors, flat, strict=True)):
        yield tuple(flat)
        return
    for s in range(rows.shape[0]):
        yield tuple(None if x is None else x[s] for x in tensors)


def _flattened(x: Tensor, batch_dims: int) -> Tensor | None:
    try:
        return x.view(x.shape[:batch_dims].numel(), *x.shape[batch_dims:])
    except RuntimeError:  # the strides allow no flat view
        return None


def counted_chunks(labels: Tensor, ignore_index: int, rows_per_chunk: int) -> Iterator[RowIndex]:
    """The rows (N,) whose label counts, at most ``rows_per_chunk`` at a time: a slice where they are neighbours."""
    counted = (labels != ignore_index).nonzero().squeeze(1)
    for rows in counted.split(rows_per_chunk):
        if rows.numel() == 0:
            return
        first, last = int(rows[0]), int(rows[-1])
        yield slice(first, last + 1) if last - first + 1 == rows.numel() else rows


def take(block: Tensor, rows: RowIndex) -> Tensor:
    return block[rows] if isinstance(rows, slice) else block.index_select(0, rows)
