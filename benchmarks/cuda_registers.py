"""The machine code of the CUDA kernels for each architecture, by nvcc, without a GPU; 1 if the gate finds a problem.

python benchmarks/cuda_registers.py [80 90a 100]
"""

from __future__ import annotations

import sys

from grpo_kernels.kernels import gate


def main() -> int:
    missing = gate.nvcc_missing()
    if missing:
        print(missing, file=sys.stderr)
        return 2
    try:
        reports = gate.nvcc_reports(tuple(sys.argv[1:]) or gate.NVCC_TARGETS)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for one in reports:
        print(f"{one.where}: {one.summary}")
    problems = gate.problems(reports)
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
