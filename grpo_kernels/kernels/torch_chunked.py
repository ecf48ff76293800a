"""The `torch` backend: plain PyTorch over chunks of rows, on any device.

    token_logp = logit[label] - logsumexp(logit)        dlogit = dtoken_logp * (onehot(label) - softmax(logit))

Logits path: the forward reads V once a row, the backward reads V and writes V; each pass is several operators over a
chunk that the cache holds. Extra memory is that chunk, in float32. lse is the maximum and the log of the rest.
Finding the counted rows reads the labels back: on a GPU this backend synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.kernels.memory import on_huge_pages
from grpo_kernels.kernels.rows import RowIndex, blocks, counted_chunks, new_token_outputs, take

# A float32 scratch chunk of 8 MiB: large enough to keep two threads busy and to lie on huge pages, small enough to stay
# in the cache. Measured on 2 threads for V = 8000 to 128,000: where all rows count 4 MiB is 3 to 10 % slower, 2 MiB up
# to 20 %; with prompts left out 4 MiB came out 15 % faster in place, else equal.
SCRATCH_ELEMENTS = 1 << 21


def token_logps_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    token_logps, lse = (x.zero_() for x in new_token_outputs(logits, labels))
    scratch = _scratch(logits, token_logps.dtype)
    for block, block_labels, block_logps, block_lse in blocks(logits, labels, token_logps, lse):
        for rows in counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            chunk = take(block, rows)
            room = _room_for(chunk, rows, scratch)
            block_logps[rows], block_lse[rows], *_ = _logps_of_chunk(chunk, block_labels[rows], room)
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    scratch = _scratch(logits, lse.dtype)
    for block, block_labels, block_lse, block_scale, block_out in blocks(logits, labels, lse, dtoken_logps, out):
        _zero_ignored(block_out, block_labels, ignore_index)
        for rows in counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            chunk, in_out = take(block, rows), isinstance(rows, slice) and out.dtype == lse.dtype
            maximum, rest = block_lse[rows].split(1, dim=1)
            exponentials = _exponentials(chunk, maximum, block_out[rows] if in_out else _room_for(chunk, rows, scratch))
            scale = block_scale[rows].unsqueeze(1)
            gradient = exponentials.mul_(scale * rest.neg().exp_().neg_())
            some_labels, known = _clamped(block_labels[rows], block.shape[1])
            gradient.scatter_add_(1, some_labels, scale.to(gradient.dtype))
            if not bool(known.all()):
                gradient[~known] = torch.nan
            if isinstance(rows, slice):
                block_out[rows].copy_(gradient)  # nothing where it is there already
            else:
                block_out.index_copy_(0, rows, gradient.to(out.dtype))


def token_logps_and_unit_gradient(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The contract's function: one exponential an entry; of 16-bit logits in a float32 scratch."""
    token_logps, lse = new_token_outputs(logits, labels)
    is_wide = logits.dtype == token_logps.dtype
    scratch = logits if is_wide else _scratch(logits, token_logps.dtype)
    for begin in range(0, logits.shape[0], max(1, scratch.shape[0])):
        rows = slice(begin, begin + scratch.shape[0])
        chunk = logits[rows]
        token_logps[rows], lse[rows], exponentials, total = _logps_of_chunk(chunk, labels[rows], scratch)
        unit = exponentials.mul_(total.reciprocal().neg_())
        some_labels, known = _clamped(labels[rows], chunk.shape[1])
        unit.scatter_add_(1, some_labels, torch.ones_like(total))
        if not bool(known.all()):
            unit[~known] = torch.nan
        if not is_wide:
            chunk.copy_(unit)
    return token_logps, lse


def _logps_of_chunk(chunk: Tensor, labels: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token_logps (n,) and lse (n, 2) of counted rows (n, V); exp(logit - maximum) in the scratch, and its sums (n, 1).

    The scratch may be the chunk.
    """
    labels, known = _clamped(labels, chunk.shape[1])
    maximum, label_logits = chunk.amax(1, keepdim=True).to(scratch.dtype), chunk.gather(1, labels).to(scratch.dtype)
    maximum.masked_fill_(maximum == -torch.inf, 0)  # a row of -inf has an lse of -inf
    exponentials = _exponentials(chunk, maximum, scratch)
    total = exponentials.sum(1, keepdim=True)
    lse = torch.cat([maximum, total.log()], dim=1)
    logps = label_logits.sub_(lse[:, :1]).sub_(lse[:, 1:]).squeeze(1)
    return logps.masked_fill_(~known, torch.nan), lse.masked_fill_(~known.unsqueeze(1), torch.nan), exponentials, total


def _room_for(chunk: Tensor, rows: RowIndex, scratch: Tensor) -> Tensor:
    """For a chunk's exponentials: the chunk, where `take` has copied it in their dtype, or the scratch."""
    is_copy = not isinstance(rows, slice)
    return chunk if is_copy and chunk.dtype == scratch.dtype else scratch


def _exponentials(chunk: Tensor, maximum: Tensor, scratch: Tensor) -> Tensor:
    """exp(logit - maximum) of (n, V), in the first rows of the scratch."""
    out = scratch[: chunk.shape[0]]
    if chunk.dtype == out.dtype:
        return torch.sub(chunk, maximum, out=out).exp_()
    return out.copy_(chunk).sub_(maximum).exp_()


def _clamped(labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Labels (n, 1) that are safe to index with, and which of them (n,) were in the vocabulary."""
    known = (labels >= 0) & (labels < vocab_size)
    return torch.where(known, labels, 0).long().unsqueeze(1), known


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    num_rows, vocab_size = logits.shape[:-1].numel(), logits.shape[-1]
    rows = max(1, min(num_rows, SCRATCH_ELEMENTS // vocab_size))
    return on_huge_pages(torch.empty(rows, vocab_size, dtype=dtype, device=logits.device))


def _zero_ignored(out: Tensor, labels: Tensor, ignore_index: int) -> None:
    ignored = (labels == ignore_index).nonzero().squeeze(1)
    if ignored.numel():
        out.index_fill_(0, ignored, 0)
