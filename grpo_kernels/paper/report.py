"""What `reproduce` shows: the tables, the claims, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from grpo_kernels.console import COLOURS, make_figure
from grpo_kernels.paper import robustness
from grpo_kernels.paper.bandit import FEATURES, SCENARIOS
from grpo_kernels.paper.batched import Runs
from grpo_kernels.paper.claims import cell

FAMILY_METHODS = {"DPO": ("DPO", "IS-DPO", "GR-DPO"), "IPO": ("IPO", "IS-IPO", "GR-IPO")}
MEASURES = {"worst_loss": "worst-group validation loss", "reward_error": "worst-group relative reward error, %"}


def wins(results: dict[str, Any], scenario: str, features: str, family: str, measure: str) -> int:
    """Seeds in which GR is strictly the lowest of its family."""
    plain, importance, robust = (
        cell(results, scenario, features, method)[measure]["per_seed"] for method in FAMILY_METHODS[family]
    )
    return sum(r < min(p, i) for p, i, r in zip(plain, importance, robust, strict=True))


def print_results(console: Any, results: dict[str, Any]) -> None:
    """A table for each family and measure, and then the claims."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    seeds = results["config"]["seeds"]
    scenarios = "; ".join(f"({name}) {entry.title}" for name, entry in SCENARIOS.items())
    console.print(f"Mean ± standard deviation over {seeds} seeds. Scenarios: {scenarios}. ", highlight=False)
    console.print("wins: seeds in which GR is the lowest; alpha: GR's weight of group 0, the hard one", highlight=False)
    for family, methods in FAMILY_METHODS.items():
        for measure, title in MEASURES.items():
            table = Table(title=f"{family}: {title}", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for heading in ("features", "", *methods, "wins", *(["alpha"] if measure == "worst_loss" else [])):
                table.add_column(heading, no_wrap=True)
            for features in FEATURES:
                for scenario in SCENARIOS:
                    cells = [cell(results, scenario, features, method) for method in methods]
                    row = [features, f"({scenario})", *(_mean_and_sd(one[measure], measure) for one in cells)]
                    row.append(str(wins(results, scenario, features, family, measure)))
                    if measure == "worst_loss":
                        row.append(f"{cells[2]['alpha_of_group_0']['mean']:.3f}")
                    table.add_row(*row, end_section=scenario == "iii")
            console.print(table)
    _print_options(console, results["options"])
    for claim in results["claims"]:
        mark = "[green]holds[/green]        " if claim["holds"] else "[red]does not hold[/red]"
        console.print(f"{mark} {claim['text']}: {claim['detail']}", highlight=False)


def _print_options(console: Any, record: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    for measure, title in (("worst", "worst-group loss"), ("reward_error", "worst-group relative reward error")):
        rows = [line.strip("| ").split(" | ") for line in robustness.table(record, measure).splitlines()]
        table = Table(
            title=f"Options: {title}, mean ± standard error, seeds lower than IS", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in rows[0]:
            table.add_column(heading)
        for row in rows[2:]:
            table.add_row(*row)
        console.print(table)


def _mean_and_sd(values: dict[str, Any], measure: str) -> str:
    if measure == "reward_error":
        return f"{100 * values['mean']:.1f} ± {100 * values['sd']:.1f}"
    digits = 2 if values["mean"] >= 5 else 3
    return f"{values['mean']:.{digits}f} ± {values['sd']:.{digits}f}"


def save_pictures(results: dict[str, Any], histories: dict[str, Runs], cells: list[tuple[str, str]], out: Path) -> None:
    """curves.png, methods.png, chi.png, gap.png under ``out``."""
    for name, draw in (("curves", _curves), ("methods", _bars), ("chi", _chi), ("gap", _gap)):
        figure = draw(results, histories, cells)
        figure.savefig(out / f"{name}.png", dpi=110)


def _curves(results: dict[str, Any], histories: dict[str, Runs], cells: list[tuple[str, str]]) -> Any:
    """Worst-group validation loss of the three methods and alpha of group 0, over iterations; swapped features."""
    seeds = results["config"]["seeds"]
    figure, axes = make_figure(4, 3, (12, 12))
    for pair, (family, methods) in enumerate(FAMILY_METHODS.items()):
        runs = histories[family]
        losses, alphas = torch.stack(runs.losses).amax(-1), torch.stack(runs.alphas)[..., 0]  # (time, D, M)
        for column, scenario in enumerate(SCENARIOS):
            first = seeds * cells.index((scenario, "swapped"))
            loss_axes, alpha_axes = axes[2 * pair, column], axes[2 * pair + 1, column]
            # The first losses, at theta(0), are far above all that follow.
            for m, method in enumerate(methods):
                _band(loss_axes, runs.iterations[1:], losses[1:, first : first + seeds, m], COLOURS[m], method)
            _band(alpha_axes, runs.iterations, alphas[:, first : first + seeds, 2], COLOURS[2], methods[2])
            loss_axes.set(title=f"({scenario}) {SCENARIOS[scenario].title}")
            alpha_axes.set(xlabel=f"iteration ({family})", ylim=(0, 1))
            alpha_axes.axhline(0.5, color="grey", lw=0.8, ls=":")
        axes[2 * pair, 0].set(ylabel="worst-group validation loss")
        axes[2 * pair + 1, 0].set(ylabel="alpha of group 0")
        axes[2 * pair, 0].legend(fontsize="small")
    figure.suptitle(f"Mean and standard deviation over {seeds} seeds, swapped features. In (ii) plain and IS coincide")
    return figure


def _band(axes: Any, x: list[int], series: Any, colour: str, label: str) -> None:
    """Mean over the last dimension, with one standard deviation either side."""
    mean = series.mean(-1)
    spread = series.std(-1) if series.shape[-1] > 1 else torch.zeros_like(mean)
    axes.plot(x, mean.tolist(), color=colour, label=label)
    axes.fill_between(x, (mean - spread).tolist(), (mean + spread).tolist(), color=colour, alpha=0.15, lw=0)


def _bars(results: dict[str, Any], histories: dict[str, Runs], cells: list[tuple[str, str]]) -> Any:
    """Both measures of all methods, scenarios and features."""
    figure, axes = make_figure(4, 3, (12, 12))
    width = 0.27
    for pair, methods in enumerate(FAMILY_METHODS.values()):
        for offset, (measure, title) in enumerate(MEASURES.items()):
            factor = 100 if measure == "reward_error" else 1
            for column, features in enumerate(FEATURES):
                one = axes[2 * pair + offset, column]
                for m, method in enumerate(methods):
                    values = [cell(results, scenario, features, method)[measure] for scenario in SCENARIOS]
                    one.bar(
                        [s + (m - 1) * width for s in range(3)],
                        [factor * value["mean"] for value in values],
                        width,
                        yerr=[factor * value["sd"] for value in values],
                        color=COLOURS[m],
                        label=method,
                        error_kw={"lw": 1},
                    )
                one.set_xticks(range(3), [f"({s})" for s in SCENARIOS])
                one.set_ylim(top=1.2 * one.get_ylim()[1])  # room for the legend
                if offset == 0:
                    one.set(title=f"{features} features")
            axes[2 * pair + offset, 0].set(ylabel=title)
            axes[2 * pair + offset, 2].legend(fontsize="small", ncol=3, handlelength=1, columnspacing=1)
    figure.suptitle("(i) imbalanced, even   (ii) balanced, uneven   (iii) imbalanced, uneven; bars: mean, lines: sd")
    return figure


def _chi(results: dict[str, Any], histories: dict[str, Runs], cells: list[tuple[str, str]]) -> Any:
    """Worst-group and average loss over chi, on validation (solid) and training pairs (dashed)."""
    figure, axes = make_figure(1, 2, (10, 4))
    for one, family in zip(axes[0], FAMILY_METHODS, strict=True):
        records = [record for record in results["chi"] if record["family"] == family]
        chis = [record["chi"] for record in records]
        for part, style in (("validation", "-o"), ("training", "--")):
            for i, kind in enumerate(("worst", "average")):
                means = [record[f"{part}_{kind}"]["mean"] for record in records]
                name = "worst group" if kind == "worst" else "average of the groups"
                one.plot(chis, means, style, ms=3, color=COLOURS[i], label=f"{name}, {part}")
        one.set(
            xlabel="chi (0: importance sampling, 1: group-robust)", ylabel="loss", title=f"{family}, scenario (iii)"
        )
        one.legend(fontsize="small")
    return figure


def _gap(results: dict[str, Any], histories: dict[str, Runs], cells: list[tuple[str, str]]) -> Any:
    """Each seed's duality gap, the fitted slope, and the bound."""
    curves = results["convergence"]
    figure, axes = make_figure(1, len(curves), (4 * len(curves), 4))
    for one, curve in zip(axes[0], curves, strict=True):
        horizons = torch.tensor(curve["horizons"], dtype=torch.float64)
        gaps = torch.tensor(curve["gaps"], dtype=torch.float64)
        for seed in range(gaps.shape[1]):
            one.plot(horizons, gaps[:, seed], ".", color=COLOURS[0], alpha=0.15, ms=3)
        means = gaps.mean(1)
        one.plot(horizons, means, "o", color=COLOURS[0], ms=5, label="gap, mean of seeds")
        level = means.log().mean() - curve["slope"] * horizons.log().mean()
        fitted = (level + curve["slope"] * horizons.log()).exp()
        one.plot(horizons, fitted, color=COLOURS[1], label=f"fit, slope {curve['slope']:.2f}")
        one.plot(horizons, curve["bounds"], "--", color=COLOURS[6], label="the paper's bound, slope -0.5")
        steps = "the theory's steps" if curve["scale"] == 1 else f"{curve['scale']:g} times the theory's steps"
        one.set(xscale="log", yscale="log", xlabel="T", title=f"{curve['problem']}, {steps}")
        one.set_ylim(bottom=float(gaps.min()) / 8)  # room for the legend
        one.legend(fontsize="small", loc="lower left")
    axes[0, 0].set(ylabel="duality gap of the average iterates")
    return figure
