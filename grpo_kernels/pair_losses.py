"""One entry for each loss_type: the loss of a pair and its derivative in the margin h.

h = (logp_w - ref_w) - (logp_l - ref_l) does not contain beta. beta is a number or a (B,) tensor, e the label
smoothing (``sigmoid``) or the flip rate (``robust``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Beta = float | Tensor


@dataclass(frozen=True)
class PairLoss:
    """A loss of the chosen and the rejected sequence's score, (n,) each, elementwise: here of their difference alone.

    value(h, beta, e) and derivative(h, beta, e) are elementwise over h (n,).

    ``fused``: kernels that compute the whole loss in one launch know it, too; otherwise it is computed after them.
    """

    value: Callable[[Tensor, Beta, float], Tensor]
    derivative: Callable[[Tensor, Beta, float], Tensor]
    uses_label_smoothing: bool
    source: str
    fused: bool = False

    def value_and_slopes(
        self, chosen: Tensor, rejected: Tensor, margin: Tensor | None, beta: Beta, e: float
    ) -> tuple[Tensor, Tensor]:
        """l (n,) and its slopes (2, n) in the chosen and the rejected score."""
        h = chosen - rejected
        if margin is not None:
            h = h - margin
        slope = self.derivative(h, beta, e)
        return self.value(h, beta, e), torch.stack([slope, -slope])


def _sigmoid(h: Tensor, beta: Beta, e: float) -> Tensor:
    if not e:  # the usual, at half the cost
        return -logsigmoid(beta * h)
    return -(1 - e) * logsigmoid(beta * h) - e * logsigmoid(-beta * h)


def _sigmoid_derivative(h: Tensor, beta: Beta, e: float) -> Tensor:
    if not e:
        return -beta * torch.sigmoid(-beta * h)
    return beta * (e * torch.sigmoid(beta * h) - (1 - e) * torch.sigmoid(-beta * h))


def _ipo(h: Tensor, beta: Beta, e: float) -> Tensor:
    return (h - 0.5 / beta) ** 2


def _ipo_derivative(h: Tensor, beta: Beta, e: float) -> Tensor:
    return 2 * (h - 0.5 / beta)


def _hinge(h: Tensor, beta: Beta, e: float) -> Tensor:
    return torch.relu(1 - beta * h)


def _hinge_derivative(h: Tensor, beta: Beta, e: float) -> Tensor:
    # Multiplied rather than selected, so that a NaN margin gives a NaN derivative.
    return -beta * torch.heaviside(1 - beta * h, torch.zeros_like(h))


def _robust(h: Tensor, beta: Beta, e: float) -> Tensor:
    return (-(1 - e) * logsigmoid(beta * h) + e * logsigmoid(-beta * h)) / (1 - 2 * e)


def _robust_derivative(h: Tensor, beta: Beta, e: float) -> Tensor:
    return -beta * ((1 - e) * torch.sigmoid(-beta * h) + e * torch.sigmoid(beta * h)) / (1 - 2 * e)


PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(
        _sigmoid,
        _sigmoid_derivative,
        uses_label_smoothing=True,
        source="DPO, Rafailov et al. 2023, eq. 7; label smoothing: cDPO, Mitchell 2023",
        fused=True,
    ),
    "ipo": PairLoss(
        _ipo,
        _ipo_derivative,
        uses_label_smoothing=False,
        source="IPO, Gheshlaghi Azar et al. 2023, eq. 17",
        fused=True,
    ),
    "hinge": PairLoss(
        _hinge,
        _hinge_derivative,
        uses_label_smoothing=False,
        source="RSO / SLiC, Liu et al. 2023, eq. 11",
        fused=True,
    ),
    "robust": PairLoss(
        _robust,
        _robust_derivative,
        uses_label_smoothing=True,
        source="rDPO, Chowdhury et al. 2024, eq. 12",
        fused=True,
    ),
}
