"""The worst group over data sets and seeds, with the demo's model: plain, importance sampling, robust with step sizes.

    python benchmarks/real_votes.py --out runs/votes --data ubi=ubi.train.jsonl.gz,ubi.test.jsonl.gz [topics=...]

Each data set and seed is a run of `train --compare` and, for every further step size, one of its robust arm alone,
from the same model on the same batches. A seed draws the pairs that its steps take; at most 40 pairs of a group are
evaluated. LoRA is in the upper third of the layers, the frozen weights are bfloat16. A run is saved as it ends, and
the same command again goes on where it was stopped. What there is by then is in summary.json; at the end a table has
mean ± standard error over seeds, also of differences seed by seed. Scores are of the last step: the best one was
chosen on the same pairs.
"""

import argparse
import collections
import gzip
import json
import math
import random
import statistics
import subprocess
import sys
from pathlib import Path

MODEL = Path.home() / ".cache" / "grpo_kernels" / "SmolLM2-135M-Instruct"  # `make demo` puts it there
BATCH, EVALUATED = 8, 40  # pairs of a step; of a group in the evaluation
UPPER = r".*layers\.2\d\.self_attn\.[qv]_proj"  # layers 20 to 29 of 30: no gradient is computed below them
OPTIONS = [
    *("--max_length", "192", "--per_device_train_batch_size", str(BATCH), "--per_device_eval_batch_size", "24"),
    *("--use_peft", "--lora_r", "16", "--lora_target_modules", UPPER, "--learning_rate", "5e-4"),
    *("--dtype", "bfloat16", "--bf16", "True", "--gradient_checkpointing", "False"),
]
SCORES = ("worst_loss", "worst_accuracy")


def draw_pairs(train: str, evaluation: str, folder: Path, seed: str, steps: int) -> tuple[str, str]:
    """Files with the training pairs that a seed's steps take and the first pairs of each group of the evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(train, "rt") as file:
        pairs = file.readlines()
    drawn, kept, of_group = folder / "train.jsonl", folder / "eval.jsonl", collections.Counter()
    drawn.write_text("".join(random.Random(seed).sample(pairs, min(len(pairs), BATCH * steps))))
    with gzip.open(evaluation, "rt") as file, kept.open("w") as few:
        for line in file:
            group = json.loads(line)["group"]
            of_group[group] += 1
            if of_group[group] <= EVALUATED:
                few.write(line)
    return str(drawn), str(kept)


def run(out: Path, words: list[str]) -> None:
    """Of `train`, or the rest of it; nothing where it has ended.

    Raises:
        ValueError: the folder holds a run with other options.
    """
    words, saved = [*words, *OPTIONS, "--out", str(out)], out / "run.json"
    if saved.exists() and (found := json.loads(saved.read_text())["arguments"]) != words:
        raise ValueError(f"--out must be another folder for other options: {out} has {found}, not {words}")
    if not (out / "results.json").exists():
        begin = ["--resume", "--out", str(out)] if saved.exists() else words
        subprocess.run([sys.executable, "-m", "grpo_kernels", "train", *begin], check=True)


def scores_of(results: Path, arm: str) -> dict[str, float]:
    last = json.loads(results.read_text())["runs"][arm]["last"]
    return {"worst_loss": last["worst_loss"], "worst_accuracy": min(g["accuracy"] for g in last["groups"].values())}


def scores_by_arm(folder: Path, step_sizes: list[float]) -> dict[str, dict[str, float]]:
    """Of a data set and seed, as far as there are any: {arm: its scores}."""
    found = {}
    for step_size in step_sizes:
        results = folder / f"eta{step_size}" / "results.json"
        if results.exists():
            for arm in ("plain", "IS") if step_size == step_sizes[0] else ():
                found[arm] = scores_of(results, arm)
            found[f"robust, eta {step_size}"] = scores_of(results, "robust")
    return found


def mean_and_error(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{error}"


def print_table(seeds: dict[str, dict[str, dict[str, float]]]) -> None:
    """Of one data set: {seed: {arm: scores}}; a difference is over the seeds that have both arms."""
    print("| arm | seeds | worst loss | worst accuracy | loss - plain's | loss - IS' |\n| --- " + "| --- " * 5 + "|")
    for arm in dict.fromkeys(arm for by_arm in seeds.values() for arm in by_arm):
        of_arm = [by_arm[arm] for by_arm in seeds.values() if arm in by_arm]
        cells = [arm, str(len(of_arm)), *(mean_and_error([scores[name] for scores in of_arm]) for name in SCORES)]
        for other in ("plain", "IS"):
            both = [by_arm for by_arm in seeds.values() if {arm, other} <= set(by_arm)]
            differences = [by_arm[arm]["worst_loss"] - by_arm[other]["worst_loss"] for by_arm in both]
            cells.append(mean_and_error(differences) if arm != other and both else "")
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=TRAIN,EVAL")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--step-sizes", type=float, nargs="+", default=[0.072, 0.3])
    options = parser.parse_args()
    summary: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for seed in map(str, options.seeds):  # every data set has a seed before one has two
        for name, files in (data.split("=", 1) for data in options.data):
            folder, by_seed = options.out / name / f"seed{seed}", summary.setdefault(name, {})
            train, evaluation = draw_pairs(*files.split(","), folder, seed, options.steps)
            for step_size in options.step_sizes:
                words = ["--data", train, "--eval_data", evaluation, "--model", str(options.model), "--seed", seed]
                words += ["--group_step_size", str(step_size)]
                words += [word for what in ("max", "eval", "save") for word in (f"--{what}_steps", str(options.steps))]
                run(folder / f"eta{step_size}", words + ["--compare"] * (step_size == options.step_sizes[0]))
                by_seed[seed] = scores_by_arm(folder, options.step_sizes)
                (options.out / "summary.json").write_text(json.dumps(summary, indent=2))
    for name, by_seed in summary.items():
        print(f"\n{name}, {options.steps} steps")
        print_table(by_seed)


if __name__ == "__main__":
    main()
