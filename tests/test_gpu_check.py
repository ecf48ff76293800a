"""`make gpu-check` without a GPU: each stage starts or says why not, and one that fails costs the others nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from grpo_kernels.bench import cases as bench_cases
from grpo_kernels.bench import command as bench

ROOT = Path(__file__).parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_check = load("gpu_check")


def test_limits_add_up_to_nine_minutes() -> None:
    assert sum(stage.limit for stage in gpu_check.STAGES) <= 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this is the real thing: make gpu-check")
def test_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage; compiling all kernels is cut short here, since test_triton.py compiles them."""
    stages = [replace(one, limit=3) if one.name == "kernels" else one for one in gpu_check.STAGES]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setenv("NVCC", "no-such-nvcc")  # else it would write over the extension that these tests have loaded
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path)])
    code = gpu_check.main()
    records = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(records) == {stage.name for stage in stages}
    assert records["kernels"]["outcome"] in ("passed", "out of time")
    assert code == int(records["kernels"]["outcome"] != "passed")
    assert records["facts"]["outcome"] == "passed"
    assert "triton" in records["facts"]["found"]["backends"]
    assert records["csrc"]["reason"] == "nvcc is not on the PATH"
    for name in set(records) - {"csrc", "facts", "kernels"}:
        assert records[name]["outcome"] == "skipped"
        assert records[name]["reason"] == "there is no CUDA device"
    assert "| bench | skipped | 0.0 | there is no CUDA device |" in (tmp_path / "summary.md").read_text()


def test_unknown_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path), "--stages", "facts,bnch"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "bnch not among csrc, facts, kernels, tests" in capsys.readouterr().err


def test_a_stage_that_fails_or_hangs_is_recorded(tmp_path: Path) -> None:
    def stage(code: str, limit: int = 20) -> dict:
        commands = [[sys.executable, "-c", code]] * 2
        return gpu_check.run_stage(gpu_check.Stage("x", limit, lambda out: commands), tmp_path)

    failed = stage("print('so far'); raise SystemExit(3)")
    assert failed["outcome"] == "failed (exit 3)"
    assert failed["output_end"] == "so far\n"
    began = time.monotonic()
    hung = stage("import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)", limit=1)
    assert hung["outcome"] == "out of time"
    assert time.monotonic() - began < 15
    assert stage("print('fine')")["outcome"] == "passed"


def test_what_is_read_from_output() -> None:
    assert gpu_check._test_counts("....\n3 failed, 120 passed, 2 skipped in 12.3s\n") == {
        "failed": 3,
        "passed": 120,
        "skipped": 2,
    }
    assert gpu_check._json_in('warning\n{"records": [1]}\n') == {"records": [1]}
    assert gpu_check._json_in("nothing") is None
    assert gpu_check._sanitizer_summary("========= ERROR SUMMARY: 0 errors\nx") == ["ERROR SUMMARY: 0 errors"]


def test_sanitized_script_is_python() -> None:
    compile(gpu_check.SANITIZED, "sanitized", "exec")


def test_summary_of_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the stage, on a CPU and a small case: what it leaves is in the summary."""
    some = [one for one in bench.SUITES["linear"].contenders if one.name in ("eager", "torch", "Cut Cross-Entropy")]
    monkeypatch.setitem(bench.SUITES, "linear", replace(bench.SUITES["linear"], contenders=tuple(some)))
    command = gpu_check._bench(tmp_path, 100, ["linear/growth/tokens256"])
    assert command[command.index("--device") + 1] == "cuda"
    assert bench_cases.select(gpu_check.BENCH)
    assert bench_cases.select(gpu_check.BENCH_LINEAR)
    bench.run([bench_cases.LinearCase(4, 8, 16, 200)], tmp_path / "bench", quick=True)
    lines = gpu_check.summary([], tmp_path).splitlines()
    assert "linear_4x8x16x200_float32_ignored0" in lines
    (ours,) = [line for line in lines if line.startswith("| torch |")]
    assert ours.count("|") == 6
    assert "%" in ours
    assert "| Cut Cross-Entropy | its kernels run on NVIDIA GPUs only | | | |" in lines


def test_tuner_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = load("tune_tiles")
    from grpo_kernels.kernels.triton import tiles

    before = dict(tiles.TILES)
    monkeypatch.setattr(tuner, "candidates", lambda: [("forward", 4, 128, 4), ("backward", 4, 128, 4)])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    records = tuner.measure(device, 4, (200, 301), budget=60, repetitions=1)
    assert [(r["pass"], r["block"]) for r in records] == [("backward", 128), ("forward", 128)]
    assert all(record["gbps"] >= 0 for record in records)
    assert before == tiles.TILES
    assert tuner.measure(device, 4, (200,), budget=-1.0) == []
