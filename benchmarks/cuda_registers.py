"""Registers and shared memory of the CUDA kernels for each architecture, by nvcc, without a GPU. Spills are errors.

python benchmarks/cuda_registers.py [80 90a 100]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-ftz=true"]
PTXAS = "-Xptxas=-v,-warn-spills,-warn-lmem-usage,-Werror"


def registers(architecture: str, source: Path) -> list[str]:
    """A line for each kernel.

    Raises:
        RuntimeError: nvcc's errors, spilled registers among them.
    """
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ.get("NVCC") or "nvcc", *FLAGS, target, PTXAS, "-c", str(source), "-o", f"{folder}/x.o"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    kernel, real = r"((?:group_robust|logps|merge)\w*?_kernel)", r"(Float32|Bfloat16|Float16|Float64|[fd])"
    pattern = rf"entry function '\w*?(\d+){kernel}I\w*?{real}E"
    lines, name = [], None
    for line in ran.stderr.splitlines():
        found = re.search(pattern, line)
        if found:
            name = f"{found[2]}[{found[3]}]"
        used = re.search(r"Used (\d+) registers.*?(?:, (\d+) bytes smem|$)", line)
        if used and name:
            lines.append(f"sm_{architecture:<4} {name:<40} {used[1]:>3} registers {used[2] or 0:>5} bytes shared")
            name = None
    return lines


def main() -> int:
    for architecture in sys.argv[1:] or ("80", "90a", "100"):
        for source in sorted(CSRC.glob("*.cu")):
            try:
                print("\n".join(registers(architecture, source)))
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
