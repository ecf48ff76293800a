"""The benchmark's operations for a person at a terminal: ``pytest benchmarks`` (pytest-benchmark's table)."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels.bench import cases as bench_cases
from grpo_kernels.bench import command as bench
from grpo_kernels.bench.suite import gate, step

CASES = {bench.suite_name(case): case for case in bench_cases.QUICK}


@pytest.mark.parametrize(
    ("name", "contender"),
    [
        pytest.param(name, contender, id=f"{name}-{contender.name}")
        for name, suite in bench.SUITES.items()
        for contender in suite.contenders
    ],
)
def test_loss_and_gradients(benchmark: Any, name: str, contender: Any) -> None:
    reason = contender.why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    suite, case = bench.SUITES[name], CASES[name]
    gate(suite, contender, case)
    benchmark.group = name
    forward, backward, _ = benchmark(step, contender.build(case), suite.inputs_of(case, "cpu"))
    assert forward > 0
    assert backward > 0
