"""The benchmark: its gate, its records, and the memory that it sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_kernels import bench, bench_cases, bench_linear, bench_machine, bench_peers, bench_plots
from grpo_kernels.kernels import torch_chunked


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile takes a minute."""
    monkeypatch.setattr(bench, "CONTENDERS", tuple(one for one in bench.CONTENDERS if not one.compiled))


SMALL = bench.Case(4, 40, 500, "float32", ignored=0.25)


def test_records(tmp_path: Path) -> None:
    records = bench.run([SMALL], 3, tmp_path)
    file = json.loads((tmp_path / "cpu" / f"{SMALL.name}.json").read_text())
    assert file["records"] == records
    assert file["torch"] == torch.__version__
    assert [record["contender"] for record in records] == [contender.name for contender in bench.CONTENDERS]
    for record in records:
        low, high = record["iqr_ms"]
        assert 0 < low <= record["median_ms"] <= high
        assert record["floor_bytes"] == 4 * 500 * 4 * (3 * 30 + 10)
        assert 0 < record["forward_ms"] < high
        assert 0 < record["backward_ms"] < high
    calls = {record["contender"]: record["operator_calls"] for record in records}
    assert calls["reference"] > calls["torch"] > 5


def test_a_wrong_gradient_writes_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_chunked.token_logps_backward

    def slightly_off(dtoken_logps, *rest) -> None:
        original(dtoken_logps * (1 + 1e-5), *rest)

    monkeypatch.setattr(torch_chunked, "token_logps_backward", slightly_off)
    with pytest.raises(ValueError, match="torch on logits_4x40x500_float32_ignored25: gradient error"):
        bench.run([SMALL], 3, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory() -> None:
    """8 x 512 x 8000 float32 are 125 MiB: eager holds copies of it; ours in place hold a chunk or nothing."""
    case = bench.Case(8, 512, 8000, "float32")
    peaks = {contender.name: bench.peak_extra_mib(contender, case) for contender in bench.CONTENDERS}
    assert peaks["torch in place"] < 32
    assert 100 < peaks["torch"] < 125 + 32
    assert peaks["reference"] > 250
    if "cpp" in peaks:
        assert peaks["cpp in place"] < 8
        assert 100 < peaks["cpp"] < 125 + 8


LINEAR = bench_linear.LinearCase(4, 24, 16, 300, ignored=0.25)
QUICK_PEERS = ("eager", "torch linear_cross_entropy", "torch", "cpp", "Cut Cross-Entropy", "triton")


@pytest.fixture
def few_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch.compile, which takes a minute to compile."""
    some = tuple(peer for peer in bench_peers.PEERS if peer.name in QUICK_PEERS)
    monkeypatch.setattr(bench_linear, "PEERS", some)


@pytest.mark.usefixtures("few_peers")
def test_linear_records_and_picture(tmp_path: Path) -> None:
    bench.run([LINEAR], 3, tmp_path)
    path = tmp_path / "cpu" / f"{LINEAR.name}.json"
    by_name = {record["contender"]: record for record in json.loads(path.read_text())["records"]}
    assert set(by_name) == set(QUICK_PEERS)
    assert by_name["Cut Cross-Entropy"]["not_measured_because"] == "its kernels run on NVIDIA GPUs only"
    assert "not_measured_because" in by_name["triton"]
    for name in ("eager", "torch"):
        record = by_name[name]
        low, high = record["iqr_ms"]
        assert 0 < low <= record["median_ms"] <= high
        assert record["floor_flops"] == 6 * 4 * 18 * 16 * 300
        assert record["gradient_error"] < 1e-5
        assert record["peak_extra_mib"] >= 0
    (picture,) = bench_plots.draw(tmp_path / "cpu", tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_peer_computes_the_reference() -> None:
    case = replace(LINEAR, reference=True)
    able = [peer for peer in bench_peers.PEERS if peer.why_not("cpu") is None and peer.name != "torch.compile"]
    assert {"eager", "torch", "torch, 12 MiB"} <= {peer.name for peer in able}
    for peer in able:
        assert bench_linear.gate(peer, case) < 1e-5
    assert bench_cases.cost(case)["both"].flops == 8 * 4 * 18 * 16 * 300
    wrong = bench_peers.Peer(
        "no reference", "nothing", lambda device: None, lambda: lambda *x: bench_peers.eager(*x[:3])
    )
    with pytest.raises(ValueError, match="gradient error"):
        bench_linear.gate(wrong, case)


@pytest.mark.usefixtures("few_peers")
def test_a_wrong_linear_gradient_of_ours_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch_chunked.token_logps_backward

    def off(dtoken_logps, *rest) -> None:
        original(dtoken_logps * 1.001, *rest)

    monkeypatch.setattr(torch_chunked, "token_logps_backward", off)
    with pytest.raises(ValueError, match="gradient error"):
        bench.run([LINEAR], 3, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.usefixtures("few_peers")
def test_a_wrong_peer_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = bench_peers.Peer("wrong", "nothing", lambda device: None, lambda: lambda *x: 2 * bench_peers.eager(*x))
    monkeypatch.setattr(bench_linear, "PEERS", (*bench_linear.PEERS[:1], wrong))
    records = bench.run([LINEAR], 3, tmp_path)
    assert "median_ms" in records[0]
    assert "gradient error" in records[1]["not_measured_because"]
    assert "median_ms" not in records[1]


def test_cost_counts_only_what_counts() -> None:
    linear = bench_cases.cost(bench_cases.LinearCase(4, 10, 8, 100, ignored=0.5))
    assert [linear[part].flops for part in ("forward", "backward", "both")] == [32000, 64000, 96000]
    assert linear["forward"].bytes == (20 + 100) * 8 * 4
    logits = bench_cases.cost(bench_cases.Case(4, 10, 100, "bfloat16", ignored=0.5))
    assert [logits[part].bytes for part in ("forward", "backward", "both")] == [4000, 12000, 16000]
    assert bench_cases.Cost(3_000_000, 8_000_000).milliseconds(copy_gbps=1, matrix_gflops=2) == 4


def test_cases_by_name() -> None:
    chosen = bench_cases.select(["linear/gemma-2-2b/ignored*", "logits/llama-3-70b/groups1000000"])
    assert {case.ignored for name, case in chosen.items() if name.startswith("linear")} == {0.0, 0.5, 0.9}
    assert chosen["logits/llama-3-70b/groups1000000"].num_groups == 1_000_000
    assert len({case.name for case in bench_cases.NAMED.values()}) >= 60
    with pytest.raises(ValueError, match="no case is named 'lgits/"):
        bench_cases.select(["lgits/*"])


def test_a_case_that_does_not_fit_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench, "available_bytes", lambda: 1000)
    assert bench.run([SMALL], 3, tmp_path) == []
    assert "GiB of memory" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_many_groups_pass_the_gate() -> None:
    case = bench.Case(4, 32, 100, "float32", num_groups=1_000_000)
    assert bench.gate(bench.Contender("torch", "torch"), case) < 1e-6


def test_machine_rates_and_operator_calls() -> None:
    assert bench_machine.copy_gbps(2**20) > 0
    assert bench_machine.matrix_gflops(torch.float32, 64) > 0
    x = torch.ones(2, 2)
    assert bench_machine.operator_calls(lambda: (x @ x).exp()) == 2  # aten::mm is inside matmul


def test_growth_and_roofline(tmp_path: Path) -> None:
    """Pictures over records of several cases, one thing varying in each."""
    record = {"contender": "torch", "median_ms": 1.0, "fraction_of_roof": 0.5}
    common = {"device": "d", "torch": "2", "date": "2026-01-01", "commit": "c"}
    for length, groups in ((8, 3), (16, 3), (8, 32)):
        case = {"num_sequences": 2, "length": length, "vocab_size": 9, "dtype": "float32", "ignored": 0.0}
        records = [{**record, "case": {**case, "num_groups": groups}}]
        (tmp_path / f"{length}_{groups}.json").write_text(json.dumps({**common, "records": records}))
    pictures = bench_plots.draw_summaries(tmp_path, tmp_path)
    names = ["logits_roofline.png", "logits_growth_tokens.png", "logits_growth_groups.png"]
    assert [picture.name for picture in pictures] == names
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
