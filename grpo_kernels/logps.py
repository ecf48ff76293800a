"""Log-probabilities of rows, and losses of pairs, that are checked: what the functions and the modules compute with."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import reference, validation
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.distributed import vocab_parallel
from grpo_kernels.distributed.context_parallel import SumOverRanks
from grpo_kernels.kernels import dispatch, ops
from grpo_kernels.kernels.autograd import LinearPairLogps, LinearTokenLogps, PairLosses, TokenLogps
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_pairs import Forecast
from grpo_kernels.kernels.linear_plan import Budget, LinearPlan, plan_for
from grpo_kernels.types import TokenMetrics


def logps_of_rows(logits: Tensor, rows: Rows, inplace_backward: bool, entry: dispatch.BackendEntry) -> Tensor:
    """(S,) log-probabilities."""
    if entry.module is None and rows.context_group is None and rows.vocab_shard is None:
        return reference.sequence_logps(
            logits, rows.labels, rows.cu_seqlens, rows.ignore_index, rows.average, rows.token_weights
        )
    return sums_over_sequences(token_logps_of_rows(logits, rows, inplace_backward, entry), rows)


def token_logps_of_rows(logits: Tensor, rows: Rows, inplace_backward: bool, entry: dispatch.BackendEntry) -> Tensor:
    if inplace_backward:
        validation.check_no_overlap("logits", logits)
    if rows.vocab_shard is not None:
        kernels = dispatch.kernels_of(entry.name)
        return vocab_parallel.VocabParallelTokenLogps.apply(logits, rows, inplace_backward, kernels)
    if entry.module is None:
        return reference.token_logps(logits, rows.labels, rows.ignore_index)
    return TokenLogps.apply(logits, rows.labels, rows.ignore_index, inplace_backward, entry.name)


def metrics_of_rows(logits: Tensor, rows: Rows) -> TokenMetrics:
    validation.check_whole_vocabulary(rows.vocab_shard)
    return TokenMetrics.of(torch.ops.grpo_kernels.token_metrics(logits.detach(), rows.labels, rows.ignore_index))


def linear_logps_of_rows(
    hidden: Tensor,
    head: LinearHead,
    rows: Rows,
    budget: Budget,
    entry: dispatch.BackendEntry,
    pairs: Pairs | None = None,
    forecast: Forecast | None = None,
) -> Tensor:
    """(S,) log-probabilities, by a sweep where the pairs' loss and a forecast of its weights are known."""
    if entry.module is None:
        return logps_of_rows(reference.head_logits(hidden, *head), rows, False, entry)
    plan = plan_for(hidden, head, rows, budget, 0 if forecast is None else forecast.accumulators)
    if plan.name == "sweep":
        assert pairs is not None
        assert forecast is not None
        of_batch = (*ops.ROWS.pack(rows), *ops.PLAN.pack(plan), *ops.PAIRS.pack(pairs), *ops.FORECAST.pack(forecast))
        logps: Tensor = LinearPairLogps.apply(hidden, *head, *of_batch, entry.name)
        return logps
    return sums_over_sequences(_planned_token_logps(hidden, head, rows, plan, entry)[0], rows)


def linear_token_logps_of_rows(
    hidden: Tensor, head: LinearHead, rows: Rows, budget: Budget, entry: dispatch.BackendEntry
) -> Tensor:
    """(S, T) or (N,) log-probabilities of the tokens."""
    if entry.module is None:
        return token_logps_of_rows(reference.head_logits(hidden, *head), rows, False, entry)
    return _planned_token_logps(hidden, head, rows, plan_for(hidden, head, rows, budget), entry)[0]


def linear_logps_and_metrics_of_rows(
    hidden: Tensor, head: LinearHead, rows: Rows, budget: Budget, entry: dispatch.BackendEntry
) -> tuple[Tensor, TokenMetrics]:
    validation.check_whole_vocabulary(rows.vocab_shard)
    if entry.module is None:
        logits = reference.head_logits(hidden, *head)
        return token_logps_of_rows(logits, rows, False, entry), metrics_of_rows(logits, rows)
    plan = plan_for(hidden, head, rows, budget)
    token_logps, metrics = _planned_token_logps(hidden, head, rows, plan, entry, with_metrics=True)
    return token_logps, TokenMetrics.of(metrics)


def _planned_token_logps(
    hidden: Tensor,
    head: LinearHead,
    rows: Rows,
    plan: LinearPlan,
    entry: dispatch.BackendEntry,
    with_metrics: bool = False,
) -> tuple[Tensor, Tensor]:
    """(...) log-probabilities of the tokens, and their metrics (..., 4); (0,) where nobody asks for them."""
    if rows.vocab_shard is not None:
        of_logits, kernels = (head.logit_scale, head.softcap), dispatch.kernels_of(entry.name)
        token_logps = vocab_parallel.VocabParallelLinearTokenLogps.apply(
            hidden, head.weight, head.bias, of_logits, rows, plan, kernels
        )
        return token_logps, hidden.new_empty(0)
    of_batch = (*ops.ROWS.pack(rows), *ops.PLAN.pack(plan))
    found: tuple[Tensor, Tensor] = LinearTokenLogps.apply(hidden, *head, *of_batch, entry.name, with_metrics)
    return found


def sums_over_sequences(token_logps: Tensor, rows: Rows) -> Tensor:
    """(S,) sums, or means."""
    sums = rows.sums(rows.weighted(token_logps))
    if rows.average:
        both = torch.stack([sums, rows.counts()])
        sums, counts = both if rows.context_group is None else SumOverRanks.apply(both, rows.context_group)
        sums = sums / counts.clamp(min=1)
    elif rows.context_group is not None:
        sums = SumOverRanks.apply(sums, rows.context_group)
    return sums.to(token_logps.dtype)


def token_counts_of(rows: Rows) -> Tensor:
    """(S,) float64 counted tokens of whole sequences."""
    counts = rows.counts()
    return counts if rows.context_group is None else SumOverRanks.apply(counts, rows.context_group)


def losses_of_pairs(policy_logps: Tensor, pairs: Pairs) -> Tensor:
    """(B,) of (2B,)."""
    losses: Tensor = PairLosses.apply(policy_logps, *ops.PAIRS.pack(pairs))
    return losses
