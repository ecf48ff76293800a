"""What a row of logits says besides the log-probability of its label: for logs and for weights, without gradient.

    entropy = -sum_v p_v log p_v        mean logit = (1/V) sum_v z_v        log sum_v p_v^2        argmax_v z_v = label

Every backend takes them from here, in plain PyTorch over chunks of rows: on the linear path of a chunk's logits where
they lie, beside the backend's kernel; on the logits path by one more reading of the logits. They are for logs, and most
runs ask for none, so no kernel pays for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.kernels.rows import accumulation_dtype, blocks, counted_chunks, take

NUM_METRICS = 4
# Probabilities of some rows, twice: as for the `torch` backend's scratch.
SCRATCH_ELEMENTS = 1 << 20


def new_metrics(x: Tensor, labels: Tensor) -> Tensor:
    """(..., 4) of logits or hidden states: zeros, which is what ignored rows have."""
    return x.new_zeros((*labels.shape, NUM_METRICS), dtype=accumulation_dtype(x))


def token_metrics(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(..., 4) of logits (..., V)."""
    metrics = new_metrics(logits, labels)
    for block, block_labels, block_metrics in blocks(logits, labels, metrics):
        for rows in counted_chunks(block_labels, ignore_index, _rows_at_once(logits)):
            block_metrics[rows] = metrics_of_chunk(take(block, rows), block_labels[rows])
    return metrics


def metrics_of_chunk(logits: Tensor, labels: Tensor) -> Tensor:
    """(n, 4) of counted rows: logits (n, V), labels (n,). A label outside the vocabulary is no hit."""
    metrics = new_metrics(logits, labels)
    rows = _rows_at_once(logits)
    for part, of_part, out in zip(logits.split(rows), labels.split(rows), metrics.split(rows), strict=True):
        p = torch.softmax(part, dim=1, dtype=out.dtype)
        out[:, 0] = torch.special.entr(p).sum(1)  # 0 at p = 0, where p * log p would be NaN
        out[:, 1] = part.mean(1, dtype=out.dtype)
        out[:, 2] = p.square_().sum(1).log_()
        out[:, 3] = part.argmax(1) == of_part
    return metrics


def _rows_at_once(logits: Tensor) -> int:
    return max(1, SCRATCH_ELEMENTS // logits.shape[-1])
