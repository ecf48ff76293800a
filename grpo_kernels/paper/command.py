"""`python -m grpo_kernels reproduce`: the bandit experiment and the theory of Ramesh et al. 2024, from data to table.

Runs all scenarios x features x methods x seeds, the sweep over chi, the convergence of the average iterates, and the
options of GroupWeights on data of several kinds; leaves results.json and pictures, prints tables and which claims hold.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import validation
from grpo_kernels.console import ProgressBar, make_console, progress
from grpo_kernels.paper import report, robustness
from grpo_kernels.paper.bandit import FEATURES, NUM_GROUPS, SCENARIOS, Bandit, draw_bandit, reward_errors
from grpo_kernels.paper.batched import (
    METHODS,
    Method,
    PairBatch,
    Runs,
    Setting,
    closed_form_step,
    gradient_step,
    one_thread,
    run_full_batch,
)
from grpo_kernels.paper.claims import check_claims
from grpo_kernels.paper.convergence import bandit_in_a_ball, gap_curve, one_dimensional


@dataclass(frozen=True)
class Family(Setting):
    """The paper's settings of a pair loss; the methods are named in the order of batched.METHODS."""

    name: str
    methods: tuple[str, str, str]


RATE = 0.9  # of DPO's gradient steps
FAMILIES = (
    Family("sigmoid", 1.0, 0.5, "DPO", ("DPO", "IS-DPO", "GR-DPO")),
    Family("ipo", 0.1, 0.01, "IPO", ("IPO", "IS-IPO", "GR-IPO")),
)
CHIS = tuple(i / 10 for i in range(11))
CHI_SCENARIO = ("iii", "swapped")


@dataclass(frozen=True)
class ReproduceConfig:
    """The options of `reproduce`; the defaults are the paper's."""

    out: str | None = None
    seeds: int = 20
    iterations: int = 10_000
    ipo_iterations: int = 100
    max_horizon: int = 2**14


@dataclass(frozen=True)
class Draws:
    """The data of D = cells x seeds runs, seeds last."""

    cells: list[tuple[str, str]]
    train: PairBatch
    validation: PairBatch
    theta: Tensor
    test_features: Tensor

    @classmethod
    def of(cls, cells: list[tuple[str, str]], seeds: int) -> Draws:
        bandits = [draw_bandit(scenario, kind, seed) for scenario, kind in cells for seed in range(seeds)]

        def batch(part: Callable[[Bandit], Any]) -> PairBatch:
            parts = [part(bandit) for bandit in bandits]
            return PairBatch.of([p.differences for p in parts], [p.group_ids for p in parts], NUM_GROUPS)

        return cls(
            cells,
            batch(lambda bandit: bandit.train),
            batch(lambda bandit: bandit.validation),
            torch.stack([bandit.theta for bandit in bandits]),
            torch.stack([bandit.test_features for bandit in bandits]),
        )


def run_family(
    family: Family,
    draws: Draws,
    methods: tuple[Method, ...],
    iterations: int,
    on_record: Callable[[int, float], None] = lambda done, worst_loss: None,
) -> Runs:
    """GR-DPO's kind by gradient steps, GR-IPO's by its closed form."""
    if family.loss_type == "ipo":
        step = closed_form_step(draws.train, family.beta)
    else:
        step = gradient_step(draws.train, family.loss_type, family.beta, RATE)
    return run_full_batch(
        draws.train,
        draws.validation,
        draws.theta,
        methods,
        step,
        family,
        iterations=iterations,
        record_every=max(1, iterations // 100),
        on_record=on_record,
    )


def summary(values: Tensor) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for one seed) and the values, from (seeds,)."""
    spread = float(values.std()) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sd": spread, "per_seed": values.tolist()}


def comparison_records(family: Family, draws: Draws, runs: Runs, seeds: int) -> list[dict[str, Any]]:
    """One for each scenario, features and method, at the last iterate."""
    worst = runs.losses[-1].amax(-1)
    errors = reward_errors(draws.test_features, runs.theta).amax(-1)
    train = draws.train.group_losses(runs.theta, family.loss_type, family.beta).amax(-1)
    records = []
    for cell, (scenario, kind) in enumerate(draws.cells):
        rows = slice(cell * seeds, (cell + 1) * seeds)
        for column, name in enumerate(family.methods):
            record = {
                "scenario": scenario,
                "features": kind,
                "family": family.name,
                "method": name,
                "worst_loss": summary(worst[rows, column]),
                "reward_error": summary(errors[rows, column]),
                "training_worst_loss": summary(train[rows, column]),
            }
            if METHODS[column].chi:
                record["alpha_of_group_0"] = summary(runs.alphas[-1][rows, column, 0])
            records.append(record)
    return records


def chi_records(family: Family, draws: Draws, runs: Runs) -> list[dict[str, Any]]:
    """Worst-group and average loss for each chi, on validation and on training pairs."""
    train = draws.train.group_losses(runs.theta, family.loss_type, family.beta)
    records = []
    for column, chi in enumerate(CHIS):
        record: dict[str, Any] = {"family": family.name, "chi": chi}
        for part, losses in (("validation", runs.losses[-1]), ("training", train)):
            record[f"{part}_worst"] = summary(losses[:, column].amax(-1))
            record[f"{part}_average"] = summary(losses[:, column].mean(-1))
        records.append(record)
    return records


def convergence_records(
    max_horizon: int, progress: Callable[[str, int], AbstractContextManager[ProgressBar]]
) -> list[dict[str, Any]]:
    """The theory's own steps on both problems, and on the bandit 8 times larger ones.

    With its own the bandit's alpha has hardly left the start after 2^14 steps: B_l, a bound on any loss in the ball,
    is far above the losses that occur. Larger steps keep the rate and multiply the bound.
    """
    horizons = tuple(2**k for k in range(8, int(math.log2(max_horizon)) + 1))
    records = []
    for problem, scale in ((one_dimensional(), 1.0), (bandit_in_a_ball(), 1.0), (bandit_in_a_ball(), 8.0)):
        with progress(f"gap: {problem.name}", sum(horizons)) as bar:
            curve = gap_curve(problem, horizons, scale=scale, on_horizon=partial(bar.advance, evaluation=None))
        records.append(asdict(curve))
    return records


def run(config: ReproduceConfig, out: Path) -> dict[str, Any]:
    """Everything; returns what results.json holds."""
    console, began = make_console(), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)  # an error now, not after a minute

    def bars(name: str, total: int) -> AbstractContextManager[ProgressBar]:
        return progress(console, name, total, 0)

    cells = [(scenario, kind) for scenario in SCENARIOS for kind in FEATURES]
    draws, chi_draws = Draws.of(cells, config.seeds), Draws.of([CHI_SCENARIO], config.seeds)
    sweep = tuple(Method(f"chi={chi}", chi) for chi in CHIS)
    results: dict[str, Any] = {"config": asdict(config), "comparison": [], "chi": []}
    histories: dict[str, Runs] = {}
    for family in FAMILIES:
        iterations = config.ipo_iterations if family.loss_type == "ipo" else config.iterations

        def shown(
            name: str, methods: tuple[Method, ...], data: Draws, family: Family = family, n: int = iterations
        ) -> Runs:
            with bars(name, n) as bar:
                return run_family(family, data, methods, n, lambda done, worst: bar.advance(done, worst, None))

        histories[family.name] = shown(family.name, METHODS, draws)
        results["comparison"] += comparison_records(family, draws, histories[family.name], config.seeds)
        results["chi"] += chi_records(family, chi_draws, shown(f"{family.name} chi", sweep, chi_draws))
    results["convergence"] = convergence_records(config.max_horizon, bars)
    with bars("options by kind of data", 2 * config.iterations) as bar:
        results["options"] = robustness.records(
            config.seeds, config.iterations, on_record=lambda done, worst: bar.advance(done, worst, None)
        )
    claims = [*check_claims(results), *robustness.check(results["options"])]
    results["claims"] = [asdict(claim) for claim in claims]
    results["seconds"] = round(time.perf_counter() - began, 1)
    (out / "results.json").write_text(json.dumps(results, indent=1))
    (out / "options.json").write_text(json.dumps(results["options"]))
    (out / "options.md").write_text(robustness.document(results["options"]))
    report.save_pictures(results, histories, cells, out)
    report.print_results(console, results)
    console.print(f"{results['seconds']} s; results.json and pictures are in {out}", highlight=False)
    return results


def reproduce(config: ReproduceConfig) -> int:
    for name in ("seeds", "iterations", "ipo_iterations"):
        validation.check_number(name, getattr(config, name), 1)
    validation.check_number("max_horizon", config.max_horizon, 512)
    with one_thread():
        run(config, Path(config.out or f"runs/reproduce-{datetime.now():%Y%m%d-%H%M%S}"))
    return 0
