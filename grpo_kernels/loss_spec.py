"""Which pair losses are added up, on which scores, and the losses and slopes that come of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grpo_kernels import validation
from grpo_kernels.pair_losses import PAIR_LOSSES, REFUSED, Number, PairLoss, Scores

MAX_EXPONENT = 80.0
"""e^80 holds in float32. A score is constant beyond: no infinity, of which two in a pair would make NaN."""


def _alpha_divergence(y: Tensor, coef: float) -> tuple[Tensor, Tensor]:
    exponent = (coef - 1) * y
    slope = torch.where(exponent < MAX_EXPONENT, exponent.clamp(max=MAX_EXPONENT).exp(), 0.0)
    return torch.expm1(exponent.clamp(max=MAX_EXPONENT)) / (coef - 1), slope


F_DIVERGENCES: dict[str, Callable[[Tensor, float], tuple[Tensor, Tensor]]] = {
    "reverse_kl": lambda y, coef: (y, torch.ones_like(y)),
    "forward_kl": lambda y, coef: _alpha_divergence(y, 0.0),
    "js_divergence": lambda y, coef: (math.log(2) + logsigmoid(y), torch.sigmoid(-y)),
    "alpha_divergence": _alpha_divergence,
}
"""u(y) and u'(y), the score in place of a log-ratio y (f-DPO, Wang et al. 2023); ``coef``: of the alpha-divergence."""


class Sequences(NamedTuple):
    """Of n pairs: (2, n) each, the chosen and the rejected."""

    logps: Tensor
    ref_logps: Tensor | None = None
    token_counts: Tensor | None = None
    """At least 1; given where a loss uses them."""
    margin: Tensor | None = None  # (n,)


OTHER_NAMES = {"gr-dpo": "sigmoid", "cdpo": "sigmoid", "logistic": "sigmoid", "gr-ipo": "ipo"}
OTHER_NAMES |= {"slic": "hinge", "rso": "hinge", "rdpo": "robust"}


@dataclass(frozen=True)
class LossSpec:
    """Which losses are added up, and on which scores."""

    loss_types: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] = (1.0,)
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    discopop_tau: float = 0.05

    @classmethod
    def of(cls, loss_type: Any, loss_weights: Any = None, **options: Any) -> LossSpec:
        """Of what a public function was given: a name, or a list of names with a list of weights."""
        validation.check_sequence("loss_type", loss_type, "a name or a list of names")
        names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        weights = (1.0,) * len(names) if loss_weights is None else loss_weights
        validation.check_sequence("loss_weights", weights, "a list of numbers")
        for weight in weights:
            validation.check_number("loss_weights", weight, -math.inf)
        spec = cls(names, tuple(map(float, weights)), **options)
        for name in names:
            lower = name.lower() if isinstance(name, str) else ""
            if lower in REFUSED:
                raise ValueError(f"loss_type must be one of {', '.join(PAIR_LOSSES)}, got {name!r}: {REFUSED[lower]}")
            known = OTHER_NAMES.get(lower, lower)
            if name not in PAIR_LOSSES and known in PAIR_LOSSES:
                raise ValueError(f"loss_type must be {known!r} for what is also called {name!r}")
            validation.check_choice("loss_type", name, tuple(PAIR_LOSSES))
            if not isinstance(PAIR_LOSSES[name], PairLoss):
                raise TypeError(f"PAIR_LOSSES[{name!r}] must be a PairLoss, got {type(PAIR_LOSSES[name]).__name__}")
        if not names or len(weights) != len(names):
            raise ValueError(
                f"loss_weights must have a number for each of loss_type={list(names)}, got {list(weights)}"
            )
        validation.check_choice("f_divergence_type", spec.f_divergence_type, tuple(F_DIVERGENCES))
        validation.check_number("f_alpha_divergence_coef", spec.f_alpha_divergence_coef, -math.inf)
        validation.check_number("discopop_tau", spec.discopop_tau, 0.0, open_low=True)
        if spec.f_divergence_type == "alpha_divergence" and spec.f_alpha_divergence_coef == 1:
            raise ValueError("f_alpha_divergence_coef must not be 1: that limit is f_divergence_type='reverse_kl'")
        if spec.f_divergence_type != "reverse_kl" and not all(x.of_margin and x.uses_reference for x in spec.entries):
            raise ValueError(
                f"f_divergence_type={spec.f_divergence_type!r} has a meaning for losses of the margin of log-ratios "
                f"only, got loss_type={list(names)}"
            )
        for option, user, is_used in (
            ("discopop_tau", "loss_type='discopop'", "discopop" in names),
            (
                "f_alpha_divergence_coef",
                "f_divergence_type='alpha_divergence'",
                spec.f_divergence_type == "alpha_divergence",
            ),
        ):
            if not is_used and getattr(spec, option) != getattr(cls, option):
                raise ValueError(f"{option} has no meaning without {user}, got {getattr(spec, option)}")
        return spec

    @property
    def entries(self) -> list[PairLoss]:
        return [PAIR_LOSSES[name] for name in self.loss_types]

    @property
    def uses_reference(self) -> bool:
        return any(entry.uses_reference for entry in self.entries)

    @property
    def uses_counts(self) -> bool:
        return self.use_weighting or any(entry.uses_counts for entry in self.entries)

    @property
    def of_margin(self) -> bool:
        return all(entry.of_margin for entry in self.entries)

    @property
    def is_fused(self) -> bool:
        """Whether kernels that fuse the whole loss know it."""
        plain = not self.use_weighting and self.f_divergence_type == "reverse_kl" and self.loss_weights == (1.0,)
        return plain and self.entries[0].fused

    def preferences(self) -> LossSpec:
        """Without the losses that compare nothing.

        Raises:
            ValueError: there is none, or nothing else.
        """
        kept = [i for i, entry in enumerate(self.entries) if entry.is_preference]
        if len(kept) in (0, len(self.entries)):
            raise ValueError(
                "alpha_follows='preference' has a meaning where loss_type lists 'sft' beside a loss of preferences, "
                f"got {list(self.loss_types)}"
            )
        names, weights = tuple(self.loss_types[i] for i in kept), tuple(self.loss_weights[i] for i in kept)
        return replace(self, loss_types=names, loss_weights=weights)

    def check_label_smoothing(self, e: Any, num_pairs: int | None = None, device: torch.device | None = None) -> None:
        """A number in [0, 1/2), or (B,): what a tensor holds is checked on a CPU, elsewhere in debug mode."""
        users = [entry for entry in self.entries if entry.uses_label_smoothing]
        if isinstance(e, Tensor):
            validation.check_pair_vector("label_smoothing", e, num_pairs, device)
            if validation.debug_checks_on() or (e.device.type == "cpu" and not torch.compiler.is_compiling()):
                self._check_soft_labels(e, users)
        else:
            open_low = any(entry.needs_label_smoothing for entry in users)
            validation.check_number("label_smoothing", e, 0.0, 0.5, open_low=open_low, open_high=True)
        if not users and (isinstance(e, Tensor) or e):
            names = self.loss_types[0] if len(self.loss_types) == 1 else list(self.loss_types)
            raise ValueError(f"label_smoothing has no meaning for loss_type={names!r}, got {e}")

    def _check_soft_labels(self, e: Tensor, users: list[PairLoss]) -> None:
        below_half = any(entry.below_half for entry in users)
        above_zero = any(entry.needs_label_smoothing for entry in users)
        holds = (e > 0) & (e < 1) if above_zero else (e >= 0) & (e <= 1)
        if below_half:
            holds &= e < 0.5
        if not bool(holds.all()):
            interval = f"{'(' if above_zero else '['}0, {'1/2)' if below_half else '1)' if above_zero else '1]'}"
            raise ValueError(
                f"label_smoothing must be in {interval} for each pair with loss_type={list(self.loss_types)}, got "
                f"{e[~holds][0].item():.6g}"
            )


def value_and_slopes(spec: LossSpec, sequences: Sequences, beta: Number, e: Number) -> tuple[Tensor, Tensor]:
    """Losses (n,) of n pairs and their slopes (2, n) in the log-probabilities of the chosen and the rejected."""
    logps, counts = sequences.logps, sequences.token_counts
    ratios = logps if sequences.ref_logps is None else logps - sequences.ref_logps
    u_slope = None
    if spec.f_divergence_type != "reverse_kl":
        ratios, u_slope = F_DIVERGENCES[spec.f_divergence_type](ratios, spec.f_alpha_divergence_coef)
    found = []
    for name, weight in zip(spec.loss_types, spec.loss_weights, strict=True):
        entry = PAIR_LOSSES[name]
        x = ratios if entry.uses_reference else logps
        if entry.is_mean:
            x = x / _known(counts)
        scores = Scores(x[0], x[1], sequences.margin, None if counts is None else counts[0], spec.discopop_tau)
        smoothing = e if entry.uses_label_smoothing else 0.0
        losses, of_scores = entry.value(scores, beta, smoothing), entry.slopes(scores, beta, smoothing)
        if losses.shape != x[0].shape or len(of_scores) != 2 or of_scores[0].shape != x[0].shape:
            raise ValueError(
                f"PAIR_LOSSES[{name!r}] must give a loss and two slopes of shape {tuple(x[0].shape)}, one for each "
                f"pair, got {tuple(losses.shape)} and {[tuple(slope.shape) for slope in of_scores]}"
            )
        slopes = torch.stack(of_scores)
        if entry.is_mean:
            slopes = slopes / _known(counts)
        if u_slope is not None:
            slopes = slopes * u_slope
        found.append((losses, slopes) if weight == 1.0 else (weight * losses, weight * slopes))
    losses, slopes = found[0]
    for more_losses, more_slopes in found[1:]:
        losses, slopes = losses + more_losses, slopes + more_slopes
    if spec.use_weighting:
        likelihood = (logps.detach() / _known(counts)).sum(0).clamp(max=0).exp()  # a constant for autograd
        losses, slopes = losses * likelihood, slopes * likelihood
    return losses, slopes


def _known(counts: Tensor | None) -> Tensor:
    assert counts is not None  # checked where they were given
    return counts
