"""Forward and backward from hidden states, ours and the peers', for a person at a terminal: ``pytest benchmarks``."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_kernels import bench_linear, bench_peers


@pytest.mark.parametrize("peer", bench_peers.PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", bench_linear.QUICK_CASES, ids=lambda case: case.name)
def test_loss_and_gradients(benchmark: Any, peer: bench_peers.Peer, case: bench_linear.LinearCase) -> None:
    reason = peer.why_not("cpu")
    if reason is not None:
        pytest.skip(reason)
    bench_linear.gate(peer, case)
    forward, backward = benchmark(bench_linear.step, peer.build(), bench_linear.inputs_of(case))
    assert forward > 0
    assert backward > 0
