"""One entry for each loss_type: the loss of a pair, and its slopes in the chosen and the rejected sequence's score.

A score x is what `PairLoss.score` says of a sequence's log-probability; h = x_w - x_l - margin does not contain beta.
beta is a number or (B,), e the label smoothing (for "robust": the flip rate), s the logistic function, log s its log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Number = float | Tensor
SCORES = ("log-ratio", "mean log-ratio", "logp", "mean logp")
"""log p - log p_ref or log p of a sequence, summed over its counted tokens or averaged; logp has no reference."""


class Scores(NamedTuple):
    """Of n pairs, (n,) each."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None = None
    chosen_tokens: Tensor | None = None
    """Counted tokens of the chosen sequences, where a loss uses them."""
    tau: float = 0.05
    """Of discopop."""

    @property
    def h(self) -> Tensor:
        h = self.chosen - self.rejected
        return h if self.margin is None else h - self.margin


@dataclass(frozen=True)
class PairLoss:
    """value(scores, beta, e) -> (n,), slopes(scores, beta, e) -> dl/dx_w and dl/dx_l, elementwise.

    ``of_margin``: a function of h alone, so that a margin and an f-divergence have a meaning. ``fused``: kernels that
    compute the whole loss in one launch know it, too; otherwise it is computed after the log-probabilities.
    """

    value: Callable[[Scores, Number, Number], Tensor]
    slopes: Callable[[Scores, Number, Number], tuple[Tensor, Tensor]]
    formula: str
    source: str
    score: str = "log-ratio"
    of_margin: bool = True
    uses_label_smoothing: bool = False
    needs_label_smoothing: bool = False
    below_half: bool = False
    """Whether soft labels of 1/2 and more have no meaning; where nobody checks (on a GPU), they give NaN."""
    fused: bool = False
    adds_mean: bool = False
    """Whether a sum's loss has a term of the mean, too."""
    moves_alpha: str = "the pairs that are least separated"
    """Which pairs' groups gain weight."""
    is_preference: bool = True
    """Whether it compares: alpha_follows="preference" leaves out what does not."""

    @property
    def uses_reference(self) -> bool:
        return self.score.endswith("log-ratio")

    @property
    def is_mean(self) -> bool:
        return self.score.startswith("mean")

    @property
    def uses_counts(self) -> bool:
        return self.is_mean or self.adds_mean


def _opposite(slope: Tensor) -> tuple[Tensor, Tensor]:
    return slope, -slope


def _s_slope(z: Tensor) -> Tensor:
    """ds/dz."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _sigmoid(x: Scores, beta: Number, e: Number) -> Tensor:
    z = beta * x.h
    if isinstance(e, float) and not e:  # the usual, at half the cost
        return -logsigmoid(z)
    return -(1 - e) * logsigmoid(z) - e * logsigmoid(-z)


def _sigmoid_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    z = beta * x.h
    if isinstance(e, float) and not e:
        return _opposite(-beta * torch.sigmoid(-z))
    return _opposite(beta * (e * torch.sigmoid(z) - (1 - e) * torch.sigmoid(-z)))


def _ipo(x: Scores, beta: Number, e: Number) -> Tensor:
    return (x.h - 0.5 / beta) ** 2


def _ipo_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    return _opposite(2 * (x.h - 0.5 / beta))


def _hinge(x: Scores, beta: Number, e: Number) -> Tensor:
    return torch.relu(1 - beta * x.h)


def _hinge_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    gap = 1 - beta * x.h
    slope = -beta * (gap > 0).to(gap.dtype)
    return _opposite(slope.masked_fill(gap.isnan(), torch.nan))  # a NaN margin gives a NaN slope


def _more_right_than_wrong(e: Number) -> Number:
    """1 - 2e, NaN where it is not positive."""
    return torch.where(e < 0.5, 1 - 2 * e, torch.nan) if isinstance(e, Tensor) else 1 - 2 * e


def _robust(x: Scores, beta: Number, e: Number) -> Tensor:
    z = beta * x.h
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / _more_right_than_wrong(e)


def _robust_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    z = beta * x.h
    return _opposite(-beta * ((1 - e) * torch.sigmoid(-z) + e * torch.sigmoid(z)) / _more_right_than_wrong(e))


def _log_of(e: Number) -> Number:
    return e.log() if isinstance(e, Tensor) else math.log(e)


def _exo(x: Scores, beta: Number, e: Number) -> Tensor:
    z = beta * x.h
    of_chosen = torch.sigmoid(z) * (logsigmoid(z) - _log_of(1 - e))
    return of_chosen + torch.sigmoid(-z) * (logsigmoid(-z) - _log_of(e))


def _exo_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    z = beta * x.h
    return _opposite(beta * _s_slope(z) * (z - _log_of((1 - e) / e)))


def _discopop(x: Scores, beta: Number, e: Number) -> Tensor:
    # e^-z s(z / tau) in one exponent: apart, e^-z overflows where s is 0.
    z = beta * x.h
    return -logsigmoid(z) * torch.sigmoid(-z / x.tau) + (logsigmoid(z / x.tau) - z).exp()


def _discopop_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    z, t = beta * x.h, x.tau
    exponential = (logsigmoid(z / t) - z).exp()  # e^-z s(z / t)
    logistic = -torch.sigmoid(-z) * torch.sigmoid(-z / t) + logsigmoid(z) * _s_slope(z / t) / t
    return _opposite(beta * (logistic - exponential + exponential * torch.sigmoid(-z / t) / t))


def _apo_zero(x: Scores, beta: Number, e: Number) -> Tensor:
    return torch.sigmoid(-beta * x.chosen) + torch.sigmoid(beta * x.rejected)


def _apo_zero_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    return -beta * _s_slope(beta * x.chosen), beta * _s_slope(beta * x.rejected)


def _apo_down(x: Scores, beta: Number, e: Number) -> Tensor:
    return torch.sigmoid(beta * x.chosen) + torch.sigmoid(-beta * x.h)


def _apo_down_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    of_difference = beta * _s_slope(beta * x.h)
    return beta * _s_slope(beta * x.chosen) - of_difference, of_difference


def _bco(x: Scores, beta: Number, e: Number) -> Tensor:
    return -logsigmoid(beta * x.chosen) - logsigmoid(-beta * x.rejected)


def _bco_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    return -beta * torch.sigmoid(-beta * x.chosen), beta * torch.sigmoid(beta * x.rejected)


def _nca(x: Scores, beta: Number, e: Number) -> Tensor:
    z = beta * x.chosen
    return -logsigmoid(z) - 0.5 * logsigmoid(-z) - 0.5 * logsigmoid(-beta * x.rejected)


def _nca_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    # 1.5 s(z) - 1 without the difference of two near numbers where s is 1.
    of_chosen = 0.5 * torch.sigmoid(beta * x.chosen) - torch.sigmoid(-beta * x.chosen)
    return beta * of_chosen, 0.5 * beta * torch.sigmoid(beta * x.rejected)


def _sppo(x: Scores, beta: Number, e: Number) -> Tensor:
    return (x.chosen - 0.5 / beta) ** 2 + (x.rejected + 0.5 / beta) ** 2


def _sppo_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    return 2 * (x.chosen - 0.5 / beta), 2 * (x.rejected + 0.5 / beta)


def _sft(x: Scores, beta: Number, e: Number) -> Tensor:
    return -x.chosen


def _sft_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    return torch.full_like(x.chosen, -1.0) + 0 * x.chosen, 0 * x.rejected  # a NaN stays one


def _less_than_certain(mean: Tensor) -> Tensor:
    """A mean of 0, of an answer without tokens or of certain ones, would have infinite odds."""
    return mean.clamp(max=-torch.finfo(mean.dtype).eps)


def _log_odds(mean: Tensor) -> Tensor:
    return mean - torch.log(-torch.expm1(mean))


def _orpo(x: Scores, beta: Number, e: Number) -> Tensor:
    chosen, rejected = (_less_than_certain(mean) for mean in (x.chosen, x.rejected))
    return -x.chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _orpo_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    chosen, rejected = (_less_than_certain(mean) for mean in (x.chosen, x.rejected))
    pull = beta * torch.sigmoid(_log_odds(rejected) - _log_odds(chosen))
    return -1 + pull / torch.expm1(chosen), -pull / torch.expm1(rejected)


def _cpo(x: Scores, beta: Number, e: Number) -> Tensor:
    assert x.chosen_tokens is not None
    return _sigmoid(x, beta, e) - x.chosen / x.chosen_tokens


def _cpo_slopes(x: Scores, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    assert x.chosen_tokens is not None
    of_chosen, of_rejected = _sigmoid_slopes(x, beta, e)
    return of_chosen - 1 / x.chosen_tokens, of_rejected


_UNLIKELY = "pairs whose chosen answer lost likelihood or whose rejected one gained it"

PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(
        _sigmoid,
        _sigmoid_slopes,
        "-(1-e) log s(beta h) - e log s(-beta h)",
        "DPO, Rafailov et al. 2023, eq. 7; e: cDPO, Mitchell 2023",
        uses_label_smoothing=True,
        fused=True,
    ),
    "sigmoid_norm": PairLoss(
        _sigmoid,
        _sigmoid_slopes,
        "sigmoid of means",
        "length-normalised DPO: Tulu 3, Lambert et al. 2024, section 5.1.2",
        score="mean log-ratio",
        uses_label_smoothing=True,
    ),
    "simpo": PairLoss(
        _sigmoid,
        _sigmoid_slopes,
        "-log s(beta h), margin = gamma / beta",
        "SimPO, Meng et al. 2024, eq. 6",
        score="mean logp",
    ),
    "cpo": PairLoss(
        _cpo,
        _cpo_slopes,
        "sigmoid - x_w / tokens_w",
        "CPO, Xu et al. 2024, eq. 6",
        score="logp",
        adds_mean=True,
        uses_label_smoothing=True,
        moves_alpha="pairs that are little separated or whose chosen answer is unlikely",
    ),
    "ipo": PairLoss(
        _ipo,
        _ipo_slopes,
        "(h - 1 / (2 beta))^2",
        "IPO, Gheshlaghi Azar et al. 2023, eq. 17",
        fused=True,
        moves_alpha="pairs farthest from the margin 1 / (2 beta), on either side",
    ),
    "ipo_norm": PairLoss(
        _ipo,
        _ipo_slopes,
        "ipo of means",
        "what TRL calls ipo",
        score="mean log-ratio",
        moves_alpha="pairs farthest from the margin 1 / (2 beta), on either side",
    ),
    "hinge": PairLoss(_hinge, _hinge_slopes, "max(0, 1 - beta h)", "RSO / SLiC, Liu et al. 2023, eq. 11", fused=True),
    "robust": PairLoss(
        _robust,
        _robust_slopes,
        "[-(1-e) log s(beta h) + e log s(-beta h)] / (1 - 2e)",
        "rDPO, Chowdhury et al. 2024, eq. 12",
        uses_label_smoothing=True,
        below_half=True,
        fused=True,
    ),
    "exo_pair": PairLoss(
        _exo,
        _exo_slopes,
        "q (log q - log(1-e)) + (1-q) (log(1-q) - log e), q = s(beta h)",
        "EXO, Ji et al. 2024, eq. 16",
        uses_label_smoothing=True,
        needs_label_smoothing=True,
    ),
    "discopop": PairLoss(
        _discopop,
        _discopop_slopes,
        "-log s(z) (1 - m) + e^-z m, z = beta h, m = s(z / tau)",
        "DiscoPOP, Lu et al. 2024, eq. 5",
    ),
    "apo_zero": PairLoss(
        _apo_zero,
        _apo_zero_slopes,
        "1 - s(beta x_w) + s(beta x_l)",
        "APO, D'Oosterlinck et al. 2024, eq. 7",
        of_margin=False,
        moves_alpha=_UNLIKELY,
    ),
    "apo_down": PairLoss(
        _apo_down,
        _apo_down_slopes,
        "s(beta x_w) + 1 - s(beta h)",
        "APO, D'Oosterlinck et al. 2024, eq. 8",
        of_margin=False,
        moves_alpha="pairs whose chosen answer gained likelihood, or that are little separated",
    ),
    "bco_pair": PairLoss(
        _bco,
        _bco_slopes,
        "-log s(beta x_w) - log s(-beta x_l)",
        "BCO, Jung et al. 2024, with delta = 0",
        of_margin=False,
        moves_alpha=_UNLIKELY,
    ),
    "nca_pair": PairLoss(
        _nca,
        _nca_slopes,
        "-log s(z_w) - 1/2 log s(-z_w) - 1/2 log s(-z_l), z = beta x",
        "NCA, Chen et al. 2024",
        of_margin=False,
        moves_alpha="pairs whose log-ratios are far from 0",
    ),
    "sppo_hard": PairLoss(
        _sppo,
        _sppo_slopes,
        "(x_w - 1 / (2 beta))^2 + (x_l + 1 / (2 beta))^2",
        "SPPO, Wu et al. 2024, eq. 4.7 with probabilities 1 and 0",
        of_margin=False,
        moves_alpha="pairs whose log-ratios are far from +-1 / (2 beta)",
    ),
    "sft": PairLoss(
        _sft,
        _sft_slopes,
        "-x_w",
        "the mean negative log-likelihood of the chosen answer, per pair",
        score="mean logp",
        of_margin=False,
        moves_alpha="pairs whose chosen answer is unlikely a token: long and rare text weighs groups, too",
        is_preference=False,
    ),
    "orpo": PairLoss(
        _orpo,
        _orpo_slopes,
        "-x_w - beta log s(LO(x_w) - LO(x_l)), LO(x) = x - log(1 - e^x)",
        "ORPO, Hong et al. 2024, eq. 6",
        score="mean logp",
        of_margin=False,
        moves_alpha="pairs whose chosen answer is unlikely a token, or less likely than the rejected one",
    ),
}


def of_h(h: Tensor) -> Scores:
    """Scores with this difference, for whoever has margins only."""
    return Scores(h, h.new_zeros(()))


REFUSED = {
    "aot": "it sorts the log-ratios of a batch, so that no pair has a loss of its own that its group could weigh",
    "aot_unpaired": "it sorts the log-ratios of a batch, so that no pair has a loss of its own",
    "dpo": "DPO is called 'sigmoid'",
    "kto": "it is a loss of single answers, not of pairs",
}
