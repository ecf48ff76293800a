"""Plain DPO from hidden states and the head's weight, forward and backward, as others and we compute it.

An adapter is `(hidden (2B, T, D), weight (V, D), labels (2B, T), reference) -> loss`: sum over counted tokens and mean
over pairs, so that all compute the same. The reference policy is None, or its (hidden, weight), whose log-probabilities
the adapter computes, too. Each has the settings that its documentation recommends, or says why it cannot run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels.bench.cases import LinearCase
from grpo_kernels.bench.suite import Contender, Operation, Suite, always, needs, needs_backend
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.losses import LinearGroupRobustLoss

BETA = 0.1
Reference = tuple[Tensor, Tensor] | None
LogpsOf = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs_of(case: LinearCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Reference]:
    """(hidden, weight, labels, reference), the first two requiring gradients."""
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.num_sequences, case.length), getattr(torch, case.dtype)

    def normal(*size: int, deviation: float) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(0, deviation, generator=generator)

    def states_and_head() -> tuple[Tensor, Tensor]:
        width = case.hidden_size
        return normal(*shape, width, deviation=1), normal(case.vocab_size, width, deviation=width**-0.5)

    hidden, weight = (x.requires_grad_() for x in states_and_head())
    labels = torch.randint(0, case.vocab_size, shape, device=device, generator=generator)
    labels[:, : int(case.length * case.ignored)] = -100
    return hidden, weight, labels, states_and_head() if case.reference else None


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


def _linear_cross_entropy(case: LinearCase) -> Operation:
    options = torch.nn.LinearCrossEntropyOptions()  # chunked, chosen by PyTorch for device and dtype

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = F.linear_cross_entropy(
            hidden.flatten(0, 1), weight, labels.flatten(), reduction="none", ignore_index=-100, options=options
        )
        return -losses.view(labels.shape).float().sum(-1)

    return dpo(logps_of)


def _liger_dpo(case: LinearCase, chunk_size: int = 1) -> Operation:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    options = {"beta": BETA, "compute_nll_loss": False, "chunk_size": chunk_size}

    def operation(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Reference = None) -> Tensor:
        loss_fn = LigerFusedLinearDPOLoss(use_ref_model=reference is not None, **options)
        if reference is None:
            return loss_fn(weight, hidden, labels)[0]
        return loss_fn(weight, hidden, labels, ref_input=reference[0], ref_weight=reference[1])[0]

    return operation


def _liger_dpo_best(case: LinearCase) -> Operation:
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
            candidates = [_liger_dpo(case, size) for size in (1, 2, 4, 8) if size <= labels.shape[0] // 2]
            best[labels.shape] = min(candidates, key=lambda one: seconds(one, inputs))
        return best[labels.shape](*inputs)

    return operation


def _liger_cross_entropy(case: LinearCase) -> Operation:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # For single tokens' losses it computes the logits again backward; sums are accumulated in float32.
    loss_fn = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = loss_fn(weight, hidden.flatten(0, 1), labels.flatten())
        return -losses.view(labels.shape).float().sum(-1)

    return dpo(logps_of)


def _flash_linear_attention(case: LinearCase) -> Operation:
    from fla.modules import FusedLinearCrossEntropyLoss

    loss_fn = FusedLinearCrossEntropyLoss(reduction="sum")  # it gives a sum only, so one call for each sequence

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([-loss_fn(h, y, weight) for h, y in zip(hidden, labels, strict=True)])

    return dpo(logps_of)


def _trl(case: LinearCase) -> Operation:
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # Only counted positions, as TRL does on GPUs; elsewhere it scores all of them.
        counted = labels != -100
        arguments = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
        logps = _ChunkedLogProbFunction.apply(hidden[counted], weight, None, labels[counted], *arguments)[0]
        return torch.zeros_like(labels, dtype=logps.dtype).masked_scatter(counted, logps).sum(-1)

    return dpo(logps_of)


def _cut_cross_entropy(case: LinearCase) -> Operation:
    from cut_cross_entropy import linear_cross_entropy

    def logps_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", impl="cce_kahan_full_c")
        return -losses.float().sum(-1)

    return dpo(logps_of)


@cache
def _group_ids(num_pairs: int, num_groups: int, device: torch.device) -> Tensor:
    return torch.arange(num_pairs, device=device) % num_groups


def _ours(backend: str, max_extra_bytes: int | str, case: LinearCase) -> Operation:
    # Groups whose weights move, but by nothing (L_g grows with K): the whole method's work, and plain DPO's result.
    weights = GroupWeights(group_sizes=[1] * case.num_groups, step_size=1e-9 / case.num_groups)
    options: dict[str, Any] = {"beta": BETA, "backend": backend, "max_extra_bytes": max_extra_bytes}
    loss_fn = LinearGroupRobustLoss(weights, reference_free=not case.reference, **options)

    def operation(hidden: Tensor, weight: Tensor, labels: Tensor, reference: Reference = None) -> Tensor:
        if weights.log_alpha.device != hidden.device:  # at the first call
            weights.to(hidden.device)
        group_ids = _group_ids(labels.shape[0] // 2, case.num_groups, labels.device)
        ref_hidden, ref_weight = (None, None) if reference is None else reference
        return loss_fn(hidden, weight, labels, group_ids, ref_hidden=ref_hidden, ref_weight=ref_weight).loss

    return operation


@dpo
def _textbook(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    picked = (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * (labels != -100)).sum(-1)


def _bare_products(case: LinearCase, inputs: tuple[Any, ...]) -> Callable[[], object]:
    """The matrix products that any of them must do at least, over the counted tokens."""
    hidden, weight = inputs[0].detach()[inputs[2] != -100], inputs[1].detach()
    logits = hidden.new_empty(case.counted, case.vocab_size)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if inputs[3] is not None:
            torch.mm(hidden, inputs[3][1].t(), out=logits)
        torch.mm(logits, weight, out=dhidden)
        torch.mm(logits.t(), hidden, out=dweight)

    return products


def _needs_linear_cross_entropy(device: str) -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"PyTorch {torch.__version__} has none; 2.13 has"


SUITE = Suite(
    op="DPO from hidden states, forward + backward",
    contenders=(
        Contender("eager", "anything", always, lambda case: eager),
        Contender("torch.compile", "anything", always, lambda case: torch.compile(eager), adapts=True),
        Contender("torch linear_cross_entropy", "token losses", _needs_linear_cross_entropy, _linear_cross_entropy),
        Contender("Liger DPO", "reference, metrics", needs("liger_kernel"), _liger_dpo),
        Contender("Liger DPO, best chunk", "reference, metrics", needs("liger_kernel"), _liger_dpo_best, adapts=True),
        Contender("Liger cross-entropy", "token losses", needs("liger_kernel", gpu=True), _liger_cross_entropy),
        Contender("TRL log-prob", "token log-probs, entropy", needs("trl"), _trl),
        Contender("Cut Cross-Entropy", "token losses", needs("cut_cross_entropy", gpu=True), _cut_cross_entropy),
        Contender("flash-linear-attention", "mean loss", needs("fla", gpu=True), _flash_linear_attention),
        *(
            Contender(
                f"{backend}{suffix}", "groups, alpha, metrics", needs_backend(backend, "hidden"),
                partial(_ours, backend, kept), ours=True,
            )
            for backend in ("torch", "cpp", "triton", "cuda")
            for suffix, kept in (("", "auto"), (", 12 MiB", 12 << 20))
        ),
    ),
    inputs_of=inputs_of,
    exact=lambda case: _textbook,
    yardstick=_bare_products,
)  # fmt: skip
