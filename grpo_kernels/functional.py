"""The stateless functions: validate, select a backend, compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_kernels import reference, validation
from grpo_kernels.distributed import dtensor, vocab_parallel
from grpo_kernels.distributed.context_parallel import SumOverRanks
from grpo_kernels.kernels import dispatch
from grpo_kernels.kernels import linear_plan as plans
from grpo_kernels.kernels.autograd import LinearPairLogps, LinearTokenLogps, PairLossFunction, TokenLogps
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_pairs import PairTerms
from grpo_kernels.pair_losses import PAIR_LOSSES
from grpo_kernels.segments import packed_sequence_ids, segment_sum
from grpo_kernels.types import IGNORE_INDEX, VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MAX_EXTRA_BYTES = 512 << 20


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift_labels: bool = False,
    ignore_index: int = IGNORE_INDEX,
    average: bool = False,
    inplace_backward: bool = False,
    vocab_shard: VocabShard | None = None,
    context_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each sequence's counted labels.

    ``logp_s = sum_t logit[s, t, label] - logsumexp_v logit[s, t, v]`` over the positions whose label is not
    ``ignore_index``.

    Args:
        logits: (S, T, V), or packed (N, V) with ``cu_seqlens``; float32, bfloat16, float16 or float64, any strides.
        labels: (S, T) or (N,), int64 or int32, each ``ignore_index`` or in [0, V). Another value makes the
            sequence's log-probability NaN (``GRPO_KERNELS_DEBUG=1`` raises instead).
        cu_seqlens: (S + 1,) int64 or int32, rising from 0 to N: sequence s is rows cu_seqlens[s]:cu_seqlens[s + 1].
        shift_labels: False: ``labels[:, t]`` is what ``logits[:, t]`` predicts. True: Hugging Face's convention,
            ``logits[:, t]`` predicts ``labels[:, t + 1]``.
        ignore_index: label of positions that do not count. Their logits are not read and get gradient 0.
        average: divide by the number of counted positions (a sequence with none has log-probability 0).
        inplace_backward: the backward writes the gradient over the logits, which saves their size in memory. Nobody
            else may need them: PyTorch raises on a later read by autograd, but logits that are a leaf are destroyed.
            torch.compile ignores it.
        vocab_shard: the logits are this rank's columns; one all-gather of two numbers a token. Logits that are a
            DTensor sharded on the vocabulary say so themselves.
        context_group: the rows are this rank's positions of each sequence (labels too, shifted before they were split:
            see `shift_labels`); one all-reduce of a number a sequence.
        backend: "auto", or a name from `grpo_kernels.backends`.

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
    logits, vocab_shard = dtensor.local_logits(logits, vocab_shard)
    labels, entry = aligned_labels_and_backend(
        logits, labels, cu_seqlens, shift_labels, ignore_index, backend, vocab_shard, context_group
    )
    if entry.module is None and context_group is None:
        return reference.sequence_logps(logits, labels, cu_seqlens, ignore_index, average)
    per_token = _token_logps(logits, labels, ignore_index, inplace_backward, vocab_shard, entry)
    return _sum_over_sequences(per_token, labels, cu_seqlens, ignore_index, average, context_group)


def token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift_labels: bool = False,
    ignore_index: int = IGNORE_INDEX,
    inplace_backward: bool = False,
    vocab_shard: VocabShard | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each label, for losses that need more than its sum over a sequence.

    Arguments and errors are those of `sequence_logps`; ``cu_seqlens`` is needed for packed (N, V) logits.

    Returns:
        (S, T) or (N,), float32 (float64 for float64 logits), 0 where the label is ``ignore_index``. Differentiable
        once.

    Example:
        >>> token_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, -100]]))
        tensor([[-1.3863, -1.3863,  0.0000]])
    """
    logits, vocab_shard = dtensor.local_logits(logits, vocab_shard)
    labels, entry = aligned_labels_and_backend(
        logits, labels, cu_seqlens, shift_labels, ignore_index, backend, vocab_shard
    )
    return _token_logps(logits, labels, ignore_index, inplace_backward, vocab_shard, entry)


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    shift_labels: bool = False,
    ignore_index: int = IGNORE_INDEX,
    average: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    max_extra_bytes: int = MAX_EXTRA_BYTES,
    plan: str = "auto",
    accumulate_dtype: torch.dtype = torch.float32,
    vocab_shard: VocabShard | None = None,
    context_group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """`sequence_logps` of the logits ``z = logit_scale * (hidden @ weight.T + bias)``, or
    ``softcap * tanh(z / softcap)``, without ever holding them.

    Args:
        hidden: (S, T, D), or packed (N, D) with ``cu_seqlens``: the last hidden states.
        weight: (V, D), the language-model head. The products are done in hidden's dtype, under autocast in
            autocast's; the gradient is summed in ``accumulate_dtype`` and comes in the weight's own.
        labels, cu_seqlens, shift_labels, ignore_index, average, context_group, backend: as in `sequence_logps`.
        bias: (V,) or None.
        logit_scale: finite number other than 0 (Cohere, Granite; one over a temperature).
        softcap: positive number or None (Gemma 2's ``final_logit_softcapping``).
        max_extra_bytes: memory for logits of a chunk, and for what is kept from forward to backward to save a matrix
            product; gradients come on top. See `linear_plan`.
        plan: "auto", or "keep" or "recompute" to force it.
        accumulate_dtype: of the sums over chunks that make the weight's gradient; torch.float32 or torch.bfloat16.
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
    return linear_logps(
        hidden,
        weight,
        labels,
        bias=bias,
        cu_seqlens=cu_seqlens,
        shift_labels=shift_labels,
        ignore_index=ignore_index,
        average=average,
        logit_scale=logit_scale,
        softcap=softcap,
        max_extra_bytes=max_extra_bytes,
        plan=plan,
        accumulate_dtype=accumulate_dtype,
        vocab_shard=vocab_shard,
        context_group=context_group,
        backend=backend,
    )


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    shift_labels: bool,
    ignore_index: int,
    average: bool,
    logit_scale: float,
    softcap: float | None,
    max_extra_bytes: int,
    plan: str,
    accumulate_dtype: torch.dtype,
    vocab_shard: VocabShard | None,
    context_group: ProcessGroup | None,
    backend: str,
    pair_terms: PairTerms | None = None,
    accumulators: int = 0,
) -> Tensor:
    """`linear_sequence_logps` that may sweep where the pairs' loss and a forecast of its weights are known."""
    validation.check_float_tensor("weight", weight)
    validation.check_float_tensor("hidden", hidden)
    validation.check_linear_options(logit_scale, softcap, max_extra_bytes, plan, accumulate_dtype)
    hidden, weight, bias, vocab_shard = dtensor.local_head(hidden, weight, bias, vocab_shard)
    hidden = _autocast(hidden)
    validation.check_head(hidden, weight, bias)
    num_columns = weight.shape[0]
    rows = hidden if vocab_shard is None else vocab_parallel.like_whole_hidden(hidden, vocab_shard)
    if vocab_shard is not None:
        validation.check_vocab_shard(vocab_shard, "weight", num_columns)
    validation.check_rows_and_labels(
        "hidden", rows, labels, cu_seqlens, ignore_index, None if vocab_shard else num_columns
    )
    labels = _aligned(labels, cu_seqlens, shift_labels, ignore_index, context_group)
    entry = dispatch.select(backend, dispatch.Request("hidden", tuple(hidden.shape), hidden.dtype, hidden.device))
    head = LinearHead(weight, bias, float(logit_scale), float(softcap or 0))
    if entry.module is None:
        logits = reference.head_logits(hidden, weight, bias, head.logit_scale, head.softcap)
        if vocab_shard is None and context_group is None:
            return reference.sequence_logps(logits, labels, cu_seqlens, ignore_index, average)
        per_token = _token_logps(logits, labels, ignore_index, False, vocab_shard, entry)
        return _sum_over_sequences(per_token, labels, cu_seqlens, ignore_index, average, context_group)
    whole = vocab_shard is None and context_group is None and pair_terms is not None
    # Of packed rows twice the mean, for their lengths are on the device; a longer pair is computed again.
    longest_pair = 2 * labels.shape[1] if cu_seqlens is None else 4 * labels.numel() // max(1, cu_seqlens.shape[0] - 1)
    shape = plans.shape_of(
        rows, weight, bias, labels.numel(), longest_pair, accumulators if whole else 0, accumulate_dtype
    )
    chosen = plans.plan_of(shape, max_extra_bytes, "recompute" if vocab_shard is not None else plan)
    if vocab_shard is not None:
        per_token = vocab_parallel.VocabParallelLinearTokenLogps.apply(
            hidden,
            *head,
            labels,
            ignore_index,
            chosen.chunk_rows,
            accumulate_dtype,
            vocab_shard,
            dispatch.kernels_of(entry.name),
        )
    elif chosen.name == "sweep":
        assert pair_terms is not None
        return LinearPairLogps.apply(
            hidden,
            *head,
            labels,
            cu_seqlens,
            *pair_terms,
            ignore_index,
            average,
            chosen.chunk_rows,
            accumulate_dtype,
            shape.needs_grad,
            entry.name,
        )
    else:
        per_token = LinearTokenLogps.apply(
            hidden,
            *head,
            labels,
            ignore_index,
            chosen.chunk_rows,
            accumulate_dtype,
            chosen.name,
            chosen.kept_rows,
            entry.name,
        )
    return _sum_over_sequences(per_token, labels, cu_seqlens, ignore_index, average, context_group)


def linear_plan(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_rows: int,
    max_extra_bytes: int = MAX_EXTRA_BYTES,
    plan: str = "auto",
) -> plans.LinearPlan:
    """What `linear_sequence_logps` will do with these inputs, by `grpo_kernels.kernels.linear_plan`.

    Example:
        >>> frozen_head = torch.zeros(50, 4)
        >>> linear_plan(torch.zeros(2, 3, 4, requires_grad=True), frozen_head, None, 6).name  # two products, not four
        'frozen'
    """
    return plans.plan_of(plans.shape_of(hidden, weight, bias, num_rows), max_extra_bytes, plan)


def preference_losses(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float | Tensor = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    margin: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Loss of each preference pair, from sequence log-probabilities.

    ``l(h_i - margin_i) * weights_i`` with ``h_i = (logp_w - ref_w) - (logp_l - ref_l)``; l by ``loss_type``:
    "sigmoid" is DPO, "ipo", "hinge" and "robust" (rDPO) as in `grpo_kernels.pair_losses`.

    Args:
        policy_logps: (2B,), the B chosen sequences first, then the B rejected.
        ref_logps: (2B,) of the reference policy, without gradient; None leaves it out (reference-free).
        beta: positive number, or (B,) tensor with one for each pair.
        loss_type: "sigmoid", "ipo", "hinge" or "robust".
        label_smoothing: in [0, 1/2); the share of flipped labels, for "sigmoid" (cDPO) and "robust".
        margin: (B,) target margins in units of h: a pair must win by so much (ODPO's offset is beta * margin).
        weights: (B,) factors of the pair losses.

    Returns:
        (B,) losses, differentiable once in ``policy_logps``.

    Raises:
        ValueError: a wrong shape or range. TypeError: a wrong dtype.

    Example:
        >>> preference_losses(torch.tensor([-1.0, -1.0]), beta=0.5)  # no preference either way: log 2
        tensor([0.6931])
    """
    validation.check_logps(policy_logps, ref_logps)
    num_pairs = policy_logps.shape[0] // 2
    validation.check_beta(beta, num_pairs, policy_logps.device)
    validation.check_loss_options(loss_type, label_smoothing, PAIR_LOSSES)
    policy_logps = at_least_float32(policy_logps)
    ratios = policy_logps if ref_logps is None else policy_logps - ref_logps
    h = ratios[:num_pairs] - ratios[num_pairs:]
    if margin is not None:
        validation.check_pair_vector("margin", margin, num_pairs, h.device)
        h = h - margin
    losses = PairLossFunction.apply(
        h, beta if isinstance(beta, Tensor) else float(beta), loss_type, float(label_smoothing)
    )
    if weights is not None:
        validation.check_pair_vector("weights", weights, num_pairs, h.device)
        losses = losses * weights
    return losses


def at_least_float32(logps: Tensor) -> Tensor:
    """bfloat16 would turn -812.3 and -811.9 into a margin of 0, and float16 overflows in a square."""
    return logps if logps.dtype in (torch.float32, torch.float64) else logps.float()


def aligned_labels_and_backend(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift_labels: bool,
    ignore_index: int,
    backend: str,
    vocab_shard: VocabShard | None = None,
    context_group: ProcessGroup | None = None,
) -> tuple[Tensor, dispatch.BackendEntry]:
    """What every function of logits does first: validate, shift the labels if asked, select a backend."""
    vocab_size = logits.shape[-1] if isinstance(logits, Tensor) and vocab_shard is None else None
    validation.check_rows_and_labels("logits", logits, labels, cu_seqlens, ignore_index, vocab_size)
    if vocab_shard is not None:
        validation.check_vocab_shard(vocab_shard, "logits", logits.shape[-1])
    labels = _aligned(labels, cu_seqlens, shift_labels, ignore_index, context_group)
    request = dispatch.Request("logits", tuple(logits.shape), logits.dtype, logits.device)
    return labels, dispatch.select(backend, request)


def _token_logps(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    inplace_backward: bool,
    vocab_shard: VocabShard | None,
    entry: dispatch.BackendEntry,
) -> Tensor:
    if inplace_backward:
        validation.check_no_overlap("logits", logits)
    if vocab_shard is not None:
        kernels = dispatch.kernels_of(entry.name)
        return vocab_parallel.VocabParallelTokenLogps.apply(
            logits, labels, ignore_index, inplace_backward, vocab_shard, kernels
        )
    if entry.module is None:
        return reference.token_logps(logits, labels, ignore_index)
    return TokenLogps.apply(logits, labels, ignore_index, inplace_backward, entry.name)


def _aligned(
    labels: Tensor,
    cu_seqlens: Tensor | None,
    shift_labels: bool,
    ignore_index: int,
    context_group: ProcessGroup | None,
) -> Tensor:
    if not shift_labels:
        return labels
    if context_group is not None:
        raise ValueError(
            "shift_labels must be False with context_group: a rank does not have the label after its last position. "
            "Shift the labels before they are split over the ranks"
        )
    return _shifted(labels, cu_seqlens, ignore_index)


def _shifted(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Labels moved one to the left: row t holds what it predicts, and the last row of a sequence predicts nothing."""
    if labels.shape[-1] == 0:
        return labels
    nothing = labels.new_full((*labels.shape[:-1], 1), ignore_index)
    shifted = torch.cat([labels[..., 1:], nothing], dim=-1)
    if cu_seqlens is None:
        return shifted
    ids = packed_sequence_ids(cu_seqlens, labels.shape[0])
    next_is_other = torch.cat([ids[1:] != ids[:-1], ids.new_ones(1, dtype=torch.bool)])
    return shifted.masked_fill(next_is_other, ignore_index)


def _sum_over_sequences(
    token_logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    average: bool,
    context_group: ProcessGroup | None,
) -> Tensor:
    """(S,) sums, added up in float64 so that thousands of tokens cost no digits."""
    counted = labels != ignore_index
    if cu_seqlens is None:
        sums, counts = token_logps.double().sum(-1), counted.sum(-1)
    else:
        ids, num_sequences = packed_sequence_ids(cu_seqlens, labels.shape[0]), cu_seqlens.shape[0] - 1
        sums = segment_sum(token_logps, ids, num_sequences)
        counts = segment_sum(counted, ids, num_sequences)
    if context_group is not None:
        sums, counts = SumOverRanks.apply(torch.stack([sums, counts.double()]), context_group)
    if average:
        sums = sums / counts.clamp(min=1)
    return sums.to(token_logps.dtype)


def _autocast(hidden: Tensor) -> Tensor:
    """As torch.nn.functional.linear would cast it; the weight is cast where the products are made."""
    device_type = hidden.device.type
    if not torch.is_autocast_enabled(device_type) or hidden.dtype == torch.float64:
        return hidden
    return hidden.to(torch.get_autocast_dtype(device_type))
