"""The `torch` backend: plain PyTorch over chunks of rows, on any device.

    token_logp = logit[label] - logsumexp(logit)        dlogit = dtoken_logp * (onehot(label) - softmax(logit))

Logits path: the forward reads V once a row; the backward reads V and writes V. Extra memory is one chunk of float32
scratch. Softmax is computed again in the backward by PyTorch's fused row kernel, so the saved lse is not needed here.
Finding the counted rows reads the labels back: on a GPU this backend synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.kernels.rows import accumulation_dtype, blocks, counted_chunks, new_token_outputs, take

# One float32 scratch chunk of 4 MiB: large enough to keep two threads busy, small enough to stay in the cache.
# Measured on 2 cores with 32 MiB of L3, V = 32000, where 16 to 128 rows (2 to 16 MiB) came out equal.
SCRATCH_ELEMENTS = 1 << 20


def token_logps_forward(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    token_logps, lse = (x.zero_() for x in new_token_outputs(logits, labels))
    scratch = _scratch(logits, token_logps.dtype)
    for block, block_labels, block_logps, block_lse in blocks(logits, labels, token_logps, lse):
        for rows in counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            chunk = take(block, rows)
            block_logps[rows], block_lse[rows] = _logps_of_chunk(chunk, block_labels[rows], scratch)
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
) -> None:
    scratch = _scratch(logits, accumulation_dtype(logits))
    for block, block_labels, block_scale, block_out in blocks(logits, labels, dtoken_logps, out):
        _zero_ignored(block_out, block_labels, ignore_index)
        for rows in counted_chunks(block_labels, ignore_index, scratch.shape[0]):
            negative = _softmax_minus_onehot(take(block, rows), block_labels[rows], scratch)
            scale = -block_scale[rows].unsqueeze(1)
            if isinstance(rows, slice):
                torch.mul(negative, scale, out=block_out[rows])
            else:
                block_out.index_copy_(0, rows, negative.mul_(scale).to(out.dtype))


def token_logps_and_unit_gradient(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The contract's function: one exponential an entry; of 16-bit logits in a float32 scratch."""
    token_logps, lse = new_token_outputs(logits, labels)
    is_wide = logits.dtype == token_logps.dtype
    scratch = logits if is_wide else _scratch(logits, token_logps.dtype)
    rows_at_once = max(1, scratch.shape[0])
    for begin in range(0, logits.shape[0], rows_at_once):
        rows = slice(begin, begin + rows_at_once)
        chunk = logits[rows]
        some_labels, known = _clamped(labels[rows], chunk.shape[1])
        wide = chunk if is_wide else scratch[: chunk.shape[0]].copy_(chunk)
        maximum, label_logits = wide.amax(1, keepdim=True), wide.gather(1, some_labels)
        exponentials = wide.sub_(maximum).exp_()
        total = exponentials.sum(1, keepdim=True)
        lse[rows] = torch.cat([maximum, total.log()], dim=1)
        token_logps[rows] = (label_logits - maximum - total.log()).squeeze(1)
        unit = exponentials.mul_(total.reciprocal().neg_())
        unit.scatter_add_(1, some_labels, torch.ones_like(total))
        if not bool(known.all()):
            unknown = ~known
            unit[unknown], token_logps[rows][unknown], lse[rows][unknown] = torch.nan, torch.nan, torch.nan
        if not is_wide:
            chunk.copy_(unit)
    return token_logps, lse


def _logps_of_chunk(chunk: Tensor, labels: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """token_logps (n,) and lse (n, 2) of counted rows: chunk (n, V), labels (n,)."""
    labels, known = _clamped(labels, chunk.shape[1])
    log_softmax = torch.log_softmax(chunk, dim=1, dtype=scratch.dtype, out=scratch[: chunk.shape[0]])
    picked = log_softmax.gather(1, labels).squeeze(1)
    label_logits = chunk.gather(1, labels).squeeze(1).to(scratch.dtype)
    lse = torch.stack([label_logits, -picked], dim=1)
    masked = label_logits.isneginf()
    if masked.any():  # -inf + inf has lost the lse
        lse[masked, 0] = torch.logsumexp(chunk[masked].to(scratch.dtype), dim=1)
        lse[masked, 1] = 0
    return picked.masked_fill_(~known, torch.nan), lse.masked_fill_(~known.unsqueeze(1), torch.nan)


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


def _scratch(logits: Tensor, dtype: torch.dtype) -> Tensor:
    num_rows, vocab_size = logits.shape[:-1].numel(), logits.shape[-1]
    rows = max(1, min(num_rows, SCRATCH_ELEMENTS // vocab_size))
    return torch.empty(rows, vocab_size, dtype=dtype, device=logits.device)


def _zero_ignored(out: Tensor, labels: Tensor, ignore_index: int) -> None:
    ignored = (labels == ignore_index).nonzero().squeeze(1)
    if ignored.numel():
        out.index_fill_(0, ignored, 0)
