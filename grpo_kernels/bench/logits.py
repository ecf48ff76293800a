"""GroupRobustLoss on logits, forward and backward, as we compute it and as others' token losses would."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo_kernels import reference
from grpo_kernels.bench.cases import Case
from grpo_kernels.bench.suite import Contender, Operation, Suite, always, needs, needs_backend
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.losses import GroupRobustLoss

BETA = 0.01
GROUP_SIZES = (700, 220, 80)


def group_sizes(case: Case) -> list[int]:
    """Of the data set: unequal, and one for each group."""
    return [GROUP_SIZES[g % 3] for g in range(case.num_groups)]


def inputs_of(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, labels, group_ids, ref_logps), the first requiring a gradient."""
    generator = torch.Generator(device).manual_seed(0)
    shape, dtype = (case.num_sequences, case.length), getattr(torch, case.dtype)
    logits = torch.empty(*shape, case.vocab_size, device=device, dtype=dtype).normal_(generator=generator)
    labels = torch.randint(0, case.vocab_size, shape, device=device, generator=generator)
    labels[:, : int(case.length * case.ignored)] = -100
    group_ids = torch.arange(case.num_sequences // 2, device=device) % case.num_groups
    return logits.requires_grad_(), labels, group_ids, torch.zeros(case.num_sequences, device=device)


def from_logps(logps_of: Callable[[Tensor, Tensor], Tensor], case: Case) -> Operation:
    """The group-robust loss at equal weights, in plain PyTorch behind somebody's (S,) log-probabilities."""

    sizes = torch.tensor(group_sizes(case))

    def operation(logits: Tensor, labels: Tensor, group_ids: Tensor, ref_logps: Tensor) -> Tensor:
        nonlocal sizes
        sizes = sizes.to(logits.device)  # at the first call
        margins = reference.margins(logps_of(logits, labels), ref_logps)
        losses = reference.pair_losses(margins, BETA, "sigmoid")
        return reference.group_losses(losses, group_ids, case.num_groups, sizes, "importance").mean()

    return operation


def exact(case: Case) -> Operation:
    return from_logps(lambda logits, labels: reference.sequence_logps(logits, labels, None, -100, False), case)


def _from_token_losses(token_losses_of: Callable[[Tensor, Tensor], Tensor], case: Case) -> Operation:
    """From ((N, V) logits, (N,) labels) -> (N,) losses."""

    def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
        return -token_losses_of(logits.flatten(0, 1), labels.flatten()).view(labels.shape).float().sum(-1)

    return from_logps(logps_of, case)


def _liger(case: Case) -> Operation:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return _from_token_losses(LigerCrossEntropyLoss(reduction="none"), case)


def _trl(case: Case) -> Operation:
    from trl.trainer.utils import selective_log_softmax

    def logps_of(logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels != -100
        # It skips uncounted rows on GPUs only.
        token_logps = selective_log_softmax(logits, labels.clamp(min=0), row_mask=counted)
        return (token_logps * counted).float().sum(-1)

    return from_logps(logps_of, case)


def _ours(backend: str, inplace_backward: bool, case: Case, compiled: bool = False) -> Operation:
    weights = GroupWeights(group_sizes=group_sizes(case), step_size=0.0)
    loss_fn: Callable = GroupRobustLoss(weights, beta=BETA, backend=backend, inplace_backward=inplace_backward)
    if compiled:
        loss_fn = torch.compile(loss_fn)

    def operation(logits: Tensor, labels: Tensor, group_ids: Tensor, ref_logps: Tensor) -> Tensor:
        if weights.log_alpha.device != logits.device:  # at the first call
            weights.to(logits.device)
        return loss_fn(logits, labels, group_ids, ref_logps=ref_logps).loss

    return operation


def _yardstick(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    logits = inputs[0].detach()
    return partial(logits.copy_, logits.clone())


ALL = "groups, alpha, metrics"
SUITE = Suite(
    op="GroupRobustLoss forward + backward",
    contenders=(
        Contender("reference", ALL, always, partial(_ours, "reference", False)),
        Contender("torch.compile", ALL, always, partial(_ours, "reference", False, compiled=True), adapts=True),
        Contender(
            "torch cross_entropy", "token losses", always,
            partial(_from_token_losses, partial(F.cross_entropy, reduction="none")),
        ),
        Contender("Liger cross-entropy", "token losses", needs("liger_kernel", gpu=True), _liger),
        Contender("TRL log-softmax", "token log-probs", needs("trl"), _trl),
        *(
            Contender(
                f"{backend}{suffix}", ALL, needs_backend(backend, "logits"), partial(_ours, backend, inplace), ours=True
            )
            for backend in ("torch", "cpp", "triton", "cuda")
            for suffix, inplace in (("", False), (" in place", True))
        ),
    ),
    inputs_of=inputs_of,
    exact=exact,
    yardstick=_yardstick,
    restores=True,
)  # fmt: skip
