"""The loss of a batch of pairs, computed inside a model's forward, and what passes the model's wrappers uncast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

from torch import Tensor

from grpo_kernels import functional
from grpo_kernels.losses import GroupRobustLoss, LinearGroupRobustLoss
from grpo_kernels.types import GroupRobustOutput, PairOptions, TokenMetrics

if TYPE_CHECKING:
    from grpo_kernels.integrations.transformers import HiddenAndHead


class Sealed:
    """Holds a value that a model's wrappers hand through as it is.

    They look for tensors in tuples, dicts and dataclasses, to move and to cast them: FSDP's mixed precision would round
    log-probabilities to bfloat16, where -812.3 and -811.9 are one number. Into this they do not look.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class LossInForward(NamedTuple):
    """What a model returns for ``loss_of_pairs``. Call backward on ``loss``: wrappers hang their hooks on it."""

    loss: Tensor
    """0-d; a wrapper may have cast it, which costs no gradient anything."""
    aux_loss: Tensor | None
    """0-d, the balancing loss of experts where it was asked for; not in ``loss``."""
    sealed: Sealed
    """The next two."""

    @property
    def output(self) -> GroupRobustOutput:
        output: GroupRobustOutput = self.sealed.value[0]
        return output

    @property
    def metrics(self) -> TokenMetrics | None:
        """Of tokens, where a subclass of `LossOfPairs` makes them."""
        metrics: TokenMetrics | None = self.sealed.value[1]
        return metrics


class LossOfPairs:
    """A loss and what it takes of a batch besides the labels, sealed as in `Sealed`.

    Args:
        loss_fn: a `LinearGroupRobustLoss` with the scale and softcap of the head that `find_head` found of the model,
            or, for a model on the logits path, a `GroupRobustLoss`. Its own ``shift_labels`` counts: True for labels as
            Transformers has them.
        group_ids, ref_logps, options: as in its forward.
    """

    def __init__(
        self,
        loss_fn: GroupRobustLoss | LinearGroupRobustLoss,
        group_ids: Tensor,
        ref_logps: Tensor | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        self.loss_fn, self.group_ids, self.ref_logps, self.options = loss_fn, group_ids, ref_logps, options

    def options_for(self, labels: Tensor) -> PairOptions:
        """Of the labels as the model sees them: an adapter may have put virtual tokens before them."""
        return self.options

    def of(self, rows: Tensor | HiddenAndHead, labels: Tensor) -> tuple[GroupRobustOutput, TokenMetrics | None]:
        """Of logits, or of what they are made of.

        Raises:
            TypeError, ValueError: the loss is of the other path, or of another head.
        """
        loss_fn, options = self.loss_fn, self.options_for(labels)
        self.check(rows)
        if isinstance(rows, Tensor):
            return loss_fn(rows, labels, self.group_ids, self.ref_logps, **options), None
        out = loss_fn(rows.hidden, rows.weight, labels, self.group_ids, self.ref_logps, rows.bias, **options)
        return out, None

    def check(self, rows: Tensor | HiddenAndHead) -> None:
        loss_fn = self.loss_fn
        if isinstance(rows, Tensor):
            if not isinstance(loss_fn, GroupRobustLoss):
                raise TypeError(f"loss_fn must be a GroupRobustLoss on the logits path, got {type(loss_fn).__name__}")
            return
        if not isinstance(loss_fn, LinearGroupRobustLoss):
            raise TypeError(f"loss_fn must be a LinearGroupRobustLoss on the linear path, got {type(loss_fn).__name__}")
        if (loss_fn.logit_scale, loss_fn.softcap) != (rows.head.scale, rows.head.softcap):
            raise ValueError(
                f"loss_fn must have the model's logit_scale={rows.head.scale} and softcap={rows.head.softcap}, got "
                f"{loss_fn.logit_scale} and {loss_fn.softcap}"
            )


def logps_of(
    rows: Tensor | HiddenAndHead, labels: Tensor, with_metrics: bool, of_linear: dict[str, Any], **options: Any
) -> Any:
    """(S,) log-probabilities, or (those, `TokenMetrics`); ``of_linear`` are options of the linear path only."""
    if isinstance(rows, Tensor):
        of_logits = functional.sequence_logps_and_metrics if with_metrics else functional.sequence_logps
        return of_logits(rows, labels, inplace_backward=True, **options)
    of_linear = {**of_linear, "bias": rows.bias, "logit_scale": rows.head.scale, "softcap": rows.head.softcap}
    of_hidden = functional.linear_sequence_logps_and_metrics if with_metrics else functional.linear_sequence_logps
    return of_hidden(rows.hidden, rows.weight, labels, **of_linear, **options)
