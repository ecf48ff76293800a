"""Who may import whom (shared/STYLE.md's order), and what a cold import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "grpo_kernels"
# A module imports only from the rows above its own.
ORDER = [
    {"_C", "_version", "scale", "types", "reference", "validation", "segments", "pair_losses", "alpha_rules"},
    {"kernels"},
    {"distributed"},
    {"dispatch"},
    {"ops"},
    {"autograd"},
    {"functional"},
    {"group_weights"},
    {"forecast"},
    {"losses"},
    {"data", "sampling"},
    {"algorithm", "bandit", "batched"},
    {"convergence", "claims"},
    {"embedded_task"},
    {"integrations"},
    {"report"},
    {"reproduce_report"},
    {"bench_machine", "bench_cases"},
    {"bench_plots"},
    {"bench_suite"},
    {"bench_logits", "bench_linear"},
    {"train_config"},
    {"training_job"},
    {"doctor", "train", "bench", "reproduce"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "grpo_kernels":
                found |= {f"grpo_kernels.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_upwards(path: Path) -> None:
    mine = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert mine in LEVEL, f"{mine} has no place in ORDER"
    for name in imports_of(path):
        top, *rest = name.split(".")
        if top == "grpo_kernels" and rest:
            assert LEVEL[rest[0]] < LEVEL[mine] or rest[0] == mine, f"{path.name} imports {name}"
        if mine not in {"integrations", "bench_linear", "bench_logits"}:  # peers, loaded where they are measured
            assert top not in {"transformers", "tokenizers", "trl", "accelerate", "datasets", "peft"}, (
                f"{path.name} imports {name}"
            )
    if mine == "kernels":
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
