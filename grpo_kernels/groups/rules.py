"""How the losses of K groups become the weights alpha: pure functions, one entry for each rule of GroupWeights.

All work on the last dimension, so that many runs can be moved at once, in float64 and as logarithms. mu is the prior
(uniform, or the groups' shares of the data), L the group losses; a larger L never gets a smaller alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BISECTIONS = 60  # each halves the interval; 2**-60 of the range of the losses is below float64's rounding


@dataclass(frozen=True)
class AlphaRule:
    """log_weights(log_alpha, log_prior, losses, parameter) -> (..., K), normalised over the groups.

    ``log_prior`` and ``log_alpha`` (not normalised) are -inf for groups that take no part; those get -inf.
    """

    log_weights: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    parameter: str
    """Name of the option of GroupWeights that the rule takes; its range follows."""
    low: float = 0.0
    high: float = math.inf
    open_low: bool = False
    softer: str = "smaller"
    """How the parameter is to be chosen so that alpha moves less: "smaller" or "larger"."""
    source: str = ""


def _exponentiated_gradient(log_alpha: Tensor, log_prior: Tensor, losses: Tensor, step_size: float) -> Tensor:
    """alpha_g exp(eta L_g) / sum_k alpha_k exp(eta L_k): one ascent step from the last alpha. The prior has no part."""
    return (log_alpha + step_size * losses).log_softmax(-1)


def _soft_maximum(log_alpha: Tensor, log_prior: Tensor, losses: Tensor, temperature: float) -> Tensor:
    """softmax(log mu + L / tau), the maximiser of <alpha, L> - tau KL(alpha || mu)."""
    return (log_prior + losses / temperature).log_softmax(-1)


def _cvar(log_alpha: Tensor, log_prior: Tensor, losses: Tensor, level: float) -> Tensor:
    """The maximiser of <alpha, L> with alpha_g <= mu_g / level: the prior on the worst ``level`` of its mass.

    Groups of equal loss share in proportion to mu.
    """
    prior = log_prior.softmax(-1)
    losses = losses.masked_fill(prior == 0, -math.inf)
    ascending, order = losses.sort(-1)
    mass_below = torch.nn.functional.pad(prior.gather(-1, order).cumsum(-1), (1, 0))
    values = losses.contiguous()
    first = torch.searchsorted(ascending, values)  # of the groups with this very loss
    last = torch.searchsorted(ascending, values, right=True)
    tied = mass_below.gather(-1, last) - mass_below.gather(-1, first)
    above = mass_below[..., -1:] - mass_below.gather(-1, last)
    share = torch.minimum((level - above).clamp(min=0), tied) / tied
    return _log_normalised(torch.where(prior > 0, prior * share, 0))


def _chi_squared(log_alpha: Tensor, log_prior: Tensor, losses: Tensor, radius: float) -> Tensor:
    """The maximiser of <alpha, L> with sum_g (alpha_g - mu_g)^2 / mu_g <= radius.

    alpha_g is in proportion to mu_g max(0, L_g - c). While no group is at 0, c is known; else it is found by bisection
    on sum_g alpha_g^2 / mu_g = 1 + radius, which rises with c.
    """
    prior = log_prior.softmax(-1)
    taking_part = prior > 0
    excess = losses.masked_fill(~taking_part, -math.inf)
    excess = excess - excess.amax(-1, keepdim=True)
    lowest = torch.where(taking_part, excess, 0).amin(-1, keepdim=True)
    excess = torch.where(taking_part, excess, lowest)
    centred = excess - (prior * excess).sum(-1, keepdim=True)
    variance = (prior * centred**2).sum(-1, keepdim=True)
    spread = variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()  # equal losses: centred is 0
    inside = 1 + math.sqrt(radius) * centred / spread
    low, high = lowest.clone(), torch.zeros_like(lowest)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = (excess - middle).clamp(min=0)
        too_even = (prior * above**2).sum(-1, keepdim=True) < (1 + radius) * (prior * above).sum(-1, keepdim=True) ** 2
        low, high = torch.where(too_even, middle, low), torch.where(too_even, high, middle)
    all_positive = torch.where(taking_part, inside, 1).amin(-1, keepdim=True) >= 0
    return _log_normalised(prior * torch.where(all_positive, inside, (excess - low).clamp(min=0)))


def _power(log_alpha: Tensor, log_prior: Tensor, losses: Tensor, exponent: float) -> Tensor:
    """In proportion to mu_g max(0, L_g)^q, the weights of the gradient of sum_g mu_g L_g^(q + 1) / (q + 1)."""
    positive = losses.clamp(min=0)
    log_weights = log_prior + torch.special.xlogy(exponent, positive)
    none = ~((positive > 0) & (log_prior > -math.inf)).any(-1, keepdim=True)
    return torch.where(none, log_prior, log_weights).log_softmax(-1)


def _log_normalised(weights: Tensor) -> Tensor:
    return (weights / weights.sum(-1, keepdim=True)).log()


ALPHA_RULES: dict[str, AlphaRule] = {
    "exponentiated_gradient": AlphaRule(
        _exponentiated_gradient, "step_size", softer="smaller", source="Ramesh et al. 2024, algorithm 1"
    ),
    "soft_maximum": AlphaRule(
        _soft_maximum,
        "temperature",
        open_low=True,
        softer="larger",
        source="KL-regularised maximum; tilted losses at 1/t, Li et al. 2021",
    ),
    "cvar": AlphaRule(
        _cvar,
        "level",
        high=1.0,
        open_low=True,
        softer="larger",
        source="Rockafellar and Uryasev 2000; over groups: Oren et al. 2019",
    ),
    "chi_squared": AlphaRule(
        _chi_squared, "radius", softer="smaller", source="Hashimoto et al. 2018; Namkoong and Duchi 2017"
    ),
    "power": AlphaRule(_power, "exponent", softer="smaller", source="q-fairness, Li et al. 2020"),
}


def moved_log_alpha(
    log_alpha: Tensor,
    losses: Tensor,
    present: Tensor,
    log_prior: Tensor,
    *,
    rule: str,
    parameter: float,
    floor: float = 0.0,
) -> Tensor:
    """log alpha after one update: the present groups share their mass anew by the rule, the absent ones keep theirs.

    alpha_g = floor/K + (mass of the present - floor/K each) * weights_g of the rule over the present.

    Args:
        log_alpha: (..., K) float64, normalised.
        losses: (..., K) float64; those of absent groups are not looked at.
        present: (..., K) bool.
        log_prior: (K,) or (..., K), need not be normalised.

    Returns:
        (..., K) float64, normalised; -inf where alpha is 0. Where no group is present it is undefined.
    """
    among = log_alpha.masked_fill(~present, -math.inf)
    log_mass = among.logsumexp(-1, keepdim=True)
    # Groups that another rule has left no weight: alike among themselves, for 0 / 0 is no share.
    among = torch.where(present & (log_mass == -math.inf), 0.0, among)
    prior_among = log_prior.expand_as(losses).masked_fill(~present, -math.inf)
    log_share = ALPHA_RULES[rule].log_weights(among, prior_among, losses, parameter)
    if floor:
        least = floor / log_alpha.shape[-1]
        above = (log_mass.exp() - least * present.double().sum(-1, keepdim=True)).clamp(min=0)
        moved = torch.logaddexp(torch.full_like(log_share, math.log(least)), above.log() + log_share)
    else:
        moved = log_mass + log_share
    moved = torch.where(present, moved, log_alpha)
    return moved - moved.logsumexp(-1, keepdim=True)  # rounding must not drift off the simplex over a million steps
