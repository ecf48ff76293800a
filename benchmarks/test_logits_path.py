"""Forward and backward of the loss on logits, for a person at a terminal: ``pytest benchmarks``."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels import bench


@pytest.mark.parametrize("contender", bench.CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("case", bench.QUICK_CASES, ids=lambda case: case.name)
def test_loss_and_gradient(benchmark: Any, contender: bench.Contender, case: bench.Case) -> None:
    bench.gate(contender, case)
    inputs = bench.inputs_of(case)
    operation = bench.loss_and_gradient(contender, case)
    loss, _ = benchmark(operation, *inputs)
    assert loss.isfinite()
