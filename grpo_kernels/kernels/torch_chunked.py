"""The `torch` backend: plain PyTorch over chunks of rows, on any device.

    token_logp = logit[label] - logsumexp(logit)        dlogit = dtoken_logp * (onehot(label) - softmax(logit))

Logits path: the forward reads V once a row; the backward reads V and writes V. Extra memory is one chunk of float32
scratch. Softmax is computed again in the backward by PyTorch's fused row kernel, so the saved lse is not needed here.
Finding the counted rows reads the labels back: on a GPU this backend synchronises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# One float32 scratch chunk of 4 MiB: large enough to keep two threads busy, small enough to stay in the cache.
# Measured on 2 cores with 32 MiB of L3, V = 32000, where 16 to 128 rows (2 to 16 MiB) came out equal.
SCRATCH_ELEMENTS = 1 << 20
# The matrix products of the linear path want more rows: 32 MiB of float32 logits a chunk.
LINEAR_SCRATCH_ELEMENTS = 1 << 23

Rows = slice | Tensor


def token_logps_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(logits)
    token_logps = torch.zeros(labels.shape, dtype=dtype, device=logits.device)
    lse = torch.zeros_like(token_logps)
    scratch = _scratch(logits, SCRATCH_ELEMENTS, dtype)
    for block, block_labels, block_logps, block_lse in _blocks(logits, labels, token_logps, lse):
        for rows in _counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            chunk = _take(block, rows)
            block_logps[rows], block_lse[rows] = _logps_of_chunk(chunk, block_labels[rows], scratch)
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    scratch = _scratch(logits, SCRATCH_ELEMENTS, _accumulation_dtype(logits))
    for block, block_labels, block_scale, block_out in _blocks(logits, labels, dtoken_logps, out):
        _zero_ignored(block_out, block_labels, ignore_index)
        for rows in _counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            negative = _softmax_minus_onehot(_take(block, rows), block_labels[rows], scratch)
            scale = -block_scale[rows].unsqueeze(1)
            if isinstance(rows, slice):
                torch.mul(negative, scale, out=block_out[rows])
            else:
                block_out.index_copy_(0, rows, negative.mul_(scale).to(out.dtype))


def linear_token_logps_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    dtype = _accumulation_dtype(hidden)
    token_logps = torch.zeros(labels.shape, dtype=dtype, device=hidden.device)
    lse = torch.zeros_like(token_logps)
    logits, scratch = _linear_buffers(hidden, weight)
    for block, block_labels, block_logps, block_lse in _blocks(hidden, labels, token_logps, lse):
        for rows in _counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            chunk = _logits_of_chunk(_take(block, rows), weight, bias, logits)
            block_logps[rows], block_lse[rows] = _logps_of_chunk(chunk, block_labels[rows], scratch)
    return token_logps, lse


def linear_token_logps_backward(
    dtoken_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_grad: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dtype = _accumulation_dtype(hidden)
    dhidden = torch.zeros_like(hidden) if needs_grad[0] else None
    # Summed over chunks in the accumulation dtype: in bfloat16 the error would grow with their number.
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs_grad[1] else None
    dbias = torch.zeros(weight.shape[:1], dtype=dtype, device=weight.device) if needs_grad[2] else None
    logits, scratch = _linear_buffers(hidden, weight)
    for block, block_labels, block_scale, block_dhidden in _blocks(hidden, labels, dtoken_logps, dhidden):
        for rows in _counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            chunk_hidden = _take(block, rows)
            chunk = _logits_of_chunk(chunk_hidden, weight, bias, logits)
            dlogits = _softmax_minus_onehot(chunk, block_labels[rows], scratch)
            dlogits.mul_(-block_scale[rows].unsqueeze(1))
            if dbias is not None:
                dbias += dlogits.sum(0)
            factor = dlogits.to(hidden.dtype)
            if block_dhidden is not None:
                block_dhidden[rows] = factor @ weight
            if dweight is not None:
                if dweight.dtype == hidden.dtype:
                    dweight.addmm_(factor.t(), chunk_hidden)
                else:
                    dweight += factor.t() @ chunk_hidden
    return (
        dhidden,
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None else dbias.to(weight.dtype),
    )


def _logps_of_chunk(chunk: Tensor, labels: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """(token_logps, lse) of counted rows: chunk (n, V), labels (n,)."""
    labels, known = _clamped(labels, chunk.shape[1])
    log_softmax = torch.log_softmax(chunk, dim=1, dtype=scratch.dtype, out=scratch[: chunk.shape[0]])
    picked = log_softmax.gather(1, labels).squeeze(1)
    label_logits = chunk.gather(1, labels).squeeze(1).to(scratch.dtype)
    lse = label_logits - picked
    masked = label_logits.isneginf()
    if masked.any():  # -inf - (-inf) has lost the lse
        lse = torch.where(masked, torch.logsumexp(chunk.to(scratch.dtype), dim=1), lse)
    return picked.masked_fill_(~known, torch.nan), lse.masked_fill_(~known, torch.nan)


def _softmax_minus_onehot(chunk: Tensor, labels: Tensor, scratch: Tensor) -> Tensor:
    """(n, V) in the scratch: the gradient of -token_logp; NaN rows for labels outside the vocabulary."""
    labels, known = _clamped(labels, chunk.shape[1])
    softmax = torch.softmax(chunk, dim=1, dtype=scratch.dtype, out=scratch[: chunk.shape[0]])
    minus_one = torch.full((), -1.0, dtype=softmax.dtype, device=softmax.device).expand(labels.shape)
    softmax.scatter_add_(1, labels, minus_one)
    if not bool(known.all()):
        softmax[~known] = torch.nan
    return softmax


def _clamped(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels (n, 1) that are safe to index with, and which of them (n,) were in the vocabulary."""
    known = (labels >= 0) & (labels < vocab_size)
    return torch.where(known, labels, 0).long().unsqueeze(1), known


def _logits_of_chunk(chunk_hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    logits = torch.mm(chunk_hidden, weight.t(), out=out[: chunk_hidden.shape[0]])
    return logits if bias is None else logits.add_(bias)


def _linear_buffers(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, scratch): in the accumulation dtype one buffer serves both, softmax being written over its input."""
    num_rows, dtype = hidden.shape[:-1].numel(), _accumulation_dtype(hidden)
    rows = max(1, min(num_rows, LINEAR_SCRATCH_ELEMENTS // weight.shape[0]))
    logits = hidden.new_empty(rows, weight.shape[0])
    return logits, torch.empty_like(logits, dtype=dtype)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scratch(logits: Tensor, elements: int, dtype: torch.dtype) -> Tensor:
    num_rows, vocab_size = logits.shape[:-1].numel(), logits.shape[-1]
    rows = max(1, min(num_rows, elements // vocab_size))
    return torch.empty(rows, vocab_size, dtype=dtype, device=logits.device)


def _blocks(rows: Tensor, *others: Tensor | None) -> Iterator[tuple]:
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


def _counted_chunks(labels: Tensor, ignore_index: int, rows_per_chunk: int) -> Iterator[Rows]:
    """The rows (N,) whose label counts, at most ``rows_per_chunk`` at a time: a slice where they are neighbours."""
    counted = (labels != ignore_index).nonzero().squeeze(1)
    for rows in counted.split(rows_per_chunk):
        if rows.numel() == 0:
            return
        first, last = int(rows[0]), int(rows[-1])
        yield slice(first, last + 1) if last - first + 1 == rows.numel() else rows


def _take(block: Tensor, rows: Rows) -> Tensor:
    return block[rows] if isinstance(rows, slice) else block.index_select(0, rows)


def _zero_ignored(out: Tensor, labels: Tensor, ignore_index: int) -> None:
    ignored = (labels == ignore_index).nonzero().squeeze(1)
    if ignored.numel():
        out.index_fill_(0, ignored, 0)
