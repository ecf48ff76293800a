"""Pictures of benchmark records: time and memory as bars, one picture for each case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def draw(records_folder: Path, out: Path) -> list[Path]:
    """One PNG beside each JSON file of records; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    pictures = []
    for path in sorted(records_folder.glob("*.json")):
        found = json.loads(path.read_text())
        if any("median_ms" in record for record in found["records"]):
            pictures.append(_bars(path.stem, found, out / f"{path.stem}.png"))
    return pictures


def _bars(name: str, found: dict[str, Any], picture: Path) -> Path:
    import matplotlib.pyplot as plt

    records = [record for record in found["records"] if "median_ms" in record]
    labels = [record["contender"] for record in records]
    colours = ["tab:blue" if _is_ours(record) else "tab:gray" for record in records]
    figure, (time_axes, memory_axes) = plt.subplots(
        1, 2, figsize=(10, 0.9 + 0.36 * len(labels)), sharey=True, layout="constrained"
    )
    middles = [record["median_ms"] for record in records]
    lows = [record["median_ms"] - record["iqr_ms"][0] for record in records]
    highs = [record["iqr_ms"][1] - record["median_ms"] for record in records]
    time_axes.barh(labels, middles, xerr=(lows, highs), color=colours, ecolor="black", capsize=2)
    memory_axes.barh(labels, [record["peak_extra_mib"] for record in records], color=colours)
    time_axes.invert_yaxis()
    for axes, unit in ((time_axes, "ms, median and quartiles"), (memory_axes, "MiB of extra memory at the peak")):
        axes.set_xlabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
        for bar in axes.patches:
            axes.annotate(f"{bar.get_width():,.0f}", (bar.get_width(), bar.get_y() + bar.get_height() / 2),
                          xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    if "bare_products_ms" in records[0]:
        bare = records[0]["bare_products_ms"]
        time_axes.axvline(bare, color="tab:red", linewidth=1)
        time_axes.annotate("three bare matrix products", (bare, -0.75), color="tab:red", fontsize=8, ha="left")
    figure.suptitle(
        f"{name}: forward + backward\n{found['device']}, torch {found['torch']}, {found['date']}", fontsize=9
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _is_ours(record: dict[str, Any]) -> bool:
    return record.get("also_computes", "groups").startswith("groups") and record["contender"] != "reference"
