"""The method in plain, unfused PyTorch, one function for each formula.

This is the oracle of the tests and the baseline of the benchmarks: it holds every temporary, asks for no speed, and
is differentiated by autograd. Symbols: B pairs, S = 2B sequences (chosen first), T positions, V vocabulary, K groups.
Ramesh et al., "Group Robust Preference Optimization in Reward-free RLHF", NeurIPS 2024 (arXiv:2405.20304).
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logps(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """(...,): logit[label] - logsumexp_v logit[v]; 0 where ignored; NaN for a label outside the vocabulary."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    counted = labels != ignore_index
    known = (labels >= 0) & (labels < logits.shape[-1])
    index = torch.where(counted & known, labels, 0).long().unsqueeze(-1)
    logps = torch.log_softmax(wide, dim=-1).gather(-1, index).squeeze(-1)
    logps = torch.where(known, logps, torch.nan)
    return torch.where(counted, logps, 0.0)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    average: bool,
    token_weights: Tensor | None = None,
) -> Tensor:
    """(S,): (weighted) sum over counted t of the log-probabilities; ``average`` divides by their number, at least 1."""
    logps, counted = token_logps(logits, labels, ignore_index), labels != ignore_index
    if token_weights is not None:
        logps = logps * token_weights
    if cu_seqlens is None:
        sums, counts = logps.sum(-1), counted.sum(-1)
    else:
        lengths = cu_seqlens.diff().tolist()
        sums = torch.stack([piece.sum() for piece in logps.split(lengths)])
        counts = torch.stack([piece.sum() for piece in counted.split(lengths)])
    return sums / counts.clamp(min=1) if average else sums


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """(..., V): the whole logits of hidden states (..., D) and the head's weight (V, D), in hidden's dtype."""
    bias = None if bias is None else bias.to(hidden.dtype)
    return capped_logits(torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias), logit_scale, softcap)


def capped_logits(head_output: Tensor, logit_scale: float, softcap: float) -> Tensor:
    """What a model does to its head's output z: ``logit_scale * z``, or ``softcap * tanh(logit_scale * z / softcap)``.

    A scale of 1 and a softcap of 0 are none.
    """
    logits = head_output if logit_scale == 1 else logit_scale * head_output
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def margins(policy_logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """(B,): h_i = (logp_w - ref_w) - (logp_l - ref_l)."""
    ratios = policy_logps if ref_logps is None else policy_logps - ref_logps
    chosen, rejected = ratios.chunk(2)
    return chosen - rejected


def pair_losses(h: Tensor, beta: float | Tensor, loss_type: str, label_smoothing: float = 0.0) -> Tensor:
    """(B,): l(h_i)."""
    e = label_smoothing
    if loss_type == "sigmoid":
        return -(1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h)
    if loss_type == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return torch.relu(1 - beta * h)
    if loss_type == "robust":
        return (-(1 - e) * log_sigmoid(beta * h) + e * log_sigmoid(-beta * h)) / (1 - 2 * e)
    raise ValueError(f"loss_type {loss_type!r} is unknown")


def log_sigmoid(x: Tensor) -> Tensor:
    """log s(x) = -softplus(-x), never log(sigmoid(x))."""
    return torch.nn.functional.logsigmoid(x)


def group_losses(
    losses: Tensor, group_ids: Tensor, num_groups: int, group_sizes: Tensor | None, estimator: str
) -> Tensor:
    """(K,): L_g of the batch. A group that the batch lacks gets 0."""
    member = torch.nn.functional.one_hot(group_ids.long(), num_groups).to(losses.dtype)
    sums, counts = losses @ member, member.sum(0)
    if estimator == "group_mean":
        return sums / counts.clamp(min=1)
    assert group_sizes is not None
    sizes = group_sizes.to(losses.dtype)
    return sizes.sum() / sizes * sums / losses.shape[0]
