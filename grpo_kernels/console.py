"""What the commands show: progress bars while they run, and figures and colours of their pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def make_console() -> Any:
    from rich.console import Console

    return Console()


def make_figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes (rows, columns) in the style of all pictures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for one in axes.flat:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


class ProgressBar:
    """The bar of one phase, with the last loss and the worst group's evaluation loss."""

    def __init__(self, progress: Any, name: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=total, completed=done, status="")

    def advance(self, done: int, loss: float, evaluation: dict[str, Any] | None) -> None:
        status = f"loss {loss:.3f}"
        if evaluation is not None:
            status += f"  worst group {evaluation['worst_loss']:.3f} ({evaluation['worst_group']})"
        self._progress.update(self._task, completed=done, status=status)


@contextmanager
def progress(console: Any, name: str, total: int, done: int) -> Iterator[ProgressBar]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield ProgressBar(bars, name, total, done)
