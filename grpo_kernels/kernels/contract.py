"""What every optimised backend implements. A new backend is one module with these two functions.

Rows are the positions of a batch in any layout: logits (..., V) come with labels (...), already aligned with them.
A row whose label is ``ignore_index`` is never read: its token_logps, lse and gradient are 0. A row whose label is
outside [0, V) reads nothing out of bounds: its token_logps, lse and gradient are NaN.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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
