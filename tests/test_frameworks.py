"""Examples that need a library which the other tests do not: `make test-frameworks` installs them and runs this file.

Each is run on one rank and on several, and prints the same numbers.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from test_examples import PRINTED, RUN_ON, numbers, output_of

IN_FLOAT64 = (
    "import runpy, sys, torch; torch.set_default_dtype(torch.float64); sys.argv = sys.argv[1:]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
# float32: 20 steps of SGD at rate 1/2 from sums of 144 tokens in another order, as in distributed/cases.py.
IN_FLOAT32 = 2e-4


def needs(library: str) -> pytest.MarkDecorator:
    found = importlib.util.find_spec(library) is not None
    return pytest.mark.skipif(not found, reason=f"{library} is not installed: make test-frameworks")


def lines_of(ranks: int, *command: str, **environment: str) -> list[list[float]]:
    lines = numbers(output_of(*RUN_ON, str(ranks), *command, **environment))
    assert len(lines) >= 2
    assert len({tuple(line[1:]) for line in lines}) == len(lines), "alpha moves"
    return lines


def is_near(one: list[list[float]], several: list[list[float]], tolerance: float) -> None:
    for line, same in zip(one, several, strict=True):
        assert same == pytest.approx(line, abs=tolerance)


@needs("lightning")
def test_lightning(tmp_path: Path) -> None:
    def run(ranks: int, *arguments: str) -> list[list[float]]:
        command = ("--no-python", sys.executable, "-c", IN_FLOAT64, "examples/with_lightning.py", *arguments)
        return lines_of(ranks, *command)

    one = run(1, str(tmp_path / "one"))
    assert [line[0] for line in one] == [5, 10, 15, 20]
    is_near(one, run(2, str(tmp_path / "two")), PRINTED)
    resumed = run(2, str(tmp_path / "again"), str(tmp_path / "one" / "step=10.ckpt"))
    is_near(one[2:], resumed, PRINTED)


@needs("deepspeed")
def test_deepspeed() -> None:
    one, two = (lines_of(ranks, "examples/with_deepspeed.py", DS_ACCELERATOR="cpu") for ranks in (1, 2))
    assert [line[0] for line in one] == [5, 10, 15, 20]
    is_near(one, two, IN_FLOAT32)


@needs("torchtitan")
def test_torchtitan() -> None:
    one, four = (lines_of(ranks, "examples/with_torchtitan.py") for ranks in (1, 4))
    assert [line[0] for line in one] == [5, 10]
    is_near(one, four, IN_FLOAT32)


@pytest.mark.parametrize("name", ["with_lightning", "with_deepspeed", "with_torchtitan", "tensor_parallel"])
def test_examples_are_short(name: str) -> None:
    lines = (Path(__file__).parent.parent / "examples" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 80
