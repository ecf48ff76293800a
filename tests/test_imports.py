"""Who may import whom (the house: from the ground up), and what a cold import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "grpo_kernels"
# A module imports only from the rows above its own.
ORDER = [
    ("_C", "_version", "types", "console", "reference", "validation", "segments", "pair_losses"),
    ("loss_spec",),
    ("batch",),
    ("groups.rules",),
    ("kernels",),
    ("distributed",),
    ("kernels.dispatch",),
    ("kernels.ops",),
    ("kernels.autograd",),
    ("arguments", "logps"),
    ("functional",),
    ("groups",),
    ("loss_base",),
    ("losses",),
    ("integrations", "doctor"),
    ("paper",),
    ("bench",),
    ("training",),
    ("__main__",),
]
# Inside a wing, too: its modules in the order of the way up.
WINGS = {
    "groups": (
        *("rules", "hedge", "memberships", "tilt", "statistics", "watch", "diagnosis", "checkpoints"),
        *("state", "updates", "weights", "sampling", "forecast"),
    ),
    "paper": ("bandit", "batched", "algorithm", "convergence", "claims", "robustness", "report", "command"),
    "bench": ("cases", "machine", "plots", "suite", "logits", "linear", "command"),
    "training": ("options", "start", "report", "command"),
}
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def level_of(module: str) -> tuple[int, int]:
    """(row of ORDER, place in the wing) of a module's path below the package; the longest name that fits counts."""
    parts = module.split(".")
    name = next((n for k in (2, 1) if (n := ".".join(parts[:k])) in LEVEL), None)
    assert name is not None, f"{module} has no place in ORDER"
    wing = WINGS.get(parts[0], ())
    inside = parts[1] if len(parts) > 1 and not parts[1].startswith("__") else None
    assert not (wing and inside) or inside in wing, f"{module} has no place in its wing"
    return LEVEL[name], wing.index(inside) if wing and inside else -1


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            of_package = PACKAGE.parent.joinpath(*node.module.split("."))
            names = {alias.name for alias in node.names}
            modules = {name for name in names if (of_package / f"{name}.py").exists() or (of_package / name).is_dir()}
            found |= {f"{node.module}.{name}" for name in modules}
            if names - modules:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_upwards(path: Path) -> None:
    mine = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    wing, level = mine.split(".")[0], level_of(mine)
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "grpo_kernels" and rest:
            theirs = level_of(".".join(rest))
            same_row = theirs == level and rest[0] == wing  # of rooms whose modules are in no order
            assert theirs < level or same_row, f"{mine} imports {name}"
        if wing in ("integrations", "training") or mine in {
            "bench.linear",
            "bench.logits",
        }:  # peers, loaded where they are measured
            continue
        assert top not in {"transformers", "tokenizers", "trl", "accelerate", "datasets", "peft"}, f"{mine}: {name}"
    if wing == "kernels":
        assert "grpo_kernels.reference" not in imports_of(path), "an optimised backend never imports the reference"


def test_cold_import_loads_torch_only() -> None:
    """And of torch little more than `import torch` has loaded: torch._dynamo alone would take seconds."""
    code = (
        "import torch, sys; before = set(sys.modules); import grpo_kernels; "
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('grpo_kernels')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    loaded = ast.literal_eval(out)
    slow = {"triton", "transformers", "trl", "matplotlib", "rich", "tokenizers", "numpy"}
    assert not slow & {name.split(".")[0] for name in loaded}
    assert not {"torch._dynamo", "torch._inductor"} & set(loaded)
    assert len(loaded) < 20, loaded
