"""The stateless functions: validate, select a backend, compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.arguments import backend_of, checked_head_and_budget, rows_of_hidden, rows_of_logits
from grpo_kernels.batch import Pairs
from grpo_kernels.distributed import dtensor
from grpo_kernels.logps import (
    linear_logps_and_metrics_of_rows,
    linear_logps_of_rows,
    linear_token_logps_of_rows,
    logps_of_rows,
    losses_of_pairs,
    metrics_of_rows,
    sums_over_sequences,
    token_logps_of_rows,
)
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
        >>> import torch
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
        >>> import torch
        >>> token_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        tensor([[-1.3863, -1.3863,  0.0000]])
        >>> _, metrics = token_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]), return_metrics=True)
        >>> metrics.entropy  # log 4
        tensor([[1.3863, 1.3863, 0.0000]])
    """
    validation.check_option_names(options, TokenOptions)
    logits, rows = rows_of_logits(logits, labels, options)
    metrics = metrics_of_rows(logits, rows) if return_metrics else None
    logps = token_logps_of_rows(logits, rows, inplace_backward, backend_of("logits", logits, backend))
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
        >>> import torch
        >>> linear_sequence_logps(torch.zeros(1, 3, 2), torch.ones(4, 2), torch.tensor([[1, 2, -100]]))
        tensor([-2.7726])
    """
    head, budget, row_options = checked_head_and_budget(weight, bias, {**options})
    hidden, head, rows = rows_of_hidden(hidden, head, labels, row_options)
    return linear_logps_of_rows(hidden, head, rows, budget, backend_of("hidden", hidden, backend))


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
        >>> import torch
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
        logps, metrics = linear_logps_and_metrics_of_rows(hidden, head, rows, budget, entry)
        return logps.view(shape), TokenMetrics._make(of_one.view(shape) for of_one in metrics)
    return linear_token_logps_of_rows(hidden, head, rows, budget, entry).view(shape)


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
        >>> import torch
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
    metrics = metrics_of_rows(logits, rows)
    return logps_of_rows(logits, rows, inplace_backward, backend_of("logits", logits, backend)), metrics


def linear_sequence_logps_and_metrics(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, backend: str = "auto", **options: Any
) -> tuple[Tensor, TokenMetrics]:
    """`linear_sequence_logps`, and what ``return_metrics`` adds to `linear_token_logps`."""
    head, budget, row_options = checked_head_and_budget(weight, bias, options)
    hidden, head, rows = rows_of_hidden(hidden, head, labels, row_options)
    token_logps, metrics = linear_logps_and_metrics_of_rows(
        hidden, head, rows, budget, backend_of("hidden", hidden, backend)
    )
    return sums_over_sequences(token_logps, rows), metrics
