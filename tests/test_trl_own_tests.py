"""TRL's own tests of its DPO trainer hold of GroupRobustDPOTrainer, but for what is refused.

Skipped where they are not at hand: ``make test-trl TRL_TESTS=<a checkout of TRL>/tests``. Models are small and random,
so tests of images, which need processors from the hub, are left out.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TRL_TESTS = os.environ.get("TRL_TESTS", "")
HERE = Path(__file__).parent
REFUSED = {"loss_type": r"test_train_loss_types\[aot"}  # of TRL's options, what its tests try: the tests' names
LEFT_OUT = "not VLM and not Vision and not RemoteForCausalLM and not trust_remote_code and not NemotronH"


@pytest.mark.skipif(not TRL_TESTS, reason="TRL_TESTS does not say where TRL's tests are: make test-trl TRL_TESTS=...")
def test_they_pass_but_for_what_is_refused(tmp_path: Path) -> None:
    results = {classes: outcomes(tmp_path / classes, classes) for classes in ("trl", "ours")}
    fails_with_trl = {name for name, outcome in results["trl"].items() if outcome == "FAILED"}
    refused = {name for name in results["ours"] if any(re.search(pattern, name) for pattern in REFUSED.values())}
    failed = {name for name, outcome in results["ours"].items() if outcome == "FAILED"}
    passed = [name for name, outcome in results["ours"].items() if outcome == "PASSED"]
    print(f"{len(passed)} pass, {len(failed)} fail, {len(failed & refused)} of them refused; {fails_with_trl=}")
    assert len(passed) > 30
    assert sorted(failed - refused - fails_with_trl) == []
    assert sorted(refused & set(passed)) == [], "no longer refused: shorten the list"


def outcomes(folder: Path, classes: str) -> dict[str, str]:
    """{test: PASSED, FAILED or SKIPPED} of a run in an empty folder."""
    folder.mkdir()
    source = Path(TRL_TESTS).resolve()
    environment = {
        **os.environ,
        "GRPO_KERNELS_TRL_CLASSES": classes,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(source.parent)]),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "trl_own_tests",
        "-p",
        "no:cacheprovider",
        "-q",
        "-rA",
        "--tb=line",
    ]
    command += ["--rootdir", str(source.parent), "-k", LEFT_OUT, str(source / "test_dpo_trainer.py")]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    (folder / "output.txt").write_text(run.stdout + run.stderr)
    found = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) \S*::(\S+)", run.stdout, re.M)
    assert found, run.stdout[-2000:] + run.stderr[-2000:]
    return {name: "FAILED" if outcome == "ERROR" else outcome for outcome, name in found}
