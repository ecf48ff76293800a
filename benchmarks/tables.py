"""The tables of README.md and docs/benchmarks.md from the records of benchmarks/results/cpu: `make plots` writes them.

Each stands between a comment that names it and one that ends it. Numbers are a record's, digit by digit.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "cpu"
COLUMNS = ("contender", "median ms (IQR)", "times faster", "peak extra MiB")
# (case, contenders) of the README: what a reader may have now, the fastest of the others, and ours.
OF_README = (
    ("logits_8x512x32000_float32_ignored50", ("reference", "TRL log-softmax", "cpp")),
    ("linear_8x512x512x32000_float32_ignored50_reference", ("eager", "Liger DPO, best chunk", "cpp")),
)


def cells_of(record: dict[str, Any]) -> list[str]:
    low, high = record["iqr_ms"]
    return [
        f"`{record['contender']}`",
        f"{record['median_ms']} ({low} to {high})",
        str(record["times_faster_than_reference"]),
        str(record["peak_extra_mib"]),
    ]


def case_of(record: dict[str, Any]) -> str:
    case = record["case"]
    words = [case["dtype"]]
    if "hidden_size" in case:
        words += [f"D {case['hidden_size']}", "reference online" if case["reference"] else "no reference"]
    return ", ".join([*words, f"{case['ignored']:.0%} ignored" if case["ignored"] else "all counted"])


def measured(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in found["records"] if "median_ms" in record]


def table(first: str, rows: list[list[str]], *more: str) -> str:
    head = [first, *COLUMNS, *more]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def origin(files: list[dict[str, Any]]) -> str:
    """Machine, version and commit of each case."""
    cases: dict[str, list[str]] = {}
    for found in files:
        record = found["records"][0]
        path = "hidden states" if "hidden_size" in record["case"] else "logits"
        where = f"{found['device']}, PyTorch {found['torch']}, commit {found['commit']} of {found['date']}"
        cases.setdefault(where, []).append(f"{path} ({case_of(record)})")
    return "\n".join(f"- {', '.join(names)}: {where}" for where, names in cases.items())


def tables() -> dict[str, str]:
    """What stands between the comments, by their name."""
    files = {path.stem: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}
    of_path: dict[str, str] = {}
    for path_name, more in (("logits", ()), ("linear", ("times the bare products",))):
        own = [found for name, found in files.items() if name.startswith(path_name)]
        rows = [
            [case_of(record), *cells_of(record), *([str(record["times_bare_products"])] if more else [])]
            for found in own
            for record in measured(found)
        ]
        of_path[f"{path_name} benchmarks"] = f"{origin(own)}\n\n{table('case', rows, *more)}"
    rows = [
        ["logits" if name.startswith("logits") else "hidden states", *cells_of(record)]
        for name, contenders in OF_README
        for record in measured(files[name])
        if record["contender"] in contenders
    ]
    of_readme = f"{origin([files[name] for name, _ in OF_README])}\n\n{table('from', rows)}"
    return {**of_path, "benchmarks": of_readme}


def written(text: str, made: dict[str, str]) -> str:
    """The text with each of the tables that it has a place for."""
    for name, new in made.items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", rf"\g<1>{new}\g<2>", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        page.write_text(written(page.read_text(), tables()))
        print(f"tables: {page.relative_to(ROOT)}")
