"""What every optimised backend implements. A new backend is one module with the two functions of KernelBackend.

The linear path needs both at once (`UnitGradientBackend`), which is composed of the two where a backend has it not.

Rows are the positions of a batch in any layout: logits (..., V) come with labels (...), already aligned with them.
A row whose label is ``ignore_index`` is never read: its token_logps, lse and gradient are 0. A row whose label is
outside [0, V) reads nothing out of bounds: its token_logps, lse and gradient are NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from grpo_kernels.batch import Pairs, Rows
from grpo_kernels.kernels.group_robust import GroupRobustTables, GroupState, Upstream


class KernelBackend(Protocol):
    def token_logps_forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """token_logps (...) and lse (..., 2), in the accumulation dtype: float64 for float64 logits, else float32.

        lse[..., 0] + lse[..., 1] is the row's log-sum-exp. It is kept in two parts, such as the maximum and the log of
        the sum of exp(logit - maximum), because one float32 cannot hold 10000.693 to the digits that a softmax needs.
        """
        ...

    def token_logps_backward(
        self, dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
    ) -> None:
        """Write d/dlogits = dtoken_logps * (onehot(label) - softmax(logits)) into ``out``, which may be ``logits``."""
        ...


class UnitGradientBackend(KernelBackend, Protocol):
    """A backend that reads a row once for its log-probability and its gradient."""

    def token_logps_and_unit_gradient(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """`token_logps_forward` of rows (n, V) that all count; the logits become onehot(label) - softmax(logits)."""
        ...


class FusedKernelBackend(Protocol):
    """A backend that computes the whole of GroupRobustLoss in one launch each way."""

    def group_robust_forward(
        self,
        logits: Tensor,
        rows: Rows,
        pairs: Pairs,
        groups: GroupState,
        whole_batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> GroupRobustTables:
        """Everything after the logits. Rows have no token weights, pairs a loss whose entry says ``fused``.

        ``whole_batch(sums, counts)``, where given, makes those of all ranks from the rank's own.
        """
        ...

    def token_logps_backward(
        self, dtoken_logps: Upstream, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
    ) -> None:
        """As in `KernelBackend`, from gradients of tokens or of sequences."""
        ...
