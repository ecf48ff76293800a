"""What the Makefile would run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def make_would(*arguments: str) -> str:
    """The commands, which are not run; also under `make test`, whose variables would make it report to that one."""
    own = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout
