"""docs/method.md's formulas in float64, written for the tests alone: value and gradient by hand, without autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def token_terms(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(logp (...), d logp / d logits (..., V)) in float64, row by row."""
    x = logits.detach().double()
    logps = torch.zeros(labels.shape, dtype=torch.float64)
    grads = torch.zeros_like(x)
    for index in (labels != ignore_index).nonzero().tolist():
        row, label = x[tuple(index)], int(labels[tuple(index)])
        peak = row.max()
        lse = peak + (row - peak).exp().sum().log()
        logps[tuple(index)] = row[label] - lse
        grads[tuple(index)] = -(row - lse).exp()
        grads[tuple(index)][label] += 1
    return logps, grads


def sequence_terms(
    logits: Tensor, labels: Tensor, cu_seqlens: list[int] | None = None, average: bool = False
) -> tuple[Tensor, Tensor]:
    """(logps (S,), d logp_s / d its logits): padded or packed."""
    logps, grads = token_terms(logits, labels)
    if cu_seqlens is None:
        pieces = [(logps[s], grads[s], labels[s]) for s in range(labels.shape[0])]
    else:
        spans = [slice(a, b) for a, b in itertools.pairwise(cu_seqlens)]
        pieces = [(logps[span], grads[span], labels[span]) for span in spans]
    sums, scaled = [], []
    for piece_logps, piece_grads, piece_labels in pieces:
        count = max(1, int((piece_labels != -100).sum())) if average else 1
        sums.append(piece_logps.sum() / count)
        scaled.append(piece_grads / count)
    return torch.stack(sums), torch.stack(scaled) if cu_seqlens is None else torch.cat(scaled)


def log_sigmoid(x: float) -> float:
    return -(max(-x, 0.0) + math.log1p(math.exp(-abs(x))))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def pair_loss(h: float, beta: float, loss_type: str, e: float = 0.0) -> tuple[float, float]:
    """(l(h), dl/dh), the table of docs/method.md."""
    if loss_type == "sigmoid":
        value = -(1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h)
        return value, -beta * (1 - e) * sigmoid(-beta * h) + beta * e * sigmoid(beta * h)
    if loss_type == "ipo":
        gap = h - 1 / (2 * beta)
        return gap**2, 2 * gap
    if loss_type == "hinge":
        return max(0.0, 1 - beta * h), -beta if beta * h < 1 else 0.0
    if loss_type == "robust":
        value = -(1 - e) * log_sigmoid(beta * h) + e * log_sigmoid(-beta * h)
        slope = -(1 - e) * beta * sigmoid(-beta * h) - e * beta * sigmoid(beta * h)
        return value / (1 - 2 * e), slope / (1 - 2 * e)
    raise AssertionError(loss_type)


def group_robust(
    h: list[float],
    group_ids: list[int],
    alpha: list[float],
    step_size: float,
    group_sizes: list[int],
    estimator: str = "importance",
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> dict[str, list[float]]:
    """Sections 2 to 4 for one batch: losses, group losses, new alpha, loss, d loss / d h."""
    num_groups, num_pairs, total = len(alpha), len(h), sum(group_sizes)
    values, slopes = zip(*(pair_loss(x, beta, loss_type, label_smoothing) for x in h), strict=True)
    counts = [group_ids.count(g) for g in range(num_groups)]
    factor = [
        (total / group_sizes[g] / num_pairs) if estimator == "importance" else 1 / max(1, counts[g])
        for g in range(num_groups)
    ]
    losses = [factor[g] * sum(v for v, i in zip(values, group_ids, strict=True) if i == g) for g in range(num_groups)]
    shares = [g for g in range(num_groups) if estimator == "importance" or counts[g]]
    mass = sum(alpha[g] for g in shares)
    largest = max(step_size * losses[g] for g in shares)
    raw = {g: alpha[g] * math.exp(step_size * losses[g] - largest) for g in shares}
    new = [mass * raw[g] / sum(raw.values()) if g in raw else alpha[g] for g in range(num_groups)]
    return {
        "pair_losses": list(values),
        "group_losses": losses,
        "alpha": new,
        "loss": [sum(a * x for a, x in zip(new, losses, strict=True))],
        "dh": [new[g] * factor[g] * slope for g, slope in zip(group_ids, slopes, strict=True)],
    }


def assert_within_budget(got: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
    """Error at most twice that of plain PyTorch in the same dtype, plus one rounding of the largest exact value.

    Of float64 the truth is no better than what it judges: some 30 roundings of each, of a sigmoid, of terms that cancel
    (robust), of sums over pairs and groups, count too.
    """
    eps = torch.finfo(got.dtype).eps * (32 if got.dtype == torch.float64 else 1)
    error = (got.double() - exact).abs().max().item()
    plain_error = (plain.double() - exact).abs().max().item()
    budget = 2 * plain_error + eps * exact.abs().max().item()
    assert error <= budget, f"{what}: error {error:.3g} is over the budget {budget:.3g} (plain: {plain_error:.3g})"


# -- every rule for alpha: (alpha of before, prior, losses, parameter) -> the new alpha, number by number ------------


def _normalised(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def exponentiated_gradient(
    alpha: list[float], prior: list[float], losses: list[float], step_size: float
) -> list[float]:
    return _normalised([a * math.exp(step_size * (x - max(losses))) for a, x in zip(alpha, losses, strict=True)])


def soft_maximum(alpha: list[float], prior: list[float], losses: list[float], temperature: float) -> list[float]:
    return _normalised([p * math.exp((x - max(losses)) / temperature) for p, x in zip(prior, losses, strict=True)])


def cvar(alpha: list[float], prior: list[float], losses: list[float], level: float) -> list[float]:
    """The worst groups get prior / level each until all of the weight is given away; equal losses share alike."""
    left, weights = 1.0, [0.0] * len(losses)
    for loss in sorted(set(losses), reverse=True):
        group = [g for g, x in enumerate(losses) if x == loss]
        wanted = sum(prior[g] for g in group) / level
        for g in group:
            weights[g] = prior[g] / level * min(1.0, left / wanted)
        left = max(0.0, left - wanted)
    return weights


def chi_squared(alpha: list[float], prior: list[float], losses: list[float], radius: float) -> list[float]:
    """prior * max(0, L - c), normalised, with the smallest c whose distance from the prior is the radius at most."""

    def weights(c: float) -> list[float]:
        return _normalised([p * max(0.0, x - c) for p, x in zip(prior, losses, strict=True)])

    def distance(c: float) -> float:
        return sum((w - p) ** 2 / p for w, p in zip(weights(c), prior, strict=True))

    spread = max(losses) - min(losses)
    if not radius or not spread:
        return list(prior)
    low, high = min(losses) - 1e6 * spread, max(losses) - 1e-9 * spread
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if distance(middle) < radius else (low, middle)
    return weights(low)


def ada_hedge(batches: list[list[float]]) -> list[tuple[list[float], float, float]]:
    """Of each batch (weights before it, eta, mixability gap), as the paper writes it, for losses of experts: -L."""
    num_groups, gap_sum, found = len(batches[0]), 0.0, []
    lost = [0.0] * num_groups  # of experts
    for losses in batches:
        expert = [-x for x in losses]
        best = min(lost)
        after = [x + y for x, y in zip(lost, expert, strict=True)]
        if gap_sum == 0:  # follow the leader
            leaders = [float(x == best) for x in lost]
            weights, eta, mix = _normalised(leaders), math.inf, min(after) - best
        else:
            eta = math.log(num_groups) / gap_sum
            weights = _normalised([math.exp(-eta * (x - best)) for x in lost])
            # -1/eta log sum_k w_k e^(-eta l_k), from the smallest loss up so that no exponent overflows
            low = min(expert)
            mix = (
                low - math.log(sum(w * math.exp(-eta * (x - low)) for w, x in zip(weights, expert, strict=True))) / eta
            )
        hedge = sum(w * x for w, x in zip(weights, expert, strict=True))
        gap = max(0.0, hedge - mix)
        found.append((weights, eta, gap))
        gap_sum, lost = gap_sum + gap, after
    return found


def power(alpha: list[float], prior: list[float], losses: list[float], exponent: float) -> list[float]:
    return _normalised([p * x**exponent for p, x in zip(prior, losses, strict=True)])


# Of each rule its formula, and the numbers to try it with: soft, sharp, at the ends of its range.
ALPHA_RULES: dict[str, tuple[Callable[..., list[float]], list[float]]] = {
    "exponentiated_gradient": (exponentiated_gradient, [0.0, 0.3, 5.0]),
    "soft_maximum": (soft_maximum, [0.1, 1.0, 50.0]),
    "cvar": (cvar, [0.05, 0.4, 1.0]),
    "chi_squared": (chi_squared, [0.0, 0.2, 2.0, 100.0]),
    "power": (power, [0.0, 0.5, 1.0, 4.0]),
}


# -- every pair loss, as its paper writes it; autograd differentiates it -------------------------------------------


def _ls(x: Tensor) -> Tensor:
    return -torch.log1p(torch.exp(-x.abs())) - torch.relu(-x)


def _exo(h: Tensor, beta: float, e: float) -> Tensor:
    q = torch.sigmoid(beta * h)
    return q * (q / (1 - e)).log() + (1 - q) * ((1 - q) / e).log()


def _discopop(h: Tensor, beta: float, e: float) -> Tensor:
    m = torch.sigmoid(beta * h / 0.05)
    return -_ls(beta * h) * (1 - m) + torch.exp(-beta * h) * m


def _log_odds(mean: Tensor) -> Tensor:
    p = mean.exp()
    return (p / (1 - p)).log()


def _dpo(h: Tensor, beta: float, e: float) -> Tensor:
    return -(1 - e) * _ls(beta * h) - e * _ls(-beta * h)


TEXTBOOK: dict[str, Callable[..., Tensor]] = {
    # (r, p, n, beta, e): log-ratios and log-probabilities (2, B) of the chosen and the rejected, tokens (2, B).
    "sigmoid": lambda r, p, n, b, e: _dpo(r[0] - r[1], b, e),
    "sigmoid_norm": lambda r, p, n, b, e: _dpo(r[0] / n[0] - r[1] / n[1], b, e),
    "simpo": lambda r, p, n, b, e: _dpo(p[0] / n[0] - p[1] / n[1], b, 0.0),
    "cpo": lambda r, p, n, b, e: _dpo(p[0] - p[1], b, e) - p[0] / n[0],
    "ipo": lambda r, p, n, b, e: (r[0] - r[1] - 1 / (2 * b)) ** 2,
    "ipo_norm": lambda r, p, n, b, e: (r[0] / n[0] - r[1] / n[1] - 1 / (2 * b)) ** 2,
    "hinge": lambda r, p, n, b, e: torch.clamp(1 - b * (r[0] - r[1]), min=0),
    "robust": lambda r, p, n, b, e: ((1 - e) * _dpo(r[0] - r[1], b, 0) - e * _dpo(r[1] - r[0], b, 0)) / (1 - 2 * e),
    "exo_pair": lambda r, p, n, b, e: _exo(r[0] - r[1], b, e),
    "discopop": lambda r, p, n, b, e: _discopop(r[0] - r[1], b, e),
    "apo_zero": lambda r, p, n, b, e: 1 - torch.sigmoid(b * r[0]) + torch.sigmoid(b * r[1]),
    "apo_down": lambda r, p, n, b, e: torch.sigmoid(b * r[0]) + 1 - torch.sigmoid(b * (r[0] - r[1])),
    "bco_pair": lambda r, p, n, b, e: -_ls(b * r[0]) - _ls(-b * r[1]),
    "nca_pair": lambda r, p, n, b, e: -_ls(b * r[0]) - 0.5 * _ls(-b * r[0]) - 0.5 * _ls(-b * r[1]),
    "sppo_hard": lambda r, p, n, b, e: (r[0] - 1 / (2 * b)) ** 2 + (r[1] + 1 / (2 * b)) ** 2,
    "sft": lambda r, p, n, b, e: -p[0] / n[0],
    "orpo": lambda r, p, n, b, e: -p[0] / n[0] - b * _ls(_log_odds(p[0] / n[0]) - _log_odds(p[1] / n[1])),
}
TEXTBOOK_DIVERGENCES = {
    "reverse_kl": lambda y, a: y,
    "forward_kl": lambda y, a: 1 - 1 / y.exp(),
    "js_divergence": lambda y, a: (2 * y.exp() / (y.exp() + 1)).log(),
    "alpha_divergence": lambda y, a: (y.exp() ** (a - 1) - 1) / (a - 1),
}
