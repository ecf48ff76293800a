"""The stateless functions: validate, select a backend, compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from grpo_kernels import reference, validation
from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.distributed import dtensor, vocab_parallel
from grpo_kernels.distributed.context_parallel import SumOverRanks
from grpo_kernels.kernels import dispatch, ops
from grpo_kernels.kernels.autograd import LinearPairLogps, LinearTokenLogps, PairLosses, TokenLogps
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_pairs import Forecast
from grpo_kernels.kernels.linear_plan import BUDGET_OPTIONS, Budget, LinearPlan, plan_for
from grpo_kernels.loss_spec import LossSpec
from grpo_kernels.types import (
    LAYOUTS,
    LinearOptions,
    LinearTokenOptions,
    RowOptions,
    SpecOptions,
    TokenMetrics,
    TokenOptions,
)


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    inplace_backward: bool = False,
    backend: str = "auto",
    **options: Unpack[RowOptions],
) -> Tensor:
    """Log-probability of each sequence's counted labels.

    ``logp_s = sum_t logit[s, t, label] - logsumexp_v logit[s, t, v]`` over the positions whose label is not
    ``ignore_index``.

    Args:
        logits: (S, T, V), or packed (N, V) with ``cu_seqlens``; float32, bfloat16, float16 or float64, any strides.
        labels: (S, T) or (N,), int64 or int32, each ``ignore_index`` or in [0, V). Another value makes the
            sequence's log-probability NaN (``GRPO_KERNELS_DEBUG=1`` raises instead).
        inplace_backward: the backward writes the gradient over the logits, which saves their size in memory. Nobody
            else may need them: PyTorch raises on a later read by autograd, but logits that are a leaf are destroyed.
            torch.compile ignores it.
        backend: "auto", or a name from `grpo_kernels.backends`.
        cu_seqlens: (S + 1,) int64 or int32, rising from 0 to N: sequence s is rows cu_seqlens[s]:cu_seqlens[s + 1].
            None: not packed.
        shift_labels: False (the default): ``labels[:, t]`` is what ``logits[:, t]`` predicts. True: Hugging Face's
            convention, ``logits[:, t]`` predicts ``labels[:, t + 1]``.
        ignore_index: label of positions that do not count, -100. Their logits are not read and get gradient 0.
        average: divide by the number of counted positions (a sequence with none has log-probability 0). False.
        logit_scale, softcap: of a head whose mere output ``logits`` are, as in `linear_sequence_logps`: applied first,
            in plain PyTorch and in the dtype of the logits, whose size it takes once more (twice with a softcap).
        token_weights: labels' shape, a factor of each token's log-probability (LD-DPO and other methods that weigh
            tokens), without gradient; shifted as the labels are. None: 1.
        vocab_shard: the logits are this rank's columns; one all-gather of two numbers a token. Logits that are a
            DTensor sharded on the vocabulary say so themselves.
        context_group: the rows are this rank's positions of each sequence (labels too, shifted before they were split:
            see `shift_labels`); one all-reduce of a number a sequence.

    Returns:
        (S,) float32 whatever the dtype of the logits (bfloat16 turns -812.3 and -811.9 into equal numbers), float64
        for float64 logits. Differentiable once.

    Raises:
        ValueError: a wrong shape, device or cu_seqlens. TypeError: a wrong dtype.
        NotImplementedError: ``backend`` cannot run this input; the message says why.

    Example:
        >>> sequence_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))  # 2 * log(1/4)
        tensor([-2.7726])

    Source: Ramesh et al. 2024, section 2 (pi_theta(y | x) as a sum over tokens).
    """
    logits, rows = rows_of_logits(logits, labels, options)
    return logps_of_rows(logits, rows, inplace_backward, backend_of("logits", logits, backend))


@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    inplace_backward: bool = False,
    return_metrics: Literal[False] = False,
    backend: str = "auto",
    **options: Unpack[TokenOptions],
) -> Tensor: ...
@overload
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    inplace_backward: bool = False,
    return_metrics: Literal[True],
    backend: str = "auto",
    **options: Unpack[TokenOptions],
) -> tuple[Tensor, TokenMetrics]: ...
def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    inplace_backward: bool = False,
    return_metrics: bool = False,
    backend: str = "auto",
    **options: Unpack[TokenOptions],
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """Log-probability of each label, for losses that need more than its sum over a sequence.

    Arguments, options and errors are those of `sequence_logps`, without ``average``, ``token_weights`` and
    ``context_group``; ``cu_seqlens`` is needed for packed (N, V) logits.

    Args:
        return_metrics: return (token_logps, `TokenMetrics`): each token's entropy, mean logit, log sum p^2 and top-1
            hit, without gradient. Whatever the backend they are plain PyTorch over chunks of rows, which reads the
            logits once more; `linear_token_logps` takes them from the chunks that it makes anyway.

    Returns:
        (S, T) or (N,), float32 (float64 for float64 logits), 0 where the label is ``ignore_index``. Differentiable
        once.

    Raises:
        NotImplementedError: also for ``return_metrics`` with a sharded vocabulary, of which no rank has a whole row.

    Example:
        >>> token_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        tensor([[-1.3863, -1.3863,  0.0000]])
        >>> _, metrics = token_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), return_metrics=True)
        >>> metrics.entropy  # log 4
        tensor([[1.3863, 1.3863, 0.0000]])
    """
    validation.check_option_names(options, TokenOptions)
    logits, rows = rows_of_logits(logits, labels, options)
    metrics = _metrics_of_logits(logits, rows) if return_metrics else None
    logps = _token_logps(logits, rows, inplace_backward, backend_of("logits", logits, backend))
    return logps if metrics is None else (logps, metrics)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[LinearOptions],
) -> Tensor:
    """`sequence_logps` of the logits ``z = logit_scale * (hidden @ weight.T + bias)``, or
    ``softcap * tanh(z / softcap)``, without ever holding them.

    Args:
        hidden: (S, T, D), or packed (N, D) with ``cu_seqlens``: the last hidden states.
        weight: (V, D), the language-model head. The products are done in hidden's dtype, under autocast in
            autocast's; the gradient is summed in ``accumulate_dtype`` and comes in the weight's own.
        labels, backend and all other options: as in `sequence_logps`.
        bias: (V,) or None.
        logit_scale: finite number other than 0 (Cohere, Granite; one over a temperature). 1.
        softcap: positive number or None (Gemma 2's ``final_logit_softcapping``).
        max_extra_bytes: memory for logits of a chunk, sums, and what is kept from forward to backward to save a matrix
            product; gradients come on top. "auto" (the default) is 1/16 of a GPU's memory, 1/32 of the machine's on a
            CPU; no more is taken than helps. See `grpo_kernels.kernels.linear_plan`.
        plan: "auto" (the default), or "keep" or "recompute" to force it where the head has a gradient; with a sharded
            vocabulary there is "recompute" only.
        accumulate_dtype: of the sums over chunks that make the weight's gradient; torch.float32 (the default) or
            torch.bfloat16.
        vocab_shard: weight and bias are this rank's rows; hidden is the same on every rank of the shard's group (or
            this rank's part of the positions, ``VocabShard(sequence_parallel=True)``), and its gradient is summed
            over them. A weight that is a DTensor sharded on V says so itself where hidden is a DTensor, too.

    Returns:
        (S,) float32 (float64 for float64 hidden). Differentiable once in hidden, weight and bias; a frozen one gets no
        gradient computed.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `sequence_logps`.

    Example:
        >>> linear_sequence_logps(torch.zeros(1, 3, 2), torch.ones(4, 2), torch.tensor([[1, 2, -100]]))
        tensor([-2.7726])
    """
    head, budget, row_options = checked_head_and_budget(weight, bias, {**options})
    hidden, head, rows = rows_of_hidden(hidden, head, labels, row_options)
    return linear_logps(hidden, head, rows, budget, backend_of("hidden", hidden, backend))


@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    return_metrics: Literal[False] = False,
    backend: str = "auto",
    **options: Unpack[LinearTokenOptions],
) -> Tensor: ...
@overload
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    return_metrics: Literal[True],
    backend: str = "auto",
    **options: Unpack[LinearTokenOptions],
) -> tuple[Tensor, TokenMetrics]: ...
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
    **options: Unpack[LinearTokenOptions],
) -> Tensor | tuple[Tensor, TokenMetrics]:
    """`token_logps` from hidden states and the head's weight: what losses of single tokens start from.

    Arguments are those of `linear_sequence_logps`, but that hidden (..., D) and labels (...) may have any leading
    dimensions where no option asks for sequences.

    Returns:
        labels' shape, float32 (float64 for float64 hidden), 0 where the label is ``ignore_index``. Differentiable once
        in hidden, weight and bias.

    Example:
        >>> linear_token_logps(torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([1, 2, -100]))
        tensor([-1.3863, -1.3863,  0.0000])
    """
    validation.check_option_names(options, LinearTokenOptions)
    head, budget, row_options = checked_head_and_budget(weight, bias, {**options})
    validation.check_tensor("hidden", hidden)
    validation.check_tensor("labels", labels)
    shape = labels.shape
    if hidden.dim() != 3 and row_options.get("cu_seqlens") is None:
        if row_options.get("shift_labels"):
            raise ValueError(
                f"shift_labels needs sequences: hidden (S, T, D), or cu_seqlens; got hidden {tuple(hidden.shape)}"
            )
        validation.check_one_label_a_row("hidden", hidden, labels)
        hidden, labels = hidden.reshape(1, -1, hidden.shape[-1]), labels.reshape(1, -1)
    hidden, head, rows = rows_of_hidden(hidden, head, labels, row_options)
    entry = backend_of("hidden", hidden, backend)
    if return_metrics:
        logps, metrics = _linear_logps_and_metrics(hidden, head, rows, budget, entry)
        return logps.view(shape), TokenMetrics._make(of_one.view(shape) for of_one in metrics)
    if entry.module is None:
        return _token_logps(_whole_logits(hidden, head), rows, False, entry).view(shape)
    return _linear_token_logps(hidden, head, rows, plan_for(hidden, head, rows, budget), entry)[0].view(shape)


def preference_losses(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float | Tensor = 0.0,
    margin: Tensor | None = None,
    weights: Tensor | None = None,
    token_counts: Tensor | None = None,
    layout: str = "chosen_first",
    **options: Unpack[SpecOptions],
) -> Tensor:
    """Loss of each preference pair, from sequence log-probabilities.

    ``sum_k loss_weights_k * l_k * weights``, each l by its name in `grpo_kernels.pair_losses`: "sigmoid" is DPO,
    ``l(h_i - margin_i)`` with ``h_i = (logp_w - ref_w) - (logp_l - ref_l)``; others see the two answers apart.

    Args:
        policy_logps: (2B,), sums over tokens; the B chosen sequences first, then the B rejected, or as ``layout`` says.
        ref_logps: (2B,) of the reference policy, without gradient; None leaves it out (reference-free).
        beta: positive number, or (B,) tensor with one for each pair.
        loss_type: a name, or a list of names whose losses are added up.
        label_smoothing: in [0, 1/2), or (B,) in [0, 1] (soft labels: 1 - the probability of the preference); the share
            of flipped labels, for "sigmoid" (cDPO) and its kin, "robust" and "exo_pair".
        margin: (B,) target margins in units of h: a pair must win by so much (ODPO's offset is beta * margin, SimPO's
            gamma, too).
        weights: (B,) factors of the pair losses.
        token_counts: (2B,) counted tokens, for losses of means.
        layout: of what has 2B: "chosen_first", or "interleaved", pair i is sequences 2i and 2i + 1.
        loss_weights: a number for each name of a list. None: 1 each.
        f_divergence_type: "reverse_kl" (the default), "forward_kl", "js_divergence" or "alpha_divergence" with
            ``f_alpha_divergence_coef`` (0.5), for losses of the margin.
        use_weighting: WPO, a pair's loss times the likelihood a token of its answers, at most 1.
        discopop_tau: positive number, 0.05.

    Returns:
        (B,) losses, differentiable once in ``policy_logps``.

    Raises:
        ValueError: a wrong shape or range. TypeError: a wrong dtype.

    Example:
        >>> preference_losses(torch.tensor([-1.0, -1.0]), beta=0.5)  # no preference either way: log 2
        tensor([0.6931])
    """
    policy_logps, ref_logps, token_counts = dtensor.unwrapped(
        policy_logps=policy_logps, ref_logps=ref_logps, token_counts=token_counts
    )
    beta, label_smoothing, margin, weights = dtensor.unwrapped(
        beta=beta, label_smoothing=label_smoothing, margin=margin, weights=weights
    )
    validation.check_logps(policy_logps, ref_logps)
    validation.check_option_names(options, SpecOptions)
    spec = LossSpec.of(loss_type, **options)
    validation.check_choice("layout", layout, LAYOUTS)
    interleaved = layout == "interleaved"
    pairs = Pairs(None, ref_logps, margin, weights, token_counts, beta, label_smoothing, spec, interleaved)
    pairs.check(policy_logps.shape[0] // 2, policy_logps.device)
    return losses_of_pairs(policy_logps, pairs)


# -- what integrations call ------------------------------------------------------------------------------------------


def sequence_logps_and_metrics(
    logits: Tensor, labels: Tensor, *, inplace_backward: bool = False, backend: str = "auto", **options: Any
) -> tuple[Tensor, TokenMetrics]:
    """`sequence_logps`, and what ``return_metrics`` adds to `token_logps`."""
    logits, rows = rows_of_logits(logits, labels, options)
    metrics = _metrics_of_logits(logits, rows)
    return logps_of_rows(logits, rows, inplace_backward, backend_of("logits", logits, backend)), metrics


def linear_sequence_logps_and_metrics(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, backend: str = "auto", **options: Any
) -> tuple[Tensor, TokenMetrics]:
    """`linear_sequence_logps`, and what ``return_metrics`` adds to `linear_token_logps`."""
    head, budget, row_options = checked_head_and_budget(weight, bias, options)
    hidden, head, rows = rows_of_hidden(hidden, head, labels, row_options)
    token_logps, metrics = _linear_logps_and_metrics(hidden, head, rows, budget, backend_of("hidden", hidden, backend))
    return _sums_over_sequences(token_logps, rows), metrics


# -- what the modules call: arguments are checked already ----------------------------------------------------------


def losses_of_pairs(policy_logps: Tensor, pairs: Pairs) -> Tensor:
    """(B,) of (2B,)."""
    losses: Tensor = PairLosses.apply(policy_logps, *ops.PAIRS.pack(pairs))
    return losses


def backend_of(argument: str, tensor: Tensor, name: str) -> dispatch.BackendEntry:
    return dispatch.select(name, dispatch.Request(argument, tuple(tensor.shape), tensor.dtype, tensor.device))


def rows_of_logits(
    logits: Tensor, labels: Tensor, options: RowOptions | TokenOptions | dict[str, Any]
) -> tuple[Tensor, Rows]:
    """The rank's own logits, and their rows: what every function of logits does first."""
    logits, vocab_shard = dtensor.local_logits(logits, options.get("vocab_shard"))
    labels, given = _unwrapped(labels, options)
    num_columns = logits.shape[-1] if isinstance(logits, Tensor) and logits.dim() else 0
    of_head = checked_scale_and_softcap(given)
    rows = Rows.of("logits", logits, num_columns, labels, {**given, "vocab_shard": vocab_shard})
    return reference.capped_logits(logits, *of_head), rows


def checked_scale_and_softcap(options: dict[str, Any]) -> tuple[float, float]:
    """Taken out of the options; a softcap of 0 is none."""
    logit_scale, softcap = options.pop("logit_scale", 1.0), options.pop("softcap", None)
    validation.check_logit_options(logit_scale, softcap)
    return float(logit_scale), float(softcap or 0)


def _unwrapped(labels: Tensor, options: Mapping[str, object]) -> tuple[Tensor, dict[str, Any]]:
    given: dict[str, Any] = {**options}
    names = [name for name in ("cu_seqlens", "token_weights") if given.get(name) is not None]
    labels, *plain = dtensor.unwrapped(labels=labels, **{name: given[name] for name in names})
    return labels, {**given, **dict(zip(names, plain, strict=True))}


def logps_of_rows(logits: Tensor, rows: Rows, inplace_backward: bool, entry: dispatch.BackendEntry) -> Tensor:
    """(S,) log-probabilities."""
    if entry.module is None and rows.context_group is None and rows.vocab_shard is None:
        return reference.sequence_logps(
            logits, rows.labels, rows.cu_seqlens, rows.ignore_index, rows.average, rows.token_weights
        )
    return _sums_over_sequences(_token_logps(logits, rows, inplace_backward, entry), rows)


def token_counts_of(rows: Rows) -> Tensor:
    """(S,) float64 counted tokens of whole sequences."""
    counts = rows.counts()
    return counts if rows.context_group is None else SumOverRanks.apply(counts, rows.context_group)


def checked_head_and_budget(
    weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> tuple[LinearHead, Budget, dict[str, Any]]:
    """And the options that are left: those of rows."""
    head = checked_head(weight, bias, options)
    of_budget = {name: options.pop(name) for name in BUDGET_OPTIONS if name in options}
    return head, Budget(**of_budget), options


def checked_head(weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> LinearHead:
    """Its scale and softcap are taken out of the options."""
    validation.check_float_tensor("weight", weight)
    return LinearHead(weight, bias, *checked_scale_and_softcap(options))


def rows_of_hidden(
    hidden: Tensor, head: LinearHead, labels: Tensor, options: RowOptions | dict[str, Any]
) -> tuple[Tensor, LinearHead, Rows]:
    """The rank's own hidden states and head, under autocast in its dtype, and their rows."""
    validation.check_float_tensor("hidden", hidden)
    hidden, weight, bias, vocab_shard = dtensor.local_head(hidden, head.weight, head.bias, options.get("vocab_shard"))
    hidden, head = _autocast(hidden), head._replace(weight=weight, bias=bias)
    validation.check_head(hidden, weight, bias)
    labels, given = _unwrapped(labels, options)
    like = hidden if vocab_shard is None else vocab_parallel.like_whole_hidden(hidden, vocab_shard)
    rows = Rows.of("hidden", like, head.num_columns, labels, {**given, "vocab_shard": vocab_shard})
    return hidden, head, rows


def linear_logps(
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
        return logps_of_rows(_whole_logits(hidden, head), rows, False, entry)
    plan = plan_for(hidden, head, rows, budget, 0 if forecast is None else forecast.accumulators)
    if plan.name == "sweep":
        assert pairs is not None
        assert forecast is not None
        of_batch = (*ops.ROWS.pack(rows), *ops.PLAN.pack(plan), *ops.PAIRS.pack(pairs), *ops.FORECAST.pack(forecast))
        logps: Tensor = LinearPairLogps.apply(hidden, *head, *of_batch, entry.name)
        return logps
    return _sums_over_sequences(_linear_token_logps(hidden, head, rows, plan, entry)[0], rows)


def _linear_token_logps(
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


def _linear_logps_and_metrics(
    hidden: Tensor, head: LinearHead, rows: Rows, budget: Budget, entry: dispatch.BackendEntry
) -> tuple[Tensor, TokenMetrics]:
    validation.check_whole_vocabulary(rows.vocab_shard)
    if entry.module is None:
        logits = _whole_logits(hidden, head)
        return _token_logps(logits, rows, False, entry), _metrics_of_logits(logits, rows)
    plan = plan_for(hidden, head, rows, budget)
    token_logps, metrics = _linear_token_logps(hidden, head, rows, plan, entry, with_metrics=True)
    return token_logps, TokenMetrics.of(metrics)


def _metrics_of_logits(logits: Tensor, rows: Rows) -> TokenMetrics:
    validation.check_whole_vocabulary(rows.vocab_shard)
    return TokenMetrics.of(torch.ops.grpo_kernels.token_metrics(logits.detach(), rows.labels, rows.ignore_index))


def _whole_logits(hidden: Tensor, head: LinearHead) -> Tensor:
    return reference.head_logits(hidden, *head)


def _token_logps(logits: Tensor, rows: Rows, inplace_backward: bool, entry: dispatch.BackendEntry) -> Tensor:
    if inplace_backward:
        validation.check_no_overlap("logits", logits)
    if rows.vocab_shard is not None:
        kernels = dispatch.kernels_of(entry.name)
        return vocab_parallel.VocabParallelTokenLogps.apply(logits, rows, inplace_backward, kernels)
    if entry.module is None:
        return reference.token_logps(logits, rows.labels, rows.ignore_index)
    return TokenLogps.apply(logits, rows.labels, rows.ignore_index, inplace_backward, entry.name)


def _sums_over_sequences(token_logps: Tensor, rows: Rows) -> Tensor:
    """(S,) sums, or means."""
    sums, counts = rows.sums(rows.weighted(token_logps)), rows.counts()
    if rows.context_group is not None:
        sums, counts = SumOverRanks.apply(torch.stack([sums, counts]), rows.context_group)
    if rows.average:
        sums = sums / counts.clamp(min=1)
    return sums.to(token_logps.dtype)


def _autocast(hidden: Tensor) -> Tensor:
    """As torch.nn.functional.linear would cast it; the weight is cast where the products are made."""
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(device_type))
