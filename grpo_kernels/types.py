"""The vocabulary of the package: option names, and what a loss returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ESTIMATORS = ("importance", "group_mean")
UPDATE_MODES = ("inline", "lagged")
PRIORS = ("uniform", "sizes")
LAYOUTS = ("chosen_first", "interleaved")
ALPHA_FOLLOWS = ("loss", "preference")

IGNORE_INDEX = -100
"""Label of a position that does not count (prompt, padding): PyTorch's own convention."""


@dataclass(frozen=True)
class VocabShard:
    """The rank's columns ``start:stop`` of a vocabulary that is sharded over the ranks of ``process_group``.

    Every column belongs to exactly one rank; shards may differ in size, and be empty.
    ``sequence_parallel``: hidden states, too, are sharded, in equal parts of the positions in the order of the ranks
    (the linear path gathers them).
    """

    start: int
    stop: int
    process_group: Any
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"VocabShard needs 0 <= start <= stop, got start={self.start}, stop={self.stop}")


class TokenOptions(TypedDict, total=False):
    """Keyword options that all functions of rows share; `grpo_kernels.sequence_logps` says what they mean."""

    cu_seqlens: Tensor | None
    shift_labels: bool
    ignore_index: int
    vocab_shard: VocabShard | None
    logit_scale: float
    softcap: float | None


class RowOptions(TokenOptions, total=False):
    """And those of sums over a sequence."""

    average: bool
    token_weights: Tensor | None
    context_group: ProcessGroup | None


class LinearTokenOptions(TokenOptions, total=False):
    """Keyword options of the linear path; `grpo_kernels.linear_sequence_logps` says what they mean."""

    max_extra_bytes: int | str
    plan: str
    accumulate_dtype: torch.dtype


class LinearOptions(LinearTokenOptions, RowOptions, total=False):
    """And those of sums over a sequence."""


class SpecOptions(TypedDict, total=False):
    """Keyword options of pair losses; `grpo_kernels.preference_losses` says what they mean."""

    loss_weights: Sequence[float] | None
    f_divergence_type: str
    f_alpha_divergence_coef: float
    use_weighting: bool
    discopop_tau: float


class LossOptions(SpecOptions, total=False):
    """Keyword options of both losses; `grpo_kernels.GroupRobustLoss` says what they mean."""

    beta: float
    loss_type: str | Sequence[str]
    label_smoothing: float
    reference_free: bool
    average_log_prob: bool
    ignore_index: int
    shift_labels: bool
    vocab_shard: VocabShard | None
    context_group: ProcessGroup | None
    logit_scale: float
    softcap: float | None
    layout: str
    alpha_follows: str
    backend: str


class LogpsOptions(TypedDict, total=False):
    """Keyword options of a loss of log-probabilities; `grpo_kernels.GroupRobustLoss.forward` says what they mean."""

    beta: float | Tensor | None
    margin: Tensor | None
    weights: Tensor | None
    label_smoothing: float | Tensor | None


class PairOptions(LogpsOptions, total=False):
    """And those of a forward."""

    token_weights: Tensor | None
    token_counts: Tensor | None
    total_pairs: int | Tensor | None


class TokenMetrics(NamedTuple):
    """What ``return_metrics=True`` adds, labels' shape each, without gradient; 0 where the label is ignored."""

    entropy: Tensor
    """-sum_v p_v log p_v, in nats."""
    mean_logits: Tensor
    """The mean of the row's logits."""
    log_sum_sq_probs: Tensor
    """log sum_v p_v^2: the log-likelihood of a token that the policy itself draws, in the mean (WPO)."""
    is_top1: Tensor
    """bool: whether the label has the largest logit; of equal ones the first counts."""

    @classmethod
    def of(cls, columns: Tensor) -> TokenMetrics:
        """Of a tensor (..., 4)."""
        entropy, mean_logits, log_sum_sq_probs, hits = columns.unbind(-1)
        return cls(entropy, mean_logits, log_sum_sq_probs, hits > 0)


class GroupRobustOutput(NamedTuple):
    """What a group-robust loss returns: B pairs, K groups.

    Differentiable in the policy: ``loss``, ``pair_losses``, ``group_losses``, ``chosen_logps`` and
    ``rejected_logps``. The rest is detached.
    """

    loss: Tensor
    """0-d: sum_g alpha_g(new) L_g. Call ``.backward()`` on this."""
    pair_losses: Tensor
    """(B,): l(h_i), times the pair's weight where weights were given."""
    group_losses: Tensor
    """(K,): L_g of the batch by the chosen estimator; 0 for a group that the batch lacks."""
    group_counts: Tensor
    """(K,) int64: pairs of each group in the batch; float64 sums of shares where group_ids are memberships."""
    alpha: Tensor
    """(K,) float64: the group weights after this batch's update."""
    chosen_logps: Tensor
    """(B,): log-probability of each chosen answer under the policy."""
    rejected_logps: Tensor
    """(B,): the same for the rejected answers."""
    chosen_rewards: Tensor
    """(B,): beta * (policy - reference) log-probability of the chosen answers."""
    rejected_rewards: Tensor
    """(B,): the same for the rejected answers."""
    group_means: Tensor
    """(K,) float64, detached: the plain mean of the batch's pair losses of each group; NaN for one that it lacks. With
    ``inner_tilt`` over several ranks it is of the rank's own pairs."""

    def metrics(self) -> dict[str, Tensor]:
        """Batch means under TRL's names, as detached 0-d views of one tensor.

        Nothing is copied to the host here; ``torch.stack(list(m.values())).tolist()`` costs one copy for all.
        """
        margins = self.chosen_rewards - self.rejected_rewards
        values = {
            "loss": self.loss.detach(),
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/accuracies": (margins > 0).to(margins.dtype).masked_fill(margins.isnan(), torch.nan).mean(),
            "rewards/margins": margins.mean(),
            "logps/chosen": self.chosen_logps.detach().mean(),
            "logps/rejected": self.rejected_logps.detach().mean(),
        }
        packed = torch.stack([value.to(margins.dtype) for value in values.values()])
        return dict(zip(values, packed.unbind(), strict=True))
