"""Which option of GroupWeights helps with which data: the paper's scenarios and two of ours, DPO, by paired seeds.

Full-batch gradient steps as in the paper's experiment (batched.py), with what `GroupWeights` calls step_size="auto",
baseline, inner_tilt and rule="cvar"; all move alpha by the package's own functions. Dimensions: D data sets, M options,
N pairs, K groups, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.groups import hedge
from grpo_kernels.groups.rules import moved_log_alpha
from grpo_kernels.pair_losses import PAIR_LOSSES, of_h
from grpo_kernels.paper.bandit import (
    NUM_GROUPS,
    SCENARIOS,
    Bandit,
    PairData,
    Scenario,
    draw_bandit,
    draw_of,
    reward_errors,
)
from grpo_kernels.paper.batched import PairBatch
from grpo_kernels.paper.claims import Claim

LOSS, BETA, RATE, STEP_SIZE = "sigmoid", 1.0, 0.9, 0.5  # the paper's for GR-DPO
LEVEL, TAU = 0.75, -1.0  # of cvar; of the tilt: Dr. DPO's published beta' = 1
DIGITS = 5  # of what is recorded
FLIPPED = {"noisy": 0.3, "hard": 0.4}
OURS = {
    "noisy": Scenario("balanced, even; of group 0's training pairs 30 % have flipped labels", (0.5, 0.5), uneven=False),
    "hard": Scenario(
        "balanced, even; of group 0's pairs 40 % are flipped, held-out ones too", (0.5, 0.5), uneven=False
    ),
}
ALL_SCENARIOS = {**SCENARIOS, **OURS}


@dataclass(frozen=True)
class Option:
    """How the groups' losses are weighed: by fixed weights, or by an alpha that moves."""

    name: str
    text: str
    fixed: Tensor | str | None = None
    """"sizes", "uniform", or weights (K,); None: alpha moves."""
    rule: str = "exponentiated_gradient"
    is_auto: bool = False
    is_excess: bool = False
    tau: float | None = None


OPTIONS = (
    Option("plain", "pairs weigh alike", fixed="sizes"),
    Option("IS", "groups weigh alike: `step_size=0.0`", fixed="uniform"),
    Option("GR", f"`step_size={STEP_SIZE}`"),
    Option("auto", '`step_size="auto"`', is_auto=True),
    Option(
        "excess", f"`step_size={STEP_SIZE}`, `baseline=` losses of policies trained for a group alone", is_excess=True
    ),
    Option("IS tilt", f"`step_size=0.0`, `inner_tilt={TAU}`", fixed="uniform", tau=TAU),
    Option("GR tilt", f"`step_size={STEP_SIZE}`, `inner_tilt={TAU}`", tau=TAU),
    Option("cvar", f'`rule="cvar"`, `level={LEVEL}`', rule="cvar"),
)


def draw(scenario: str, seed: int) -> Bandit:
    """A function of its arguments, with the paper's main features."""
    if scenario in SCENARIOS:
        return draw_bandit(scenario, "swapped", seed)
    generator = torch.Generator().manual_seed(1_000_003 * seed + 500_000)  # both have the same pairs
    bandit, share = draw_of(OURS[scenario], "swapped", generator), FLIPPED[scenario]
    train, validation = (_flipped(part, share, generator) for part in (bandit.train, bandit.validation))
    return replace(bandit, train=train, validation=validation if scenario == "hard" else bandit.validation)


def _flipped(pairs: PairData, share: float, generator: torch.Generator) -> PairData:
    """Of group 0 the share of pairs, at random, has chosen and rejected the other way round."""
    flips = (torch.rand(len(pairs.group_ids), generator=generator) < share) & (pairs.group_ids == 0)
    return replace(pairs, differences=torch.where(flips.unsqueeze(1), -pairs.differences, pairs.differences))


def _tilted(losses: Tensor, batch: PairBatch, tau: float) -> tuple[Tensor, Tensor]:
    """((D, K) tilted means, (D, N) weights of pairs in their group) of losses (D, N)."""
    scores = losses / tau
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    means = (weights.unsqueeze(1) @ batch.membership.mT).squeeze(1)
    of_pairs = (1 / means).unsqueeze(1) @ (batch.membership > 0).double()
    return tau * (means.log() + largest), weights * of_pairs.squeeze(1)


@torch.no_grad()
def train(
    batch: PairBatch,
    start: Tensor,
    options: Sequence[Option],
    iterations: int,
    baseline: Tensor | None = None,
    on_record: Callable[[int, float], None] = lambda done, worst_loss: None,
) -> tuple[Tensor, Tensor]:
    """(theta (D, M, F), weights of the groups (D, M, K)) at the end. ``baseline``: (D, K)."""
    shares, entry = batch.shares(), PAIR_LOSSES[LOSS]
    uniform = torch.full_like(shares, 1 / NUM_GROUPS)
    fixed = {"sizes": shares, "uniform": uniform}
    weights = uniform.expand(-1, len(options), -1).clone()
    for m, option in enumerate(options):
        if option.fixed is not None:
            given = fixed[option.fixed] if isinstance(option.fixed, str) else option.fixed.expand_as(uniform)
            weights[:, m] = given[:, 0]
    theta = start.unsqueeze(1).expand(-1, len(options), -1).clone()
    gains, gap_sum = torch.zeros_like(uniform[:, 0]), torch.zeros_like(uniform[:, 0, 0])
    present, log_prior = torch.ones_like(gains, dtype=torch.bool), torch.zeros_like(gains)
    for iteration in range(iterations):
        margins = batch.margins(theta)
        pair_losses = entry.value(of_h(margins), BETA, 0.0)
        losses = pair_losses @ batch.membership.mT
        of_pairs = torch.ones_like(pair_losses)
        for m, option in enumerate(options):
            loss = losses[:, m]
            if option.tau is not None:
                loss, of_pairs[:, m] = _tilted(pair_losses[:, m], batch, option.tau)
            if option.fixed is not None:
                continue
            if option.is_excess:
                assert baseline is not None
                loss = (loss - baseline).clamp(min=0)
            if option.is_auto:
                gains, gap_sum = hedge.after_batch(gains, gap_sum, loss, present)
                weights[:, m] = hedge.log_weights(gains, gap_sum).exp()
                continue
            parameter = LEVEL if option.rule == "cvar" else STEP_SIZE
            log_alpha = moved_log_alpha(
                weights[:, m].log(), loss, present, log_prior, rule=option.rule, parameter=parameter
            )
            weights[:, m] = log_alpha.exp()
        slopes = entry.slopes(of_h(margins), BETA, 0.0)[0] * of_pairs
        theta = theta - RATE * (slopes * (weights @ batch.membership)) @ batch.differences.mT
        if iteration % max(1, iterations // 100) == 0:
            on_record(iteration + 1, float(losses.amax(-1).mean()))
    return theta, weights


def records(
    seeds: int,
    iterations: int,
    scenarios: Sequence[str] = tuple(ALL_SCENARIOS),
    options: Sequence[Option] = OPTIONS,
    on_record: Callable[[int, float], None] = lambda done, worst_loss: None,
) -> list[dict[str, Any]]:
    """For each scenario and option of each seed the held-out losses of the worst group, of both on average, and of
    group 1, and the worst group's relative reward error: of the true reward, which no flipped label changes.
    """
    bandits = [draw(scenario, seed) for scenario in scenarios for seed in range(seeds)]

    def batch(parts: list[PairData]) -> PairBatch:
        return PairBatch.of([part.differences for part in parts], [part.group_ids for part in parts], NUM_GROUPS)

    training, held_out = batch([b.train for b in bandits]), batch([b.validation for b in bandits])
    start = torch.stack([bandit.theta for bandit in bandits])
    alone = [Option("", "", fixed=row) for row in torch.eye(NUM_GROUPS, dtype=torch.float64)]
    theta, _ = train(training, start, alone, iterations, on_record=on_record)
    baseline = training.group_losses(theta, LOSS, BETA).diagonal(dim1=1, dim2=2)
    theta, weights = train(
        training, start, options, iterations, baseline, lambda done, worst: on_record(iterations + done, worst)
    )
    losses = held_out.group_losses(theta, LOSS, BETA)  # (D, M, K)
    errors = reward_errors(torch.stack([bandit.test_features for bandit in bandits]), theta).amax(-1)
    found = []
    for s, scenario in enumerate(scenarios):
        rows = slice(s * seeds, (s + 1) * seeds)
        for m, option in enumerate(options):
            of_option = losses[rows, m]
            measures = {
                "worst": of_option.amax(-1),
                "average": of_option.mean(-1),
                "group_1": of_option[:, 1],
                "reward_error": errors[rows, m],
                "weight_of_group_0": weights[rows, m, 0],
            }
            shown = {name: [round(x, DIGITS) for x in values.tolist()] for name, values in measures.items()}
            found.append({"scenario": scenario, "option": option.name, **shown})
    return found


# -- what the records say ------------------------------------------------------------------------------------------


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error (0 for one seed)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std()) / math.sqrt(len(tensor)) if len(tensor) > 1 else 0.0


def of(record: list[dict[str, Any]], scenario: str, option: str, measure: str = "worst") -> list[float]:
    """Each seed's."""
    values: list[float] = next(r for r in record if (r["scenario"], r["option"]) == (scenario, option))[measure]
    return values


def lead(
    record: list[dict[str, Any]], scenario: str, option: str, over: str, measure: str = "worst"
) -> tuple[float, float, int]:
    """(by how much the option is lower than the other, by pairs of seeds, its standard error, seeds in which it is)."""
    pairs = zip(of(record, scenario, over, measure), of(record, scenario, option, measure), strict=True)
    leads = [theirs - mine for theirs, mine in pairs]
    return *mean_and_error(leads), sum(x > 1e-9 for x in leads)


def is_lower(record: list[dict[str, Any]], scenario: str, option: str, over: str, measure: str = "worst") -> bool:
    """By more than two standard errors of the paired difference."""
    mean, error, _ = lead(record, scenario, option, over, measure)
    return mean > 2 * error


def check(record: list[dict[str, Any]]) -> list[Claim]:
    """What one would hope of each option, and whether it is so."""

    def claim(text: str, *comparisons: tuple[str, str, str, str]) -> Claim:
        holds = all(is_lower(record, *comparison) for comparison in comparisons)
        details = []
        for scenario, option, over, measure in comparisons:
            mean, error, wins = lead(record, scenario, option, over, measure)
            seeds = len(of(record, scenario, option))
            details.append(f"({scenario}) by {mean:.3f} ± {error:.3f}, {wins} of {seeds} seeds")
        return Claim(text, holds, "; ".join(details))

    return [
        claim(
            "GR has a lower worst-group loss than IS where a group is hard", *_each("GR", "IS", "worst", "ii", "iii")
        ),
        claim("auto has one, too", *_each("auto", "IS", "worst", "ii", "iii")),
        claim("auto is lower than GR with its step set by hand", *_each("auto", "GR", "worst", "i", "ii", "iii")),
        claim("cvar has a lower worst-group loss than IS there", *_each("cvar", "IS", "worst", "ii", "iii")),
        claim("excess is lower than GR there", *_each("excess", "GR", "worst", "ii", "iii")),
        claim("flipped training labels: GR is lower than IS", *_each("GR", "IS", "worst", "noisy")),
        claim("flipped training labels: IS tilt is lower than IS", *_each("IS tilt", "IS", "worst", "noisy")),
        claim(
            "flipped training labels: IS tilt is lower than IS in reward error",
            *_each("IS tilt", "IS", "reward_error", "noisy"),
        ),
        claim("flipped training labels: GR tilt is lower than GR", *_each("GR tilt", "GR", "worst", "noisy")),
        claim(
            "flipped training labels: GR tilt is lower than GR in reward error",
            *_each("GR tilt", "GR", "reward_error", "noisy"),
        ),
        claim("an unlearnable group: GR costs group 1 against IS", *_each("IS", "GR", "group_1", "hard")),
        claim("excess gives group 1 that back", *_each("excess", "GR", "group_1", "noisy", "hard")),
        claim("and has a lower worst-group loss than GR", *_each("excess", "GR", "worst", "noisy", "hard")),
    ]


def _each(option: str, over: str, measure: str, *scenarios: str) -> list[tuple[str, str, str, str]]:
    return [(scenario, option, over, measure) for scenario in scenarios]


def table(record: list[dict[str, Any]], measure: str = "worst") -> str:
    """Markdown: the measure by scenario and option, mean ± standard error, and seeds in which it is lower than IS's."""
    scenarios = list(dict.fromkeys(r["scenario"] for r in record))
    lines = [f"| option | {' | '.join(f'({scenario})' for scenario in scenarios)} |"]
    lines.append("| --- |" + " --- |" * len(scenarios))
    for option in OPTIONS:
        cells = []
        for scenario in scenarios:
            mean, error = mean_and_error(of(record, scenario, option.name, measure))
            wins = "" if option.name == "IS" else f", {lead(record, scenario, option.name, 'IS', measure)[2]}"
            cells.append(f"{mean:.3f} ± {error:.3f}{wins}")
        lines.append(f"| {option.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def decisions(record: list[dict[str, Any]]) -> str:
    """Markdown: for each kind of data which option had the lowest worst-group loss, which are not shown to be worse,
    whether it beats IS, and what it costs the other group against IS."""
    lines = ["| data | lowest | not shown to be worse | against IS, worst group | group 1 |", "| --- |" + " --- |" * 4]
    for scenario in dict.fromkeys(r["scenario"] for r in record):
        names = [option.name for option in OPTIONS]
        best = min(names, key=lambda name: mean_and_error(of(record, scenario, name))[0])
        as_good = [name for name in names if name != best and not is_lower(record, scenario, best, name)]
        mean, error, wins = lead(record, scenario, best, "IS")
        seeds = len(of(record, scenario, best))
        helps = f"lower by {mean:.3f} ± {error:.3f}, in {wins} of {seeds} seeds"
        change, of_change, _ = lead(record, scenario, "IS", best, "group_1")
        cells = [
            f"({scenario}) {ALL_SCENARIOS[scenario].title}",
            best,
            ", ".join(as_good) or "none",
            helps if mean > 2 * error else "nothing helps: no difference shown",
            f"{change:+.3f} ± {of_change:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def document(record: list[dict[str, Any]]) -> str:
    """Markdown: what the options are, what was best for which data, the numbers, and what one would have hoped for."""
    seeds = len(record[0]["worst"])
    claims = [
        f"- {'Holds' if claim.holds else 'Does **not** hold'}: {claim.text}: {claim.detail}." for claim in check(record)
    ]
    parts = (
        "\n".join(f"- {option.name}: {option.text}" for option in OPTIONS),
        decisions(record),
        f"Worst-group held-out loss, mean ± standard error over {seeds} seeds, and seeds in which it is below IS:",
        table(record),
        "Worst-group relative reward error (of the true reward, which no flipped label changes), likewise:",
        table(record, "reward_error"),
        "By paired seeds, a difference being one of more than two standard errors:",
        "\n".join(claims),
    )
    return "\n\n".join(parts)
