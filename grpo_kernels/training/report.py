"""What `train` shows at the end: the table and the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_kernels.console import COLOURS


def print_results(console: Any, results: dict[str, Any]) -> None:
    """A row for each group, and the worst group's loss of each run last."""
    from rich.table import Table

    runs = results["runs"]
    table = Table(title=f"Evaluation by group, loss_type={results['loss']!r}, seed {results['seed']}")
    for title in ("group", "train pairs", "robust loss", "accuracy", "alpha"):
        table.add_column(title, justify="left" if title == "group" else "right")
    if "plain" in runs:
        table.add_column("plain loss", justify="right")
        table.add_column("accuracy", justify="right")
    for group, scores in runs["robust"]["groups"].items():
        row = [group, str(results["group_sizes"][group]), f"{scores['loss']:.4f}", f"{scores['accuracy']:.3f}"]
        row.append(f"{runs['robust']['alpha'][group]:.4f}")
        if "plain" in runs:
            plain = runs["plain"]["groups"][group]
            row += [f"{plain['loss']:.4f}", f"{plain['accuracy']:.3f}"]
        table.add_row(*row)
    table.add_section()
    worst = ["worst group", "", f"{runs['robust']['worst_loss']:.4f}", "", ""]
    if "plain" in runs:
        worst += [f"{runs['plain']['worst_loss']:.4f}", ""]
    table.add_row(*worst)
    console.print(table)
    seconds = ", ".join(f"{name} {value} s" for name, value in results["seconds"].items())
    console.print(f"{seconds}; peak memory {results['peak_rss_gib']} GiB", highlight=False)


def save_picture(evaluations: dict[str, list[dict[str, Any]]], loss_type: str, path: Path) -> None:
    """Group losses of the evaluation pairs over steps (solid: robust, dashed: plain), and alpha over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, alpha_axes = figure.subplots(1, 2)
    robust = evaluations["robust"]
    groups = list(robust[0]["groups"])
    for i, group in enumerate(groups):
        colour = COLOURS[i % len(COLOURS)]
        for name, style in (("robust", "-"), ("plain", "--")):
            series = evaluations.get(name, [])
            if series:
                values = [record["groups"][group]["loss"] for record in series]
                loss_axes.plot([record["step"] for record in series], values, style, color=colour)
        alpha = [record["alpha"][group] for record in robust]
        alpha_axes.plot([record["step"] for record in robust], alpha, color=colour, label=group)
    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], label=group) for i, group in enumerate(groups)]
    if "plain" in evaluations:
        handles += [Line2D([], [], color="grey", label="robust"), Line2D([], [], ls="--", color="grey", label="plain")]
    loss_axes.legend(handles=handles, fontsize="small")
    loss_axes.set(xlabel="step", ylabel=f"evaluation loss ({loss_type})", title="Loss of each group")
    alpha_axes.set(xlabel="step", ylabel="alpha", ylim=(0, 1), title="Weight of each group (robust run)")
    for axes in (loss_axes, alpha_axes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
