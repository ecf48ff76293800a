"""What `train` has written to its folder is named where it is damaged: a cut copy, a disk's fault, an editor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[train]'")

from grpo_kernels.__main__ import main
from grpo_kernels.integrations import checkpoints
from grpo_kernels.training import report


def test_damaged_files_of_a_run_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut, of another kind, too deep, no UTF-8."""
    arm = tmp_path / "robust"
    checkpoint = arm / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    about, facts = {"group_names": ["a"], "train_pairs": {"a": 3}, "samples": [], "seconds": 1.0}, {}
    for content in (b"", b"[]", b'{"arguments": 3, ', b"[" * 100_000, b"\xff"):
        (tmp_path / "run.json").write_bytes(content)
        assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
        assert "run.json is damaged: " in capsys.readouterr().err.splitlines()[-1]
        (checkpoint / checkpoints.MANIFEST).write_bytes(content)
        with pytest.raises(ValueError, match=r"files\.json is damaged: "):
            checkpoints.to_go_on_from(arm)
        (checkpoint / checkpoints.MANIFEST).write_text("{}")
        (checkpoint / "trainer_state.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"trainer_state\.json is damaged: "):
            checkpoints.to_go_on_from(arm)
        (arm / "arm.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"arm\.json is damaged: "):
            report.finish(tmp_path, ["robust"], facts)
        (arm / "arm.json").write_text(json.dumps(about))
        (arm / "metrics.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: "):
            report.finish(tmp_path, ["robust"], facts)
    (tmp_path / "run.json").write_text("{}")
    assert main(["train", "--resume", "--out", str(tmp_path)]) == 2
    assert "run.json is damaged: KeyError('arguments')" in capsys.readouterr().err
    del about["seconds"]
    (arm / "arm.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"arm\.json is damaged: KeyError\('seconds'\)"):
        report.finish(tmp_path, ["robust"], facts)
