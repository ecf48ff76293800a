"""The `cpp` backend: csrc's row kernels for the CPU, vectorised and threaded, bound as grpo_kernels._C.

    token_logp = logit[label] - logsumexp(logit)        dlogit = dtoken_logp * (onehot(label) - softmax(logit))

The forward reads V, the backward reads V and writes V; rows whose label is ignored are not read. Extra memory: none.
Each row is computed whole by one thread, so the number of threads changes no bit of a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grpo_kernels import _C
from grpo_kernels.kernels.rows import DTYPE_NAMES, accumulation_dtype, new_token_outputs, row_strides_of, strides_of

INSTRUCTION_SET = _C.instruction_sets()[0]
"""The best that this machine can run. Tests set the others."""


def token_logps_forward(
    logits: Tensor, labels: Tensor, ignore_index: int, num_threads: int | None = None
) -> tuple[Tensor, Tensor]:
    """The contract's function. ``num_threads``: PyTorch's where None."""
    return _forward(_C.token_logps_forward, logits, labels, ignore_index, num_threads)


def token_logps_and_unit_gradient(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The contract's function: a row is read from memory once."""
    return _forward(_C.token_logps_and_unit_gradient, logits, labels, ignore_index, None)


def _forward(
    function: Callable[..., None], logits: Tensor, labels: Tensor, ignore_index: int, num_threads: int | None
) -> tuple[Tensor, Tensor]:
    shape = _checked(logits, labels)
    token_logps, lse = new_token_outputs(logits, labels)
    function(
        INSTRUCTION_SET,
        DTYPE_NAMES[logits.dtype],
        shape,
        logits.data_ptr(),
        strides_of(logits),
        labels.data_ptr(),
        labels.itemsize,
        row_strides_of(labels),
        ignore_index,
        token_logps.data_ptr(),
        lse.data_ptr(),
        num_threads or torch.get_num_threads(),
    )
    return token_logps, lse


def token_logps_backward(
    dtoken_logps: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    out: Tensor,
    num_threads: int | None = None,
) -> None:
    """The contract's function. ``num_threads``: PyTorch's where None."""
    shape = _checked(logits, labels)
    for name, tensor, wanted, dtype in (
        ("dtoken_logps", dtoken_logps, labels.shape, accumulation_dtype(logits)),
        ("lse", lse, (*labels.shape, 2), accumulation_dtype(logits)),
        ("out", out, logits.shape, logits.dtype),
    ):
        if tensor.shape != wanted or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {tuple(wanted)} {dtype} on the CPU, "
                f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            )
    lse = lse.contiguous()
    _C.token_logps_backward(
        INSTRUCTION_SET,
        DTYPE_NAMES[logits.dtype],
        shape,
        dtoken_logps.data_ptr(),
        row_strides_of(dtoken_logps),
        logits.data_ptr(),
        strides_of(logits),
        labels.data_ptr(),
        labels.itemsize,
        row_strides_of(labels),
        lse.data_ptr(),
        ignore_index,
        out.data_ptr(),
        strides_of(out),
        num_threads or torch.get_num_threads(),
    )


def _checked(logits: Tensor, labels: Tensor) -> tuple[int, int, int]:
    """(sequences, positions, V). Packed rows are one sequence."""
    if logits.dim() not in (2, 3):
        raise ValueError(f"logits must have shape (S, T, V) or (N, V), got {tuple(logits.shape)}")
    if logits.dtype not in DTYPE_NAMES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:-1])}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    for name, tensor in (("logits", logits), ("labels", labels)):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, got {tensor.device}")
    sequences = 1 if logits.dim() == 2 else logits.shape[0]
    return sequences, logits.shape[-2], logits.shape[-1]
