"""The main job: tiny runs to the end, exact resume, interruption, real data, and the claim of the embedded task."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grpo_kernels.__main__ import main
from grpo_kernels.training import command as train
from grpo_kernels.training import data, embedded_task
from grpo_kernels.training.config import TrainConfig, resolved_step_size
from grpo_kernels.training.job import Interrupted, TrainingJob

REAL = Path(__file__).parent.parent.parent / "shared" / "data"
TINY = {"hidden_size": 32, "num_layers": 1, "batch_size": 8, "eval_every": 3, "checkpoint_every": 2}


def tiny(out: Path, **options) -> TrainConfig:
    return TrainConfig(**{**TINY, "sft_steps": 3, "steps": 6, "out": str(out), **options})


@pytest.fixture(autouse=True)
def _small_task(monkeypatch: pytest.MonkeyPatch) -> None:
    original = embedded_task.generate_pairs
    monkeypatch.setattr(embedded_task, "generate_pairs", lambda n, seed: original(min(n, 60), seed))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_run_leaves_what_it_says(tmp_path: Path, loss: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = train.start(tiny(tmp_path / "run", loss=loss, compare=True), resume=False)
    out = tmp_path / "run"
    shown = capsys.readouterr().out
    for group in ("business", "casual", "editors"):
        assert group in shown
        for run in ("robust", "plain"):
            scores = results["runs"][run]["groups"][group]
            assert math.isfinite(scores["loss"])
            assert 0 <= scores["accuracy"] <= 1
    assert f"{results['runs']['plain']['worst_loss']:.4f}" in shown
    assert sum(results["runs"]["robust"]["alpha"].values()) == pytest.approx(1)
    assert json.loads((out / "results.json").read_text()) == results
    evaluated = [(r["run"], r["step"]) for r in records(out) if "worst_loss" in r]
    assert evaluated == [(run, step) for run in ("robust", "plain") for step in (0, 3, 6)]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    start = {run: next(r for r in records(out) if r["run"] == run) for run in ("robust", "plain")}
    assert start["robust"]["groups"] == start["plain"]["groups"]  # both set out from the same policy
    at_zero = {"sigmoid": math.log(2), "ipo": 25.0}[loss]
    assert start["robust"]["worst_loss"] == pytest.approx(at_zero, rel=1e-4)


def test_the_trained_model_loads_again(tmp_path: Path) -> None:
    train.start(tiny(tmp_path / "a"), resume=False)
    results = train.start(tiny(tmp_path / "b", model=str(tmp_path / "a" / "model"), sft_steps=0), resume=False)
    assert results["runs"]["robust"]["step"] == 6
    assert main(["train", "--model", str(tmp_path / "none"), "--out", str(tmp_path / "c")]) == 2


def state_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_state(a: Path, b: Path) -> None:
    left, right = state_of(a), state_of(b)
    assert left["step"] == right["step"]
    for part in ("model", "group_weights"):
        for name, value in left[part].items():
            assert torch.equal(value, right[part][name]), f"{part}.{name}"
    for index, moments in left["optimizer"]["state"].items():
        assert torch.equal(moments["exp_avg"], right["optimizer"]["state"][index]["exp_avg"])
    assert left["evaluations"] == right["evaluations"]


@pytest.mark.parametrize("stop_after", ["sft:2", "robust:3", "plain:5"])
def test_stop_and_resume_equals_the_uninterrupted_run(
    tmp_path: Path, stop_after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.start(tiny(whole, compare=True), resume=False)
    phase, step = stop_after.split(":")
    original = TrainingJob._log

    def log_and_interrupt(self: TrainingJob, record: dict) -> None:
        original(self, record)
        if (record["run"], record["step"]) == (phase, int(step)) and "loss" in record:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingJob, "_log", log_and_interrupt)
    with pytest.raises(Interrupted):
        train.start(tiny(broken, compare=True), resume=False)
    monkeypatch.undo()
    _undone = embedded_task.generate_pairs
    monkeypatch.setattr(embedded_task, "generate_pairs", lambda n, seed: _undone(min(n, 60), seed))
    assert state_of(broken / f"{phase}.pt")["step"] == int(step)
    train.start(TrainConfig(out=str(broken)), resume=True)
    for name in ("sft", "robust", "plain"):
        assert_same_state(whole / f"{name}.pt", broken / f"{name}.pt")
    assert records(whole) == records(broken)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    """SIGKILL in the middle: the checkpoint on disk is whole, and resuming ends where the uninterrupted run ends."""
    options = ["--hidden-size", "32", "--num-layers", "1", "--batch-size", "8", "--steps", "40", "--sft-steps", "2"]
    options += ["--checkpoint-every", "3", "--eval-every", "20"]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_kernels", "train", *options, "--out", str(out)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "robust.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    reached = state_of(out / "robust.pt")["step"]
    assert 0 < reached < 40
    for path, resume in ((out, ["--resume"]), (tmp_path / "whole", options)):
        command = [sys.executable, "-m", "grpo_kernels", "train", *resume, "--out", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same_state(out / "robust.pt", tmp_path / "whole" / "robust.pt")


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "grpo_kernels", "train", "--sft-steps", "100000", "--hidden-size", "32"]
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume --out {out}" in errors
    assert state_of(out / "sft.pt")["step"] >= 1


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "p", "chosen": f"yes {i}", "rejected": "no", "group": "ab"[i % 2]} for i in range(20)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    train.start(tiny(run, data=str(pairs), steps=1, sft_steps=1), resume=False)
    with pytest.raises(ValueError, match="out must not hold a run already"):
        train.start(tiny(run), resume=False)
    with pytest.raises(ValueError, match="out must hold a run to resume"):
        train.start(TrainConfig(out=str(tmp_path / "none")), resume=True)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**lines[0], "group": "zebra"}) + "\n")
    with pytest.raises(ValueError, match=r"the training data lacks: 'zebra' \(1 pairs\)"):
        train.start(tiny(tmp_path / "x", data=str(pairs), eval_data=str(other)), resume=False)
    assert not (tmp_path / "x").exists()
    pairs.write_text(pairs.read_text() + "\n")
    with pytest.raises(ValueError, match=r"changed since: .*pairs.jsonl"):
        train.start(TrainConfig(out=str(run)), resume=True)
    pairs.write_text("{}\n")
    assert main(["train", "--data", str(pairs), "--out", str(tmp_path / "y")]) == 2
    assert "pairs.jsonl:1: field 'prompt' is missing" in capsys.readouterr().err


def test_balanced_sampling_uses_group_means(tmp_path: Path) -> None:
    results = train.start(tiny(tmp_path / "run", sampling="balanced", steps=3), resume=False)
    assert sum(results["runs"]["robust"]["alpha"].values()) == pytest.approx(1)


def test_default_step_size_is_in_units_of_the_loss() -> None:
    assert resolved_step_size(TrainConfig(loss="sigmoid")) == pytest.approx(0.05 / math.log(2))
    assert resolved_step_size(TrainConfig(loss="ipo", beta=0.1)) == pytest.approx(0.05 / 25)
    assert resolved_step_size(TrainConfig(step_size=0.7)) == 0.7


@pytest.mark.skipif(not REAL.is_dir(), reason="the real preference data lies beside the project, not in it")
def test_real_data(tmp_path: Path) -> None:
    files = {name: str(REAL / f"bilingual.{name}.jsonl.gz") for name in ("train", "test")}
    pairs = data.load_pairs(files["train"])
    groups = data.Groups(pairs)
    assert dict(zip(groups.names, groups.sizes, strict=True)) == {
        "en-code": 20,
        "en-prose": 221,
        "zh-code": 18,
        "zh-prose": 223,
    }
    config = tiny(
        tmp_path / "run",
        data=files["train"],
        eval_data=files["test"],
        compare=True,
        max_length=64,
        vocab_size=600,
        steps=4,
        sft_steps=2,
        eval_every=4,
    )
    results = train.start(config, resume=False)
    for run in ("robust", "plain"):
        assert set(results["runs"][run]["groups"]) == set(groups.names)
        assert results["runs"][run]["groups"]["zh-code"]["loss"] != pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_worst_group_is_better_off(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the README shows: on the embedded task the robust run's worst group does clearly better."""
    monkeypatch.undo()
    results = train.start(TrainConfig(compare=True, seed=seed, out=str(tmp_path / "run")), resume=False)
    runs = results["runs"]
    assert runs["robust"]["worst_loss"] < 0.8 * runs["plain"]["worst_loss"]
    assert runs["robust"]["alpha"]["editors"] > 0.3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("beta", -1.0, "beta must be finite"),
        ("batch_size", 0, "batch_size must be finite"),
        ("steps", -3, "steps must be finite"),
        ("steps", 2.5, "steps must be a whole number"),
        ("eval_every", 0, "eval_every must be finite"),
        ("learning_rate", float("nan"), "learning_rate must be finite"),
        ("eval_fraction", 2.0, "eval_fraction must be finite"),
        ("vocab_size", 10, "vocab_size must be finite"),
        ("hidden_size", 100, "hidden_size must be a multiple of 64"),
        ("backend", "foo", "backend must be one of"),
        ("device", "tpu9", "device must be one that works here, got 'tpu9'"),
        ("sampling", "none", "sampling must be one of"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_written(
    option: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train.start(tiny(tmp_path / "run", **{option: value}), resume=False)
    assert not (tmp_path / "run").exists()


def test_resume_takes_no_other_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give --resume and --out alone"):
        train.start(TrainConfig(out=str(tmp_path), steps=5), resume=True)
    with pytest.raises(ValueError, match="out must name the folder"):
        train.start(TrainConfig(), resume=True)


def test_a_missing_package_is_told_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PACKAGES", ("rich", "no_such_package"))
    with pytest.raises(ImportError, match=r"train needs no_such_package: pip install .*\[train\]"):
        train.start(TrainConfig(out=str(tmp_path / "run")), resume=False)
    assert not (tmp_path / "run").exists()
