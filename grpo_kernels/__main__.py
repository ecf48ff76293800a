"""The command line: train, bench, doctor, reproduce."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from grpo_kernels._version import __version__

NEEDED_BY_TRAIN = ("accelerate", "datasets", "matplotlib", "rich", "transformers", "trl")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="grpo_kernels", description="Group Robust Preference Optimization")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="group-robust preference training, from data to a table", add_help=False)
    bench = commands.add_parser("bench", help="measure the backends against each other, leaving JSON records")
    bench.add_argument("--out", help="folder for the records (default: benchmarks/results/<device>)")
    bench.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    bench.add_argument("--seconds", type=float, default=float("inf"), help="begin no new case after this long")
    bench.add_argument("--quick", action="store_true", help="smaller shapes and fewer repetitions")
    bench.add_argument("--cases", nargs="+", default=(), help="names or patterns, such as 'linear/qwen2.5-7b/*'")
    bench.add_argument("--plots-only", action="store_true", help="draw the pictures of the records that are there")
    doctor = commands.add_parser("doctor", help="show versions, devices and which backends are usable")
    doctor.add_argument(
        "--kernels",
        action="store_true",
        help="compile for GPUs that are not here, check the code",
    )
    doctor.add_argument(
        "--linear",
        metavar="SxTxDxV",
        help="the linear path's plans for such a batch and head; SxTx8B, 70B or 405B, too",
    )
    doctor.add_argument("--mesh", metavar="dp=8,tp=4", help="for --linear: a rank's cost; dp, tp, cp, pp, ep")
    doctor.add_argument("--device", help="for --linear: cpu, a100, h100, h200 or b200; default: the one that is here")
    doctor.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="for --linear")
    doctor.add_argument("--losses", action="store_true", help="the table of pair losses")
    doctor.add_argument("--json", action="store_true", help="for programs")
    _add_reproduce(commands.add_parser("reproduce", help="the paper's bandit and convergence, in some minutes"))
    return top


def _add_reproduce(command: argparse.ArgumentParser) -> None:
    from grpo_kernels.paper.command import ReproduceConfig

    defaults = ReproduceConfig()
    for name, help_text in (
        ("seeds", "draws of data and starting point"),
        ("iterations", "of the DPO methods"),
        ("ipo_iterations", "of the IPO methods (closed form)"),
        ("max_horizon", "largest T of the convergence curves"),
    ):
        flag, default = "--" + name.replace("_", "-"), getattr(defaults, name)
        command.add_argument(flag, type=int, default=default, help=help_text + " (default: %(default)s)")
    command.add_argument("--out", help="folder for results.json and pictures; default: runs/reproduce-<date and time>")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    own = words[1:] if words[:1] == ["train"] else []  # its options are read there: TRL's are among them
    arguments = vars(parser().parse_args(words[: len(words) - len(own)]))
    name = arguments.pop("command")
    try:
        if name == "doctor":
            from grpo_kernels import doctor

            return doctor.command(**{"as_json": arguments.pop("json"), **arguments})
        if name == "bench":
            from grpo_kernels.bench.command import bench

            return bench(names=arguments.pop("cases"), **arguments)
        if name == "reproduce":
            from grpo_kernels.paper.command import ReproduceConfig, reproduce

            return reproduce(ReproduceConfig(**arguments))
        missing = [package for package in NEEDED_BY_TRAIN if importlib.util.find_spec(package) is None]
        if missing:
            raise ImportError(f"train needs {', '.join(missing)}: pip install -c constraints.txt -e '.[train]'")
        from grpo_kernels.training.command import train

        return train(own)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"grpo_kernels {name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
