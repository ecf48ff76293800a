"""The benchmark: its gate, its records, and the memory that it sees."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo_kernels.bench import cases as bench_cases
from grpo_kernels.bench import command as bench
from grpo_kernels.bench import linear as bench_linear
from grpo_kernels.bench import logits as bench_logits
from grpo_kernels.bench import machine as bench_machine
from grpo_kernels.bench import plots as bench_plots
from grpo_kernels.bench import suite as bench_suite
from grpo_kernels.bench.cases import Case, LinearCase
from grpo_kernels.kernels import torch_chunked

ROOT = Path(__file__).parent.parent
LOGITS, LINEAR = bench_logits.SUITE, bench_linear.SUITE
SMALL = Case(4, 40, 500, "float32", ignored=0.25)
SMALL_LINEAR = LinearCase(4, 24, 16, 300, ignored=0.25)


@pytest.fixture(autouse=True)
def _peaks_without_a_process_each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.function is not test_peak_memory:
        monkeypatch.setattr(bench_suite, "resident_peaks_mib", lambda suite, names, case: dict.fromkeys(names, 12.5))


def contender(suite: bench_suite.Suite, name: str) -> bench_suite.Contender:
    return next(one for one in suite.contenders if one.name == name)


def wrong_factor(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the `torch` backend's gradient."""
    original = torch_chunked.token_logps_backward

    def off(dtoken_logps, *rest) -> None:
        original(dtoken_logps * factor, *rest)

    monkeypatch.setattr(torch_chunked, "token_logps_backward", off)
    monkeypatch.delattr(torch_chunked, "token_logps_and_unit_gradient")  # it makes gradients without the other


def only(monkeypatch: pytest.MonkeyPatch, *names: str, extra: tuple[bench_suite.Contender, ...] = ()) -> None:
    """Of the linear path."""
    some = tuple(one for one in LINEAR.contenders if one.name in names)
    monkeypatch.setitem(bench.SUITES, "linear", replace(LINEAR, contenders=(*some, *extra)))


def test_records(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    records = bench.run([SMALL], tmp_path, quick=True)
    assert capfd.readouterr().err == ""  # nor anything that a library writes
    file = json.loads((tmp_path / f"{SMALL.name}.json").read_text())
    assert file["records"] == records
    assert file["torch"] == torch.__version__
    assert [record["contender"] for record in records] == [one.name for one in LOGITS.contenders]
    assert not [record for record in records if "failed_because" in record]
    measured = {record["contender"]: record for record in records if "median_ms" in record}
    assert {"reference", "torch cross_entropy", "torch", "torch in place"} <= set(measured)
    for record in measured.values():
        low, high = record["iqr_ms"]
        assert 0 < low <= record["median_ms"] <= high
        assert record["floor_bytes"] == 4 * 500 * 4 * (3 * 30 + 10)
        assert record["fraction_of_roof"] == pytest.approx(record["fraction_of_copy"], abs=0.002)
        for part in ("forward", "backward", "host"):
            assert 0 < record[f"{part}_ms"] < 2 * high
        moved = record["forward_gbps"] * record["forward_ms"], record["backward_gbps"] * record["backward_ms"]
        assert moved == pytest.approx((4 * 500 * 4 * 30 / 1e6, 4 * 500 * 4 * (2 * 30 + 10) / 1e6), rel=0.02)
    assert measured["reference"]["operator_calls"] > measured["torch"]["operator_calls"] > 5
    reasons = {record["contender"]: record.get("not_measured_because", "") for record in records}
    assert "leaves out" in reasons["torch.compile"]
    assert "Triton's interpreter" in reasons["triton"]


@pytest.mark.parametrize(("suite", "case", "factor"), [(LOGITS, SMALL, 1 + 1e-5), (LINEAR, SMALL_LINEAR, 1.001)])
def test_a_wrong_gradient_of_ours_has_no_times(
    suite: bench_suite.Suite,
    case: Case | LinearCase,
    factor: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    wrong_factor(factor, monkeypatch)
    with pytest.raises(ValueError, match="errors of loss and gradients"):
        bench_suite.gate(suite, contender(suite, "torch"), case)
    name = bench.suite_name(case)
    some = tuple(one for one in suite.contenders if one.name in ("eager", "reference", "torch"))
    monkeypatch.setitem(bench.SUITES, name, replace(suite, contenders=some))
    monkeypatch.setattr(bench, "QUICK", [case])
    assert bench.bench(str(tmp_path), quick=True, device="cpu") == 1
    assert "failed: torch" in capsys.readouterr().err
    baseline, ours = json.loads((tmp_path / f"{case.name}.json").read_text())["records"]
    assert "median_ms" in baseline
    assert "median_ms" not in ours
    assert "errors of loss and gradients" in ours["failed_because"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory() -> None:
    """8 x 512 x 8000 float32 are 125 MiB: eager holds copies of it; ours in place hold a chunk or nothing."""
    case = Case(8, 512, 8000, "float32")
    names = ["reference", "torch", "torch in place", "cpp", "cpp in place"]
    able = [name for name in names if contender(LOGITS, name).why_not("cpu") is None]
    peaks = bench_suite.resident_peaks_mib("logits", able, case)
    assert list(peaks) == able
    assert peaks["torch in place"] < 32
    assert 100 < peaks["torch"] < 125 + 32
    assert peaks["reference"] > 250
    if "cpp" in peaks:
        assert peaks["cpp in place"] < 8
        assert 100 < peaks["cpp"] < 125 + 8


def test_each_case_is_compiled_however_many_came_before() -> None:
    """Over the limit PyTorch would run the contender uncompiled, and its times would be called torch.compile's."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> object:
        compiled.append(graph)
        return graph.forward

    def build(case: LinearCase) -> bench_suite.Operation:
        return torch.compile(bench_linear.eager, backend=backend, dynamic=False)

    suite = replace(LINEAR, contenders=(replace(contender(LINEAR, "torch.compile"), build=build),))
    for length in (16, 8):  # not over 16: the gate's shapes are the case's
        before = len(compiled)
        with torch._dynamo.config.patch(recompile_limit=1):  # pytest's monkeypatch would delete the option in the end
            bench_suite.records_of("linear", suite, replace(SMALL_LINEAR, length=length), 2, 1.0)
        assert len(compiled) > before, length


def test_linear_records_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("eager", "torch linear_cross_entropy", "torch", "cpp", "Cut Cross-Entropy", "triton")
    only(monkeypatch, *names)
    bench.run([SMALL_LINEAR], tmp_path, quick=True)
    path = tmp_path / f"{SMALL_LINEAR.name}.json"
    by_name = {record["contender"]: record for record in json.loads(path.read_text())["records"]}
    assert set(by_name) == set(names)
    assert by_name["Cut Cross-Entropy"]["not_measured_because"] == "its kernels run on NVIDIA GPUs only"
    assert "not_measured_because" in by_name["triton"]
    for name in ("eager", "torch"):
        record = by_name[name]
        low, high = record["iqr_ms"]
        assert 0 < low <= record["median_ms"] <= high
        assert record["floor_flops"] == 6 * 4 * 18 * 16 * 300
        assert record["gradient_error"] < 1e-5
        assert record["peak_extra_mib"] == 12.5
        assert record["times_bare_products"] > 0
    (picture,) = bench_plots.draw(tmp_path, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_peer_computes_the_reference_and_any_number_of_groups() -> None:
    case = replace(SMALL_LINEAR, reference=True, num_groups=1_000_000)
    able = [one for one in LINEAR.contenders if one.why_not("cpu") is None and one.name != "torch.compile"]
    assert {"eager", "torch", "torch, 12 MiB"} <= {one.name for one in able}
    for one in able:
        assert bench_suite.gate(LINEAR, one, case) < 1e-5
    assert bench_cases.cost(case)["both"].flops == 8 * 4 * 18 * 16 * 300

    def without_reference(case: LinearCase) -> bench_suite.Operation:
        return lambda hidden, weight, labels, reference: bench_linear.eager(hidden, weight, labels)

    with pytest.raises(ValueError, match="errors of loss and gradients"):
        bench_suite.gate(LINEAR, replace(able[0], build=without_reference), case)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_sees_zeros(dtype: str) -> None:
    def zeros(case: LinearCase) -> bench_suite.Operation:
        return lambda hidden, weight, *rest: (
            bench_linear.eager(hidden, weight, *rest).detach() + 0 * (hidden.sum() + weight.sum())
        )

    broken = replace(contender(LINEAR, "eager"), build=zeros)
    with pytest.raises(ValueError, match="errors of loss and gradients"):
        bench_suite.gate(LINEAR, broken, replace(SMALL_LINEAR, dtype=dtype))


def test_a_peer_that_is_wrong_or_raises_has_no_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = contender(LINEAR, "eager")
    wrong = replace(eager, name="wrong", build=lambda case: lambda *x: 2 * bench_linear.eager(*x))

    def only_few(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        if hidden.shape[1] > 16:
            raise RuntimeError("out of memory")
        return bench_linear.eager(hidden, *rest)

    raising = replace(eager, name="raising", build=lambda case: only_few)
    only(monkeypatch, "eager", extra=(wrong, raising))
    records = bench.run([SMALL_LINEAR], tmp_path, quick=True)
    assert "median_ms" in records[0]
    assert "errors of loss" in records[1]["failed_because"]
    assert records[2]["failed_because"] == "RuntimeError: out of memory"
    assert "median_ms" not in records[1] | records[2]
    only(monkeypatch, extra=(wrong,))
    assert "failed_because" in bench.run([SMALL_LINEAR], tmp_path, quick=True)[0]


def test_contenders_see_the_same_logits() -> None:
    """Also after one that wrote its gradient over them."""
    inputs = LOGITS.inputs_of(SMALL, "cpu")
    before = inputs[0].detach().clone()
    seen = []

    def look(logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(torch.equal(logits, before))
        return logits.sum()

    operations = {"torch in place": contender(LOGITS, "torch in place").build(SMALL), "look": look}
    times, ruler, failed = bench_suite.measure_times(LOGITS, operations, SMALL, inputs, 2, "cpu")
    assert seen == [True] * (2 + bench_suite.WARM_UP)
    assert len(times["torch in place"]) == 2
    assert ruler > 0
    assert not failed


def test_no_contender_is_always_first() -> None:
    seen: list[str] = []

    def named(name: str) -> bench_suite.Operation:
        def operation(logits: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
            seen.append(name)
            return logits.sum()

        return operation

    bench_suite.measure_times(
        LOGITS, {name: named(name) for name in "abc"}, SMALL, LOGITS.inputs_of(SMALL, "cpu"), 4, "cpu"
    )
    rounds = [seen[first : first + 3] for first in range(0, len(seen), 3)]
    assert [sorted(one) for one in rounds] == [list("abc")] * (4 + bench_suite.WARM_UP)
    assert len({one[0] for one in rounds}) > 1


def test_cost_counts_only_what_counts() -> None:
    linear = bench_cases.cost(LinearCase(4, 10, 8, 100, ignored=0.5))
    assert [linear[part].flops for part in ("forward", "backward", "both")] == [32000, 64000, 96000]
    assert linear["forward"].bytes == (20 + 100) * 8 * 4
    logits = bench_cases.cost(Case(4, 10, 100, "bfloat16", ignored=0.5))
    assert [logits[part].bytes for part in ("forward", "backward", "both")] == [4000, 12000, 16000]
    assert bench_cases.Cost(3_000_000, 8_000_000).milliseconds(copy_gbps=1, matrix_gflops=2) == 4


def test_cases_by_name() -> None:
    chosen = bench_cases.select(["linear/gemma-2-2b/ignored*", "l*/llama-3-70b/groups1000000"])
    assert {case.ignored for name, case in chosen.items() if "ignored" in name} == {0.0, 0.5, 0.9}
    assert chosen["logits/llama-3-70b/groups1000000"].num_groups == 1_000_000
    assert chosen["linear/llama-3-70b/groups1000000"].num_groups == 1_000_000
    for case in bench_cases.DEFAULT:
        assert list(bench_cases.select([case.name]).values()) == [case], "by its record's name"
    names = [case.name for case in bench_cases.NAMED.values()]
    assert len(set(names)) >= 100
    with pytest.raises(ValueError, match="'lgits/growth/groups2'; near to it are logits/growth/groups2, "):
        bench_cases.select(["lgits/growth/groups2"])


def test_a_case_that_does_not_fit_or_comes_too_late_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert bench.run([SMALL], tmp_path, seconds=-1) == []
    assert "not measured: -1 s were over" in capsys.readouterr().out
    monkeypatch.setattr(bench, "available_bytes", lambda: 1000)
    assert bench.run([SMALL], tmp_path) == []
    assert "GiB of memory" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device cuda: there is no CUDA device"):
        bench.bench(str(tmp_path), quick=True, device="cuda")


def test_many_groups_pass_the_gate() -> None:
    case = Case(4, 32, 100, "float32", num_groups=1_000_000)
    assert bench_suite.gate(LOGITS, contender(LOGITS, "torch"), case) < 1e-6


def test_machine_rates_and_operator_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_machine.RATE_BYTES, "cpu", 2**20)
    monkeypatch.setitem(bench_machine.MATRIX_ROWS, "cpu", 64)
    assert bench_machine.copy_gbps() > 0
    assert bench_machine.read_gbps() > 0
    assert bench_machine.matrix_gflops(torch.float32) > 0
    x = torch.ones(2, 2)
    assert bench_machine.operator_calls(lambda: (x @ x).exp()) == 2  # aten::mm is inside matmul


def test_at_a_terminal() -> None:
    """`pytest benchmarks`, each operation once, but for TRL's, whose import takes longest: test_records has it."""
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "not compile and not best and not TRL"]
    command = [sys.executable, "-m", "pytest", "benchmarks", *options]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
    assert " passed" in ran.stdout


def test_growth_and_roofline(tmp_path: Path) -> None:
    """Pictures over records of several cases, one thing varying in each."""
    record = {"contender": "torch", "ours": True, "median_ms": 1.0, "fraction_of_roof": 0.5, "peak_extra_mib": 3.0}
    common = {"device": "d", "torch": "2", "date": "2026-01-01", "commit": "c"}
    case = {"num_sequences": 2, "length": 8, "vocab_size": 9, "dtype": "float32", "ignored": 0.0, "num_groups": 3}
    linear = {**case, "hidden_size": 4}
    for number, one in enumerate(
        (
            *(case, {**case, "length": 16}, {**case, "num_groups": 32}, {**case, "vocab_size": 18}),
            *(linear, {**linear, "hidden_size": 8}),
        )
    ):
        records = [{**record, "case": one}]
        (tmp_path / f"{number}.json").write_text(json.dumps({**common, "records": records}))
    pictures = bench_plots.draw_summaries(tmp_path, tmp_path)
    kinds = ("roofline", "growth_tokens", "growth_memory", "growth_groups", "growth_vocabulary")
    expected = [*(f"logits_{kind}" for kind in kinds), "linear_roofline", "linear_growth_width"]
    assert [picture.stem for picture in pictures] == expected
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
