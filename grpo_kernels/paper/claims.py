"""The paper's claims, checked on the results of `reproduce`: what holds, what does not, and by how much.

Claims are about means over seeds unless they say "each seed".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.functional import preference_losses

Results = dict[str, Any]
ROUNDING = 1e-9
TOLERANCE = 0.005  # of the whole change: the chi curves may go so far the wrong way from one chi to the next


@dataclass(frozen=True)
class Claim:
    text: str
    holds: bool
    detail: str


def cell(results: Results, scenario: str, features: str, method: str) -> dict[str, Any]:
    """The comparison's record of one scenario, features and method."""
    wanted = (scenario, features, method)
    return next(r for r in results["comparison"] if (r["scenario"], r["features"], r["method"]) == wanted)


def check_claims(results: Results) -> list[Claim]:
    claims = []
    for family in ("DPO", "IPO"):
        claims += [smallest_worst_loss(results, family, features) for features in ("swapped", "same", "flipped")]
        claims += [never_worse_on_training_pairs(results, family), lead_is_larger(results, family)]
        claims += [alpha_of_the_hard_group(results, family), chi_on_training_pairs(results, family)]
        claims += [chi_on_validation_pairs(results, family), chi_zero_is_importance_sampling(results, family)]
    return [*claims, losses_at_zero(), *gap_slopes(results)]


def smallest_worst_loss(results: Results, family: str, features: str) -> Claim:
    leads, holds = [], True
    for scenario in ("i", "ii", "iii"):
        mean = {m: cell(results, scenario, features, m)["worst_loss"]["mean"] for m in _methods(family)}
        plain, importance, robust = mean.values()
        holds &= robust <= min(plain, importance)
        leads.append(f"({scenario}) {robust:.4g} against {importance:.4g} and {plain:.4g}")
    text = f"GR-{family} has the smallest worst-group validation loss in all three scenarios, {features} features"
    return Claim(text, holds, "; ".join(leads))


def never_worse_on_training_pairs(results: Results, family: str) -> Claim:
    """What the method minimises is the training loss; validation adds chance."""
    worse = 0
    for record in results["comparison"]:
        if record["method"] == f"GR-{family}":
            importance = cell(results, record["scenario"], record["features"], f"IS-{family}")
            pairs = zip(
                record["training_worst_loss"]["per_seed"], importance["training_worst_loss"]["per_seed"], strict=True
            )
            worse += sum(robust > other + ROUNDING for robust, other in pairs)
    text = f"GR-{family}'s worst-group training loss is at most that of IS-{family} in each seed, scenario and features"
    return Claim(text, worse == 0, f"{worse} exceptions")


def lead_is_larger(results: Results, family: str) -> Claim:
    """In units of importance sampling's loss, swapped features."""
    lead = {}
    for scenario in ("i", "ii", "iii"):
        _, importance, robust = (cell(results, scenario, "swapped", m)["worst_loss"]["mean"] for m in _methods(family))
        lead[scenario] = (importance - robust) / importance
    text = f"GR-{family}'s lead over importance sampling is larger in (ii) and (iii) than in (i)"
    shown = ", ".join(f"({scenario}) {100 * value:.1f} %" for scenario, value in lead.items())
    return Claim(text, min(lead["ii"], lead["iii"]) > lead["i"], shown)


def alpha_of_the_hard_group(results: Results, family: str) -> Claim:
    alpha = {s: cell(results, s, "swapped", f"GR-{family}")["alpha_of_group_0"] for s in ("i", "ii", "iii")}
    rises = all(value > 0.5 for s in ("ii", "iii") for value in alpha[s]["per_seed"])
    holds = rises and abs(alpha["i"]["mean"] - 0.5) < 0.05
    text = f"GR-{family}: alpha of the hard group rises in (ii) and (iii) in each seed and stays near 1/2 in (i)"
    return Claim(text, holds, ", ".join(f"({s}) {a['mean']:.3f} ± {a['sd']:.3f}" for s, a in alpha.items()))


def chi_on_training_pairs(results: Results, family: str) -> Claim:
    """Which is what the method trades; the iterations end before the last digits do, hence the tolerance."""
    worst = _wrong_way(torch.tensor(_chi_curve(results, family, "training_worst", "per_seed")))
    average = _wrong_way(-torch.tensor(_chi_curve(results, family, "training_average", "per_seed")))
    right = int(((worst <= TOLERANCE) & (average <= TOLERANCE)).sum())
    text = f"{family}: with chi the worst-group training loss falls and the average rises, in each seed"
    detail = f"{right} of {len(worst)} seeds; {_largest_steps(float(worst.max()), float(average.max()))}"
    return Claim(text, right == len(worst), detail)


def chi_on_validation_pairs(results: Results, family: str) -> Claim:
    worst = torch.tensor(_chi_curve(results, family, "validation_worst", "mean"))
    average = torch.tensor(_chi_curve(results, family, "validation_average", "mean"))
    wrong = [float(_wrong_way(curve.unsqueeze(1))) for curve in (worst, -average)]
    text = f"{family}: with chi the worst-group validation loss falls and the average rises"
    detail = (
        f"worst {worst[0]:.4g} to {worst[-1]:.4g}, average {average[0]:.4g} to {average[-1]:.4g}; "
        f"{_largest_steps(*wrong)}"
    )
    return Claim(text, max(wrong) <= TOLERANCE, detail)


def _wrong_way(curves: Tensor) -> Tensor:
    """(seeds,): the largest rise from one chi to the next of curves (chis, seeds) that should fall, as a share of the
    whole change."""
    rises = (curves[1:] - curves[:-1]).amax(0).clamp(min=0)
    return rises / (curves[0] - curves[-1]).abs()


def _largest_steps(worst: float, average: float) -> str:
    return (
        f"largest step the wrong way {100 * worst:.2g} % (worst) and {100 * average:.2g} % (average) of all the change"
    )


def chi_zero_is_importance_sampling(results: Results, family: str) -> Claim:
    chi_zero = _chi_curve(results, family, "validation_worst", "per_seed")[0]
    importance = cell(results, "iii", "swapped", f"IS-{family}")["worst_loss"]["per_seed"]
    apart = max(abs(a - b) for a, b in zip(chi_zero, importance, strict=True))
    return Claim(f"{family}: chi = 0 is importance sampling", apart < 1e-9, f"largest difference {apart:.1e}")


def losses_at_zero() -> Claim:
    """theta = 0 makes all margins 0."""
    zero = torch.zeros(2, dtype=torch.float64)
    dpo = preference_losses(zero, beta=1.0, loss_type="sigmoid").item()
    ipo = preference_losses(zero, beta=0.1, loss_type="ipo").item()
    holds = abs(dpo - math.log(2)) < 1e-12 and abs(ipo - 1 / (4 * 0.1**2)) < 1e-12
    return Claim("theta = 0 gives log 2 (DPO) and 1/(4 beta^2) (IPO)", holds, f"{dpo:.6f} and {ipo:.6f}")


def gap_slopes(results: Results) -> list[Claim]:
    claims = []
    for curve in results["convergence"]:
        below = all(max(gaps) <= bound for gaps, bound in zip(curve["gaps"], curve["bounds"], strict=True))
        text = (
            f"duality gap of the averages, {curve['problem']}, steps x {curve['scale']:g}: below the bound, slope -1/2"
        )
        holds = below and -0.7 <= curve["slope"] <= -0.4
        claims.append(Claim(text, holds, f"slope {curve['slope']:.3f}, {'below' if below else 'NOT below'} the bound"))
    return claims


def _methods(family: str) -> tuple[str, str, str]:
    return family, f"IS-{family}", f"GR-{family}"


def _chi_curve(results: Results, family: str, part: str, statistic: str) -> list[Any]:
    """The statistic for each chi, rising."""
    return [record[part][statistic] for record in results["chi"] if record["family"] == family]
