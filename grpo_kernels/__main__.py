"""The command line: train, bench, doctor, reproduce."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from grpo_kernels._version import __version__


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="grpo_kernels", description="Group Robust Preference Optimization")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    _add_train(commands.add_parser("train", help="group-robust preference training, from data to a table"))
    bench = commands.add_parser("bench", help="measure the backends against each other, leaving JSON records")
    bench.add_argument("--out", help="folder for the records (default: benchmarks/results/<device>)")
    bench.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    bench.add_argument("--seconds", type=float, default=float("inf"), help="begin no new case after this long")
    bench.add_argument("--quick", action="store_true", help="smaller shapes and fewer repetitions")
    bench.add_argument("--cases", nargs="+", default=(), help="names or patterns, such as 'linear/qwen2.5-7b/*'")
    bench.add_argument("--plots-only", action="store_true", help="draw the pictures of the records that are there")
    doctor = commands.add_parser("doctor", help="show versions, devices and which backends are usable")
    doctor.add_argument("--kernels", action="store_true", help="compile the Triton kernels and report on the outcome")
    doctor.add_argument("--linear", metavar="SxTxDxV", help="the linear path's plans for such a batch and head")
    doctor.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="for --linear")
    doctor.add_argument("--losses", action="store_true", help="the table of pair losses")
    doctor.add_argument("--json", action="store_true", help="for programs")
    _add_reproduce(commands.add_parser("reproduce", help="the paper's bandit experiment and convergence, in a minute"))
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


def _add_train(command: argparse.ArgumentParser) -> None:
    from grpo_kernels.groups.sampling import STRATEGIES
    from grpo_kernels.training.config import TrainConfig

    defaults = TrainConfig()

    def option(name: str, help_text: str, **kwargs: object) -> None:
        default = getattr(defaults, name)
        shown = "" if default is None or default is False else f" (default: {default})"
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, default=default, help=help_text + shown, **kwargs)  # type: ignore[arg-type]

    option("data", "JSONL file (.gz too) of {prompt, chosen, rejected, group}; default: an embedded task")
    option("eval_data", "JSONL file to evaluate on; default: a part of --data, from each group")
    option("eval_fraction", "that part", type=float)
    option("model", "local model directory; default: a small Llama with random weights")
    option("hidden_size", "of the small Llama", type=int)
    option("num_layers", "of the small Llama", type=int)
    option("vocab_size", "of its byte-level tokenizer, learned from the data", type=int)
    option("max_length", "tokens a sequence at most", type=int)
    option("loss", "GR-DPO or GR-IPO", choices=("sigmoid", "ipo"))
    option("beta", "strength of the pull towards the reference policy", type=float)
    option("step_size", "of the group weights (eta); default: 0.05 / (loss at margin 0)", type=float)
    option("sampling", "how batches are drawn", choices=STRATEGIES)
    option("compare", "also train plain DPO or IPO from the same start", action="store_true")
    option("steps", "of preference training", type=int)
    option("sft_steps", "of warm-up on the chosen answers", type=int)
    option("batch_size", "pairs a step", type=int)
    option("learning_rate", "of preference training (AdamW)", type=float)
    option("sft_learning_rate", "of the warm-up", type=float)
    option("eval_every", "steps between evaluations", type=int)
    option("checkpoint_every", "steps between checkpoints", type=int)
    option("seed", "of data, model and batches", type=int)
    option("device", "auto, cpu, cuda, ...")
    option("backend", "of the loss; see doctor")
    option("out", "folder for checkpoints and results; default: runs/<date and time>")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own options")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
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
        from grpo_kernels.training.command import TrainConfig, train

        resume = arguments.pop("resume")
        return train(TrainConfig(**arguments), resume)
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        print(f"grpo_kernels {name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
