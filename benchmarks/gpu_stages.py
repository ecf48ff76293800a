"""What the stages of gpu_check.py do, each in a process of its own: a line of JSON for whatever is found, at once.

By hand: python benchmarks/gpu_stages.py kernels --contenders 'triton*'
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGAN = time.monotonic()
SECONDS = float(os.environ.get("GPU_CHECK_SECONDS") or "inf")
WORK = Path(os.environ.get("GPU_CHECK_WORK") or ROOT / "build" / "gpu_check")
NO_GPU = 3  # the exit status of `facts`

# Sequences, length, V, dtype, part that is ignored, groups. What matters most comes first.
KERNELS = (
    (16, 1024, 128_256, "bfloat16"),
    (16, 1024, 128_256, "bfloat16", 0.5),
    (16, 512, 128_256, "bfloat16"),
    (16, 1024, 151_936, "bfloat16"),
    (16, 1024, 50_257, "bfloat16"),  # odd
    (16, 1024, 50_280, "bfloat16"),  # 8 mod 16
    (16, 512, 128_256, "float32"),
    (4, 64, 128_256, "bfloat16"),  # rows are split
)
FINISH = (
    (8, 16, 1024, "float32", 0.0, 4096),
    (8, 16, 1024, "float32", 0.0, 1_000_000),
    (8192, 1, 1024, "float32"),
)
PROFILED = (16, 256, 128_256, "bfloat16")
PEERS = ("logits/llama-3-8b/large", "logits/llama-3-8b/large50")
LINEAR = ("linear/llama-3-8b/large", "linear/llama-3-8b/large50", "linear/qwen2.5-0.5b/large")
SANITIZED = ((1003, 5), (4096, 3), (1, 2), (50_280, 2))  # V, length


def left() -> float:
    """Seconds that this stage has yet."""
    return SECONDS - (time.monotonic() - BEGAN)


def emit(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


# -- beside the others -------------------------------------------------------------------------------------------------


def csrc() -> None:
    """The extension for this GPU only. It is put in place when it is whole: another stage may have the old one open."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    architecture = f"sm_{capability.replace('.', '')}{'a' if capability == '9.0' else ''}"
    build = ROOT / "build" / "gpu_check"
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={build / 'objects'}", f"--build-lib={build}"],
        cwd=ROOT,
        env={**os.environ, "GRPO_KERNELS_BUILD": "cuda", "GRPO_KERNELS_ARCHITECTURES": architecture},
        check=True,
    )
    (made,) = (build / "grpo_kernels").glob("_C*.so")
    os.replace(made, ROOT / "grpo_kernels" / made.name)
    emit({"built": made.name, "for": architecture, "seconds": round(time.monotonic() - BEGAN, 1)})


def wheels() -> None:
    """Those in the folder that WHEELS names, one by one, without a network; peers that are missing are not measured."""
    failed = 0
    for wheel in sorted(Path(os.environ.get("WHEELS") or ROOT / "no wheels").glob("*.whl")):
        options = ["--no-index", "--no-deps", "--no-compile", "--quiet", "--target", str(WORK / "site")]
        command = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        emit({"wheel": wheel.name, "installed": ran.returncode == 0, "said": (ran.stdout + ran.stderr)[-500:]})
        failed += ran.returncode != 0
    if failed:
        sys.exit(f"{failed} wheels were not installed")


# -- on the GPU --------------------------------------------------------------------------------------------------------


def facts() -> None:
    import torch

    from grpo_kernels import doctor
    from grpo_kernels.bench import machine

    if not torch.cuda.is_available():
        print("there is no CUDA device")
        sys.exit(NO_GPU)
    emit(doctor.facts())
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    said = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
    emit({"nvidia-smi": said.stdout.splitlines(), "commit": machine.commit()})
    emit({"copy_gbps": machine.copy_gbps("cuda"), "read_gbps": machine.read_gbps("cuda")})
    emit({"bfloat16_matrix_gflops": machine.matrix_gflops(torch.bfloat16, "cuda")})


def _measure(cases: Iterable[Any], contenders: Sequence[str] = ("*",), a_case: float = 6, quick: bool = False) -> None:
    """``a_case``: seconds that a case may take; none begins when fewer are left."""
    from grpo_kernels.bench import command

    for case, found in command.measured(tuple(cases), "cuda", left() - a_case, quick, contenders):
        emit({"case": case.name, **({"not_measured_because": found} if isinstance(found, str) else found)})


def kernels(contenders: str) -> None:
    """The fused forward and backward, the gradient fresh and in place."""
    _measure(_logits(KERNELS), (contenders,))


def finish() -> None:
    """What comes after the rows: many groups, many pairs."""
    _measure(_logits(FINISH), ("reference", "triton in place", "cuda in place"))


def _logits(shapes: Sequence[tuple]) -> list[Any]:
    from grpo_kernels.bench.cases import Case

    return [Case(*shape) for shape in shapes]


def peers() -> None:
    from grpo_kernels.bench.cases import select

    _measure(select(PEERS).values(), a_case=30)


def linear() -> None:
    """Against the three bare products; without what compiles or tunes itself."""
    from grpo_kernels.bench.cases import select

    _measure(select(LINEAR).values(), a_case=15, quick=True)


def tune() -> None:
    import tune_tiles

    for found in tune_tiles.search(left):
        emit(found)


def tests(processes: int, arguments: Sequence[str]) -> None:
    parallel = ["-n", str(processes), "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *parallel, *arguments])


# -- under another program ---------------------------------------------------------------------------------------------


def _usable_backends() -> list[str]:
    import grpo_kernels as gk

    for name in ("cuda", "triton"):
        for reason in gk.backends()[name]:
            emit({"backend": name, "not_measured_because": reason})
    return [name for name in ("cuda", "triton") if not gk.backends()[name]]


def profile() -> None:
    """For ncu: one forward and one backward of each backend, after one that compiled."""
    import torch

    from grpo_kernels.bench import logits

    (case,) = _logits([PROFILED])
    inputs = logits.inputs_of(case, "cuda")
    for name in _usable_backends():
        (contender,) = (one for one in logits.SUITE.contenders if one.name == name)
        operation = contender.build(case)
        for started in (False, True):
            torch.cuda.synchronize()
            if started:
                torch.cuda.profiler.start()
            torch.autograd.grad(operation(*inputs), inputs[0])
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        emit({"profiled": name, "case": case.name})


def sanitize() -> None:
    """For compute-sanitizer: odd and even vocabularies, splits, packed rows, a label outside."""
    import torch

    import grpo_kernels as gk

    for backend in _usable_backends():
        for dtype in (torch.bfloat16, torch.float32):
            for vocab, length in SANITIZED:
                if left() < 3:
                    emit({"backend": backend, "not_checked": f"{dtype}, V {vocab} and what follows: the time is over"})
                    return
                logits = torch.randn(4, length, vocab, device="cuda").to(dtype).requires_grad_()
                labels = torch.randint(0, vocab, (4, length), device="cuda")
                labels[0, 0], labels[1, 0] = -100, vocab - 1
                weights = gk.GroupWeights(group_sizes=[3, 2], step_size=0.1)
                loss_fn = gk.GroupRobustLoss(weights, backend=backend, reference_free=True).cuda()
                ids = torch.tensor([0, 1], device="cuda")
                loss_fn(logits, labels, ids).loss.backward()
                ends = torch.arange(0, 4 * length + 1, length, device="cuda")
                flat = logits.detach().flatten(0, 1).requires_grad_()
                loss_fn(flat, labels.flatten(), ids, None, ends).loss.backward()
                labels[2, 0] = vocab + 7  # NaN, and nothing read out of bounds
                loss_fn(logits, labels, ids).loss.backward()
                torch.cuda.synchronize()
                emit({"backend": backend, "dtype": str(dtype), "vocab": vocab, "nan": logits.grad.isnan().any().item()})


STAGES = (csrc, wheels, facts, kernels, finish, peers, linear, tune, tests, profile, sanitize)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(required=True)
    for stage in STAGES:
        one = parsers.add_parser(stage.__name__, help=stage.__doc__)
        one.set_defaults(do=stage)
        if stage is kernels:
            one.add_argument("--contenders", default="*")
        if stage is tests:
            one.add_argument("--processes", type=int, default=1)
            one.add_argument("arguments", nargs="*")
    options = vars(parser.parse_args(arguments))
    options.pop("do")(**options)


if __name__ == "__main__":
    main(sys.argv[1:])
