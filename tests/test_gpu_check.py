"""`make gpu-check` without a GPU: every stage's code on a fake one, and what a stage that fails costs the others."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simulated_cuda
import torch
from conftest import EMPTY_BY_DESIGN
from fake_gpu import fake_gpu
from makefile import make_would

from grpo_kernels.bench import command
from grpo_kernels.bench import machine as bench_machine
from grpo_kernels.bench import suite as bench_suite
from grpo_kernels.kernels.triton import tiles

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check  # noqa: E402
import gpu_stages  # noqa: E402
import tune_tiles  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this is the real thing: make gpu-check")
NO_SIMULATOR = pytest.mark.skipif(simulated_cuda.missing() is not None, reason=str(simulated_cuda.missing()))


# -- the runner, with stages of its own --------------------------------------------------------------------------------


def stage(name: str, code: str, until: float = 20, **options: Any) -> gpu_check.Stage:
    return gpu_check.Stage(name, until, (sys.executable, "-S", "-c", code), **options)


def run(tmp_path: Path, *stages: gpu_check.Stage) -> dict[str, Any]:
    """Records by name."""
    report = gpu_check.Report("A", tmp_path)
    status = gpu_check.run(stages, report)
    found = json.loads((tmp_path / "gpu_check_A.json").read_text())
    assert status == int(any(one["outcome"] != "passed" for one in found["stages"]))
    return {one["stage"]: one for one in found["stages"]}


def test_a_stage_that_fails_or_hangs_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('{\"a\": 1}', flush=True); "
    beside = "import time; time.sleep(1); print('{\"b\": 2}')"
    began = time.monotonic()
    records = run(
        tmp_path,
        stage("beside", beside, beside=True),
        stage("fails", "print('so far'); raise SystemExit(5)"),
        gpu_check.Stage("absent", 20, ("no-such-program",)),
        stage("after", "import os; print('{\"seconds\": %s}' % os.environ['GPU_CHECK_SECONDS'])", after=("beside",)),
        stage("hangs", deaf + "import subprocess; subprocess.Popen(['sleep', '60']); time.sleep(60)", until=6),
        stage("asked", "import time; time.sleep(60)", until=16),
        stage("garbled", "print('{not json'); print('{\"c\": 3}', end='')", until=40),
    )
    assert time.monotonic() - began < 50
    outcomes = {name: one["outcome"] for name, one in records.items()}
    assert outcomes == {
        "beside": "passed",
        "fails": "failed (exit 5)",
        "absent": "failed: [Errno 2] No such file or directory: 'no-such-program'",
        "after": "passed",
        "hangs": "out of time, killed",
        "asked": "out of time",
        "garbled": "passed",
    }
    assert records["fails"]["output_end"] == "so far\n"
    assert records["hangs"]["lines"] == [{"a": 1}]
    assert records["beside"]["lines"] == [{"b": 2}]
    assert 0 < records["after"]["lines"][0]["seconds"] < 20  # it waited for the one beside it
    assert "KeyboardInterrupt" in records["asked"]["output_end"]
    unreadable, last = records["garbled"]["lines"]
    assert "{not json" in unreadable["unreadable"]
    assert last == {"c": 3}  # although its line has no end
    assert {path.name for path in tmp_path.iterdir()} == {
        f"gpu_check_A.{suffix}" for suffix in ("json", "md", "tar.gz")
    }
    with tarfile.open(tmp_path / "gpu_check_A.tar.gz") as archive:
        assert archive.extractfile("gpu_check_A/fails.txt").read() == b"so far\n"
        assert len(archive.getnames()) == 7
    assert "| asked | out of time |" in (tmp_path / "gpu_check_A.md").read_text()


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    """The record has each line as soon as it was printed; no stage outlives the one who started it for long."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu_check; from pathlib import Path; "
        'child = \'import time; print("{\\\\"a\\\\": 1}", flush=True); time.sleep(8)\'; '
        "one = gpu_check.Stage('one', 60, (sys.executable, '-S', '-c', child)); "
        f"gpu_check.run((one,), gpu_check.Report('A', Path({str(tmp_path)!r})))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    record, end = tmp_path / "gpu_check_A.json", time.monotonic() + 30
    while not (record.exists() and '"a": 1' in record.read_text()) and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (one,) = json.loads(record.read_text())["stages"]
    assert one["lines"] == [{"a": 1}]
    assert one["outcome"] == "running"


def test_what_is_read_from_lines() -> None:
    record: dict[str, Any] = {"lines": []}
    for line in (
        "[gw0] [ 12%] PASSED tests/test_gpu.py::test_a[triton-1]",
        "[gw3] [ 14%] FAILED tests/test_gpu.py::test_b[cuda - x]",
        "tests/test_gpu.py::test_c[triton] SKIPPED (there is no CUDA device) [ 50%]",
        "tests/test_gpu.py::test_d PASSED                             [100%]",
        "FAILED tests/test_gpu.py::test_b[cuda - x] - AssertionError",
    ):
        gpu_check.test_line(line, record)
    assert record["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert record["lines"] == [{"failed": "tests/test_gpu.py::test_b[cuda - x]"}]
    record = {"lines": []}
    for line in ("========= Invalid __global__ read of size 4 bytes", "x", "========= ERROR SUMMARY: 1 error"):
        gpu_check.sanitizer_line(line, record)
    assert [one["said"] for one in record["lines"]] == [
        "Invalid __global__ read of size 4 bytes",
        "ERROR SUMMARY: 1 error",
    ]
    record = {"lines": []}
    for line in (
        "==PROF== Connected to process 1",
        '{"profiled": "cuda"}',
        '"ID","Kernel Name","Block Size","launch__registers_per_thread","gpu__time_duration.sum"',
        '"","","","register/thread","ns"',
        '"0","_logps_bwd_kernel, x","(256, 1, 1)","32","1,000"',
    ):
        gpu_check.profiler_line(line, record)
    kernel = {
        "Kernel Name": "_logps_bwd_kernel, x",
        "launch__registers_per_thread": "32",
        "gpu__time_duration.sum": "1,000",
    }
    assert record["lines"] == [{"profiled": "cuda"}, kernel]


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_parts_take_270_and_300_seconds() -> None:
    for name, stages in gpu_check.PARTS.items():
        ends = [one.until for one in stages if not one.beside]
        assert ends == sorted(ends)
        assert ends[-1] + gpu_check.GRACE <= {"A": 270, "B": 300}[name]
        beside = {one.name for one in stages if one.beside}
        assert {needed for one in stages for needed in one.after} <= beside
        # What is waited for ends early enough to leave the one that waits most of its time.
        assert all(one.until <= 70 for one in stages if one.beside)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--part", "A", "--out", str(tmp_path), "--stages", "facts,tuen"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "--stages must be among csrc, facts, triton" in capsys.readouterr().err


@NO_GPU
def test_without_a_gpu_it_stops_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_stages.main(["facts"])
    assert stopped.value.code == gpu_check.NO_GPU
    assert capsys.readouterr().out == "there is no CUDA device\n"
    assert list(run(tmp_path, stage("facts", "raise SystemExit(3)"), stage("triton", ""))) == ["facts"]


def test_make_passes_its_variables_on() -> None:
    variables = shlex.split("PART=B OUT=o STAGES=facts COMMIT=abc PYTHON=python VENV=")
    words = shlex.split(make_would("gpu-check", *variables).replace("\\\n", " "))
    assert words == shlex.split("python benchmarks/gpu_check.py --part B --out o --stages facts --commit abc")
    with pytest.raises(subprocess.CalledProcessError) as refused:
        make_would("gpu-check", "PYTHON=python", "VENV=")
    assert "PART=A, the kernels in 270 s, or PART=B" in refused.value.stderr


# -- the stages, on a fake GPU -----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Small cases, each shape once; the names of the functions of torch.cuda that were called."""
    real = command.measured

    def measured(cases: Any, device: str, seconds: float, quick: bool, contenders: Any) -> Any:
        assert seconds > 0
        small = {"num_sequences": 2, "length": 2, "vocab_size": 24, "num_groups": 5}
        of_linear = {"hidden_size": 8}
        few = {replace(one, **small, **(of_linear if hasattr(one, "hidden_size") else {})): None for one in cases}
        if contenders == ("*",):  # importing TRL takes longer than all else, and the interpreter has had its turn
            contenders = ("reference", "eager", "torch*", "cuda*")
        return real(list(few), device, seconds, True, contenders)

    monkeypatch.setattr(command, "measured", measured)
    monkeypatch.setattr(command, "repetitions_of", lambda *_: 2)
    monkeypatch.setattr(bench_suite, "WARM_UP", 0)
    monkeypatch.setitem(bench_machine.RATE_BYTES, "cuda", 2**16)
    monkeypatch.setitem(bench_machine.MATRIX_ROWS, "cuda", 64)
    monkeypatch.setattr(gpu_stages, "PROFILED", (2, 2, 24, "bfloat16"))
    monkeypatch.setattr(gpu_stages, "SANITIZED", ((24, 2), (1, 1)))
    monkeypatch.setattr(tune_tiles, "SHAPES", ((2, 1, 300), (2, 1, 301)))
    choices = {"block": {2: (256,), 4: (128,)}, "num_warps": {2: (1,), 4: (1,)}}
    monkeypatch.setattr(tune_tiles, "CHOICES", choices)
    monkeypatch.setattr(tune_tiles, "REPETITIONS", 1)
    with fake_gpu(monkeypatch) as called:
        yield called


def lines_of(part: str, name: str, capsys: pytest.CaptureFixture) -> list[dict[str, Any]]:
    """What the stage's own command, without the program that it may run under, leaves in the record."""
    (one,) = (one for one in gpu_check.PARTS[part] if one.name == name)
    begin = one.command.index(str(ROOT / "benchmarks" / "gpu_stages.py"))
    capsys.readouterr()
    gpu_stages.main(one.command[begin + 1 :])
    record: dict[str, Any] = {"stage": name, "outcome": "passed", "lines": []}
    for line in capsys.readouterr().out.splitlines():
        one.read(line, record)
    assert record["lines"]
    assert "{" not in gpu_check.summary([record]) or name not in ("triton", "cuda", "finish", "peers", "linear")
    return record["lines"]


@NO_GPU
@NO_SIMULATOR
@pytest.mark.parametrize(
    ("part", "name", "contenders"),
    [
        ("A", "triton", {"triton", "triton in place"}),
        ("A", "cuda", {"cuda", "cuda in place"}),
        ("A", "finish", {"reference", "triton in place", "cuda in place"}),
        ("B", "peers", {"reference", "torch cross_entropy", "torch", "cuda", "cuda in place"}),
        ("B", "linear", {"eager", "torch", "cuda"}),
    ],
)
def test_measuring(gpu: list[str], capsys: pytest.CaptureFixture, part: str, name: str, contenders: set[str]) -> None:
    lines = lines_of(part, name, capsys)
    for found in lines:
        assert found["device"] == "Fake GPU"
        records = {one["contender"]: one for one in found["records"]}
        assert {one for one in records if "median_ms" in records[one]} >= contenders, records
        for one in contenders:
            assert records[one]["launches"] == 1
            assert records[one]["gradient_error"] > 0
        assert not [one for one in records.values() if one["ours"] and "failed_because" in one]
    dtypes = {found["records"][0]["case"]["dtype"] for found in lines}
    assert dtypes == {"bfloat16", "float32"} if name in ("triton", "cuda") else len(dtypes) == 1
    assert {"_sleep", "synchronize"} <= set(gpu)  # times are the device's, the host kept ahead


@NO_GPU
@NO_SIMULATOR
@pytest.mark.filterwarnings("ignore:a group's loss was not finite")
@EMPTY_BY_DESIGN
def test_profiling_and_sanitizing(gpu: list[str], capsys: pytest.CaptureFixture) -> None:
    assert [one["profiled"] for one in lines_of("A", "ncu", capsys)] == ["cuda", "triton"]
    assert [name for name in gpu if name.startswith("profiler")] == 2 * ["profiler.start", "profiler.stop"]
    lines = lines_of("B", "memcheck", capsys)
    assert len(lines) == 2 * 2 * 2
    assert all(one["nan"] for one in lines)  # of the label outside the vocabulary


@NO_GPU
def test_tuning(gpu: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of tile, one that fails among them; the table is as before, also when the time is over."""
    before = dict(tiles.TILES)
    monkeypatch.setitem(tune_tiles.CHOICES, "block", {2: (256, 512), 4: (128,)})
    real = tune_tiles.gbps

    def gbps(pass_name: str, case: Any, *rest: Any) -> float:
        if tiles.TILES[pass_name, torch.finfo(getattr(torch, case.dtype)).bits // 8].block == 512:
            raise RuntimeError("out of shared memory")
        return real(pass_name, case, *rest)

    monkeypatch.setattr(tune_tiles, "gbps", gbps)
    lines = lines_of("A", "tune", capsys)
    assert before == tiles.TILES
    tried = [(one["itemsize"], one["pass"], one["block"]) for one in lines if "gbps" in one]
    assert len([one for one in lines if one.get("block") == 512 and "failed_because" in one]) == 2
    for itemsize, block in ((2, 256), (4, 128)):
        for pass_name in ("forward", "backward"):
            present = before[pass_name, itemsize].block
            assert [one[2] for one in tried if one[:2] == (itemsize, pass_name)] == [present, block]
    assert len([one for one in lines if "best" in one]) == 4
    monkeypatch.setattr(gpu_stages, "SECONDS", 0.0)
    lines = lines_of("A", "tune", capsys)
    assert {one["not_tried"] for one in lines} == {"the rest: the time is over"}


@NO_GPU
def test_facts(gpu: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools(tmp_path, monkeypatch)
    doctor, card, memory, matrix = lines_of("A", "facts", capsys)
    assert doctor["devices"][1] == "cuda:0: Fake GPU, capability 9.0"
    assert card["nvidia-smi"] == ["9.0"]
    assert min(*memory.values(), *matrix.values()) > 0


def tools(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho 9.0\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@NO_GPU
@NO_SIMULATOR
@EMPTY_BY_DESIGN
def test_what_the_smoke_stage_runs(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_gpu.py at small sizes: graphs, launches and what compiles need a real one."""
    import test_gpu

    test_gpu.test_real_vocabularies("cuda", 127, torch.float32)
    test_gpu.test_fifty_runs_are_bitwise_equal("cuda", 1, 3, 127)
    test_gpu.test_packed_rows("cuda", 127)
    test_gpu.test_no_synchronisation("torch")
    test_gpu.test_many_groups("cuda", 5)
    assert "set_sync_debug_mode" in gpu


# -- what runs beside the stages ---------------------------------------------------------------------------------------


def test_csrc_is_built_for_this_gpu_and_put_in_place_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With an nvcc that notes what it is asked for; test_cuda.py compiles with the real one."""
    tools(tmp_path, monkeypatch)
    for name in ("setup.py", "csrc"):
        (tmp_path / name).symlink_to(ROOT / name)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f"#!/bin/sh\necho $* >> {tmp_path}/asked\n"
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done; echo V13.0.1\n'
    )
    compiler = tmp_path / "cc"
    compiler.write_text(nvcc.read_text().replace(f"echo $* >> {tmp_path}/asked", ""))
    for one in (nvcc, compiler):
        one.chmod(0o755)
    for name, value in (("NVCC", nvcc), ("CC", compiler), ("CXX", compiler)):
        monkeypatch.setenv(name, str(value))
    (tmp_path / "grpo_kernels").mkdir()
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    gpu_stages.main(["csrc"])
    found = json.loads(capsys.readouterr().out)
    assert found["for"] == "sm_90a"
    assert (tmp_path / "grpo_kernels" / found["built"]).read_text() == "made\n"
    asked = (tmp_path / "asked").read_text()
    assert asked.count("-gencode=arch=compute_90a,code=sm_90a") == len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert "sm_80" not in asked


def test_wheels_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    name = "thing-1.0.dist-info"
    files = {
        "thing.py": "",
        f"{name}/METADATA": "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        f"{name}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{name}/RECORD": f"thing.py,,\n{name}/METADATA,,\n{name}/WHEEL,,\n{name}/RECORD,,\n",
    }
    with zipfile.ZipFile(tmp_path / "thing-1.0-py3-none-any.whl", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("no wheel")
    monkeypatch.setenv("WHEELS", str(tmp_path))
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path)
    with pytest.raises(SystemExit, match="1 wheels were not installed"):
        gpu_stages.main(["wheels"])
    broken, thing = map(json.loads, capsys.readouterr().out.splitlines())
    assert not broken["installed"]
    assert "broken-1.0" in broken["said"]
    assert thing["installed"]
    assert (tmp_path / "site" / "thing.py").exists()


def test_tests_are_run_by_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, command: ran.append(command))
    for part, name in (("A", "smoke"), ("B", "tests")):
        (one,) = (one for one in gpu_check.PARTS[part] if one.name == name)
        gpu_stages.main(one.command[2:])
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    smoke, all_tests = ran
    assert smoke[1:7] == ["-m", "pytest", "-n", "6", "--dist", "worksteal"]
    assert "-n" not in all_tests
    assert "(triton or cuda or gpu) and not simulated" in all_tests
    assert all((ROOT / one.split("=")[-1]).exists() for one in (*smoke, *all_tests) if "tests/" in one)
