"""Pictures of benchmark records: bars of time and memory for each case, the roofline, and growth over cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def draw(records_folder: Path, out: Path) -> list[Path]:
    """One PNG beside each JSON file of records; returns their paths.

    Raises:
        ValueError: a file holds no records; names it.
    """
    import matplotlib

    matplotlib.use("Agg")
    pictures = []
    for path in sorted(records_folder.glob("*.json")):
        with _named_in_errors(path):
            found = json.loads(path.read_text())
            if any("median_ms" in record for record in found["records"]):
                pictures.append(_bars(path.stem, found, out / f"{path.stem}.png"))
    return pictures


@contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} must hold records as bench writes them: {reason}") from error


def draw_summaries(records_folder: Path, out: Path) -> list[Path]:
    """Pictures over all records of a folder: the roofline of a path, and growth where two cases differ in one thing."""
    import matplotlib

    matplotlib.use("Agg")
    files = []
    for path in sorted(records_folder.glob("*.json")):
        with _named_in_errors(path):
            files.append(json.loads(path.read_text()))
    with _named_in_errors(records_folder):
        return _summaries(files, out)


def _summaries(files: list[dict[str, Any]], out: Path) -> list[Path]:
    pictures = []
    for path_name in ("logits", "linear"):
        own = [(found, r) for found in files for r in found["records"] if "median_ms" in r and _path(r) == path_name]
        curves = {
            "roofline": ("tokens counted", _counted, "fraction of the measured peak", _fraction),
            "growth_tokens": ("tokens", _tokens, "ms, forward + backward", _median),
            "growth_memory": ("tokens", _tokens, "MiB of extra memory at the peak", _memory),
            "growth_groups": ("groups (K)", _of_case("num_groups"), "ms, forward + backward", _median),
            "growth_vocabulary": ("vocabulary (V)", _of_case("vocab_size"), "ms, forward + backward", _median),
            "growth_width": ("hidden size (D)", _of_case("hidden_size"), "ms, forward + backward", _median),
        }
        for kind, (x_label, x_of, y_label, y_of) in curves.items():
            groups: dict[Any, list[tuple[dict, dict]]] = {}
            for found, record in own:
                one_machine = (found["device"], *_all_but(kind, record["case"]))
                groups.setdefault(one_machine, []).append((found, record))
            enough = 1 if kind == "roofline" else 2
            series = max(groups.values(), key=lambda some: len({x_of(r) for _, r in some}), default=[])
            if len({x_of(record) for _, record in series}) >= enough:
                picture = out / f"{path_name}_{kind}.png"
                pictures.append(_curves(picture, series, x_of, y_of, (x_label, y_label)))
    return pictures


def _path(record: dict[str, Any]) -> str:
    return "linear" if "hidden_size" in record["case"] else "logits"


def _tokens(record: dict[str, Any]) -> int:
    return record["case"]["num_sequences"] * record["case"]["length"]


def _counted(record: dict[str, Any]) -> int:
    case = record["case"]
    return case["num_sequences"] * (case["length"] - int(case["length"] * case["ignored"]))


def _of_case(name: str) -> Callable[[dict[str, Any]], int | None]:
    return lambda record: record["case"].get(name)


def _fraction(record: dict[str, Any]) -> float:
    return record["fraction_of_roof"]


def _median(record: dict[str, Any]) -> float:
    return record["median_ms"]


def _memory(record: dict[str, Any]) -> float:
    return record["peak_extra_mib"]


def _all_but(kind: str, case: dict[str, Any]) -> tuple:
    """What the cases of one curve have in common."""
    varying = {
        "roofline": {"num_sequences", "length"},
        "growth_tokens": {"num_sequences", "length"},
        "growth_memory": {"num_sequences", "length"},
        "growth_groups": {"num_groups"},
        "growth_vocabulary": {"vocab_size"},
        "growth_width": {"hidden_size"},
    }[kind]
    return tuple(sorted((name, value) for name, value in case.items() if name not in varying))


def _curves(picture: Path, series: list, x_of: Any, y_of: Any, labels: tuple[str, str]) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    lines: dict[tuple[bool, str], list[tuple[float, float]]] = {}
    for _, record in series:
        lines.setdefault((record["ours"], record["contender"]), []).append((x_of(record), y_of(record)))
    for (ours, name), points in sorted(lines.items(), reverse=True):
        style, linewidth = ("-", 2.2) if ours else ("--", 1.0)
        axes.plot(*zip(*sorted(points), strict=True), style, linewidth=linewidth, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    if y_of is _fraction:
        axes.axhline(1.0, color="tab:red", linewidth=1)
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    found, record = series[0]
    names = {"D": "hidden_size", "V": "vocab_size"}
    values = {letter: {one["case"].get(name) for _, one in series} for letter, name in names.items()}
    sizes = [f"{letter} {value}" for letter, (value, *others) in values.items() if value and not others]
    dates = sorted({found["date"] for found, _ in series})
    commits = ", ".join(sorted({str(found["commit"]) for found, _ in series}))
    axes.set_title(
        f"{', '.join([f'{_path(record)} path', *sizes, record['case']['dtype']])}\n"
        f"{found['device']}, torch {found['torch']}, {dates[-1]}, commit {commits}",
        fontsize=8,
        loc="left",
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _bars(name: str, found: dict[str, Any], picture: Path) -> Path:
    import matplotlib.pyplot as plt

    records = [record for record in found["records"] if "median_ms" in record]
    labels = [record["contender"] for record in records]
    colours = ["tab:blue" if record["ours"] else "tab:gray" for record in records]
    figure, (time_axes, memory_axes) = plt.subplots(
        1, 2, figsize=(10, 0.9 + 0.36 * len(labels)), sharey=True, layout="constrained"
    )
    middles = [record["median_ms"] for record in records]
    lows, highs = zip(*(record["iqr_ms"] for record in records), strict=True)
    spread = (
        [m - low for m, low in zip(middles, lows, strict=True)],
        [h - m for m, h in zip(middles, highs, strict=True)],
    )
    memory = [record["peak_extra_mib"] for record in records]
    time_axes.barh(labels, middles, xerr=spread, color=colours, ecolor="black", capsize=2)
    memory_axes.barh(labels, memory, color=colours)
    time_axes.invert_yaxis()
    for axes, unit, values, ends in (
        (time_axes, "ms, median and quartiles", middles, highs),
        (memory_axes, "MiB of extra memory at the peak", memory, memory),
    ):
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
        for number, (value, end) in enumerate(zip(values, ends, strict=True)):
            axes.annotate(
                f"{value:,.0f}", (end, number), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8
            )
    if "bare_products_ms" in records[0]:
        bare = records[0]["bare_products_ms"]
        time_axes.axvline(bare, color="tab:red", linewidth=1)
        time_axes.annotate("the bare matrix products", (bare, -0.75), color="tab:red", fontsize=8, ha="left")
    figure.suptitle(
        f"{name}: forward + backward\n{found['device']}, torch {found['torch']}, {found['date']}", fontsize=9
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture
