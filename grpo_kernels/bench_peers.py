"""Plain DPO from hidden states and the head's weight, as others and we compute it: one adapter each.

An adapter is `(hidden (2B, T, D), weight (V, D), labels (2B, T), reference) -> loss`: sum over counted tokens and mean
over pairs, so that all compute the same. The reference policy is None, or its (hidden, weight), whose log-probabilities
the adapter computes, too. Each has the settings that its documentation recommends, or says why it cannot run.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels import dispatch
from grpo_kernels.functional import MAX_EXTRA_BYTES
from grpo_kernels.group_weights import GroupWeights
from grpo_kernels.losses import LinearGroupRobustLoss

BETA = 0.1
Reference = tuple[Tensor, Tensor] | None
Operation = Callable[..., Tensor]  # (hidden, weight, labels, reference) -> loss
LogpsOf = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """``why_not(device)`` is None where it can run; ``computes`` says what else than DPO it is able to give."""

    name: str
    computes: str
    why_not: Callable[[str], str | None]
    build: Callable[[], Operation]
    adapts: bool = False  # compiles or tunes itself at the first call with new shapes


def dpo(logps_of: LogpsOf) -> Operation:
    """From (hidden, weight, labels) -> (2B,) log-probabilities."""

    def operation(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Reference = None) -> Tensor:
        ratios = logps_of(hidden, weight, labels)
        if reference is not None:
            with torch.no_grad():
                ref_logps = logps_of(*reference, labels)
            ratios = ratios - ref_logps
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()

    return operation


@dpo
def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Unfused: whole logits, float32 log-softmax."""
    counted = labels != -100
    log_softmax = F.linear(hidden, weight).float().log_softmax(-1)
    logps = log_softmax.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * counted).sum(-1)


def _linear_cross_entropy() -> Operation:
    options = torch.nn.LinearCrossEntropyOptions()  # chunked, chosen by PyTorch for device and dtype

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), reduction="none", ignore_index=-100, options=options
        )
        return -losses.view(labels.shape).float().sum(-1)

    return dpo(logps_of)


def _liger_dpo(chunk_size: int = 1) -> Operation:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    options = {"beta": BETA, "compute_nll_loss": False, "chunk_size": chunk_size}

    def operation(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Reference = None) -> Tensor:
        loss_fn = LigerFusedLinearDPOLoss(use_ref_model=reference is not None, **options)
        if reference is None:
            return loss_fn(weight, hidden, labels)[0]
        return loss_fn(weight, hidden, labels, ref_input=reference[0], ref_weight=reference[1])[0]

    return operation


def _liger_dpo_best() -> Operation:
    """The fastest of several chunk sizes, found at the first call with a batch's shape. Its gradients come forward."""
    best: dict[torch.Size, Operation] = {}

    def seconds(operation: Operation, inputs: tuple[Any, ...]) -> float:
        operation(*inputs)  # compiles
        began = time.perf_counter()
        operation(*inputs).item()
        return time.perf_counter() - began

    def operation(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Reference = None) -> Tensor:
        inputs = (hidden, weight, labels, reference)
        if labels.shape not in best:
            candidates = [_liger_dpo(size) for size in (1, 2, 4, 8) if size <= labels.shape[0] // 2]
            best[labels.shape] = min(candidates, key=lambda one: seconds(one, inputs))
        return best[labels.shape](*inputs)

    return operation


def _flash_linear_attention() -> Operation:
    from fla.modules import FusedLinearCrossEntropyLoss

    loss_fn = FusedLinearCrossEntropyLoss(reduction="sum")  # it gives a sum only, so one call for each sequence

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([-loss_fn(h, y, weight) for h, y in zip(hidden, labels, strict=True)])

    return dpo(logps_of)


def _trl() -> Operation:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Only counted positions, as TRL does on GPUs; elsewhere it scores all of them.
        counted = labels != -100
        arguments = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        logps = _ChunkedLogProbFunction.apply(hidden[counted], weight, None, labels[counted], *arguments)[0]
        return torch.zeros_like(labels, dtype=logps.dtype).masked_scatter(counted, logps).sum(-1)

    return dpo(logps_of)


def _cut_cross_entropy() -> Operation:
    from cut_cross_entropy import linear_cross_entropy

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce_kahan_full_c")
        return -losses.float().sum(-1)

    return dpo(logps_of)


def _ours(backend: str, max_extra_bytes: int) -> Operation:
    # Two groups whose weights move, but by nothing: the whole method's work, and plain DPO's result.
    weights = GroupWeights(group_sizes=[1, 1], step_size=1e-9)
    options: dict[str, Any] = {"beta": BETA, "backend": backend, "max_extra_bytes": max_extra_bytes}

    def operation(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Reference = None) -> Tensor:
        weights.to(hidden.device)
        group_ids = torch.arange(labels.shape[0] // 2, device=labels.device) % 2
        loss_fn = LinearGroupRobustLoss(weights, reference_free=reference is None, **options)
        ref_hidden, ref_weight = (None, None) if reference is None else reference
        return loss_fn(hidden, weight, labels, group_ids, ref_hidden=ref_hidden, ref_weight=ref_weight).loss

    return operation


def _always(device: str) -> None:
    return None


def _needs(package: str, gpu: bool = False) -> Callable[[str], str | None]:
    def why_not(device: str) -> str | None:
        if gpu and device != "cuda":
            return "its kernels run on NVIDIA GPUs only"
        return None if importlib.util.find_spec(package) else f"{package} is not installed"

    return why_not


def _needs_linear_cross_entropy(device: str) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"PyTorch {torch.__version__} has none; 2.13 has"


def _backend(name: str) -> Callable[[str], str | None]:
    def why_not(device: str) -> str | None:
        reasons = dispatch.backends().get(name, ["no such backend"])
        if reasons:
            return "; ".join(reasons)
        entry = dispatch.entry_of(name)
        request = dispatch.Request("hidden", (), torch.float32, torch.device(device))
        if name == "triton" and device == "cpu":
            return "on a CPU it only runs in Triton's interpreter"
        return "; ".join(entry.cannot_run(request)) or None

    return why_not


PEERS = (
    Peer("eager", "anything", _always, lambda: eager),
    Peer("torch.compile", "anything", _always, lambda: torch.compile(eager), adapts=True),
    Peer("torch linear_cross_entropy", "token losses", _needs_linear_cross_entropy, _linear_cross_entropy),
    Peer("Liger DPO", "reference, metrics", _needs("liger_kernel"), _liger_dpo),
    Peer("Liger DPO, best chunk", "reference, metrics", _needs("liger_kernel"), _liger_dpo_best, adapts=True),
    Peer("TRL log-prob", "token log-probs, entropy", _needs("trl"), _trl),
    Peer("Cut Cross-Entropy", "token losses", _needs("cut_cross_entropy", gpu=True), _cut_cross_entropy),
    Peer("flash-linear-attention", "mean loss", _needs("fla", gpu=True), _flash_linear_attention),
    *(
        Peer(f"{backend}{suffix}", "groups, alpha, metrics", _backend(backend), partial(_ours, backend, kept))
        for backend in ("torch", "cpp", "triton", "cuda")
        for suffix, kept in (("", MAX_EXTRA_BYTES), (", 12 MiB", 12 << 20))
    ),
)
