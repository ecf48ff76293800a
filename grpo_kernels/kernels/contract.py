"""What every optimised backend implements. A new backend is one module with these four functions.

Rows are the positions of a batch in any layout: logits (..., V) and hidden (..., D) come with labels (...). Labels are
already aligned with the rows. A row whose label is ``ignore_index`` is never read: its token_logps, lse and gradient
are 0. A row whose label is outside [0, V) reads nothing out of bounds: its token_logps, lse and gradient are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class KernelBackend(Protocol):
    def token_logps_forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """(token_logps, lse), both (...) in the accumulation dtype: float64 for float64 logits, else float32."""
        ...

    def token_logps_backward(
        self, dtoken_logps: Tensor, logits: Tensor, labels: Tensor, lse: Tensor, ignore_index: int, out: Tensor
    ) -> None:
        """Write d/dlogits = dtoken_logps * (onehot(label) - softmax(logits)) into ``out``, which may be ``logits``."""
        ...

    def linear_token_logps_forward(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
    ) -> tuple[Tensor, Tensor]:
        """The same as token_logps_forward for logits = hidden @ weight.T + bias, which are never held whole."""
        ...

    def linear_token_logps_backward(
        self,
        dtoken_logps: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        lse: Tensor,
        ignore_index: int,
        needs_grad: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dhidden, dweight, dbias), None where ``needs_grad`` says that nobody asks for it."""
        ...
