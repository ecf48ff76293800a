"""`python -m grpo_kernels train`: group-robust preference training from data to table, resumable at any step."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from grpo_kernels.training.config import TrainConfig
from grpo_kernels.training.job import Interrupted, TrainingJob, write_atomically

PACKAGES = ("transformers", "tokenizers", "rich", "matplotlib")


def start(config: TrainConfig, resume: bool) -> dict[str, Any]:
    """Run or resume; returns what results.json holds.

    Raises:
        ValueError: the output folder holds a run already, or (with resume) does not, or its data file has changed.
        Interrupted: Ctrl-C or SIGTERM; run again with resume to go on.
    """
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if missing:  # now, not when hours of training end with a picture
        raise ImportError(f"train needs {', '.join(missing)}: pip install -c constraints.txt -e '.[train]'")
    if resume and config.out is None:
        raise ValueError("out must name the folder of the run to resume, got None")
    if resume and config != TrainConfig(out=config.out):
        raise ValueError("a run is resumed with its own options: give --resume and --out alone")
    out = Path(config.out or f"runs/{datetime.now():%Y%m%d-%H%M%S}")
    saved = out / "config.json"
    if resume:
        if not saved.is_file():
            raise ValueError(f"out must hold a run to resume, {str(out)!r} has no config.json")
        stored = json.loads(saved.read_text())
        config = TrainConfig(**stored["options"])
        changed = [path for path, digest in stored["data_sha256"].items() if _sha256(path) != digest]
        if changed:
            raise ValueError(f"the data must be that of the run to resume; changed since: {', '.join(changed)}")
    else:
        if saved.exists():
            raise ValueError(f"out must not hold a run already: {str(out)!r} does; resume it or name another folder")
        files = [path for path in (config.data, config.eval_data) if path]
        stored = {"options": dataclasses.asdict(config), "data_sha256": {path: _sha256(path) for path in files}}
    job = TrainingJob(config, out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(saved, json.dumps(stored, indent=2).encode())
    return job.run()


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def train(config: TrainConfig, resume: bool) -> int:
    """The exit status: 0 done, 130 interrupted with everything saved."""
    try:
        start(config, resume)
    except Interrupted as interrupted:
        print(f"stopped; go on with: python -m grpo_kernels train --resume --out {interrupted}", file=sys.stderr)
        return 130
    return 0
