"""What `train` shows at the end: the table, the picture, results.json, and answers of each arm."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path
from typing import Any

import torch

from grpo_kernels.console import COLOURS, make_console, make_figure
from grpo_kernels.integrations.checkpoints import reading, whole
from grpo_kernels.training.options import TrainOptions

SCORES = ("loss", "loss_se", "accuracy", "accuracy_se", "alpha", "count")
TITLE = "{model} on {data}, loss {loss_type}, seed {seed}"
NAMED_GROUPS = 8  # more than these: the worst by name, the rest grey
Record = dict[str, Any]


def finish(out: Path, arms: list[str], facts: dict[str, Any]) -> None:
    """Write results.json and training.png, print the table and the answers.

    Raises:
        ValueError: what an arm has written is damaged; names the file.
    """
    histories, about, runs = {}, {}, {}
    for arm in arms:
        with reading(out / arm / "arm.json"):
            written = json.loads((out / arm / "arm.json").read_text())
            about[arm] = {name: written[name] for name in ("group_names", "train_pairs", "samples", "seconds")}
            groups = about[arm]["group_names"]
        with reading(out / arm / "metrics.jsonl"):
            histories[arm] = [json.loads(line) for line in (out / arm / "metrics.jsonl").open()]
            runs[arm] = _summary(histories[arm], groups)
    results = {
        **facts,
        "groups": about[arms[0]]["train_pairs"],
        "eval_pairs": {name: scores["count"] for name, scores in runs[arms[0]]["last"]["groups"].items()},
        "runs": runs,
        "seconds": {arm: about[arm]["seconds"] for arm in arms},
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "samples": {arm: about[arm]["samples"] for arm in arms},
    }
    console = make_console()
    _print_table(console, results)
    for arm, answers in results["samples"].items():
        for prompt, answer in answers:
            console.print(f"{prompt!r}\n  {arm}: {answer!r}", highlight=False, markup=False)
    with whole(out / "results.json") as part:
        part.write_text(json.dumps(results, indent=2))
    with whole(out / "training.png") as part:
        _save_picture(histories, groups, results, part)
    console.print(f"results.json, training.png, and each arm's metrics.jsonl and model/ are in {out}", highlight=False)


def _summary(history: list[Record], groups: list[str]) -> dict[str, Any]:
    """The evaluations at the start, at the best step (of the model that is kept) and at the last."""
    evaluations = [record for record in history if "eval_groups/worst_loss" in record]
    trained = [record for record in evaluations if record["step"]] or evaluations
    best = min(trained, key=lambda record: record["eval_groups/worst_loss"])
    shown = {"start": evaluations[0], "best": best, "last": evaluations[-1]}
    return {name: _scores(record, groups) for name, record in shown.items()}


def _scores(record: Record, groups: list[str]) -> dict[str, Any]:
    evaluated = [name for name in groups if f"eval_groups/{name}/loss" in record]
    by_group = {name: {score: record.get(f"eval_groups/{name}/{score}") for score in SCORES} for name in evaluated}
    worst = max(evaluated, key=lambda name: float(record[f"eval_groups/{name}/loss"]))
    return {"step": record["step"], "worst_group": worst, "worst_loss": by_group[worst]["loss"], "groups": by_group}


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _print_table(console: Any, results: dict[str, Any]) -> None:
    """A row for each group and arm at the arm's best step, and the worst group of each arm last."""
    from rich import box
    from rich.table import Table

    runs = results["runs"]
    caption = "± standard error over pairs; a tie is half right"
    table = Table(title=TITLE.format(**results), caption=caption, box=box.SIMPLE, pad_edge=False)
    for name in ("group", "train/eval", "arm", "loss", "at end", "accuracy", "alpha"):
        table.add_column(name, justify="left" if name in ("group", "arm") else "right", no_wrap=name != "group")
    for group, count in results["eval_pairs"].items():
        first = (group, f"{results['groups'][group]}/{count:.0f}")
        for arm, run in runs.items():
            best, last = (run[when]["groups"][group] for when in ("best", "last"))
            accuracy = _with_error(best["accuracy"], best["accuracy_se"], 2)
            loss = _with_error(best["loss"], best["loss_se"], 3)
            table.add_row(*first, arm, loss, f"{last['loss']:.3f}", accuracy, f"{best['alpha']:.3f}")
            first = ("", "")
        table.add_section()
    first = ("worst group", "")
    for arm, run in runs.items():
        best, last = run["best"], run["last"]
        loss = _with_error(best["worst_loss"], best["groups"][best["worst_group"]]["loss_se"], 3)
        table.add_row(*first, arm, loss, f"{last['worst_loss']:.3f}", best["worst_group"], "")
        first = ("", "")
    console.print(table)
    steps = {arm: f"{arm} {run['best']['step']} of {run['last']['step']}" for arm, run in runs.items()}
    kept = ", ".join(f"{step} in {results['seconds'][arm]:.0f} s" for arm, step in steps.items())
    console.print(f"best step, kept: {kept}; peak memory {results['peak_rss_gib']} GiB", highlight=False)


def _save_picture(histories: dict[str, list[Record]], groups: list[str], results: dict[str, Any], path: Path) -> None:
    """Above: loss of each group in each arm, alpha of each step; below: accuracy, and the worst group of each arm."""
    arms, at_zero = list(histories), results["loss_at_zero"]
    figure, axes = make_figure(2, len(arms) + 1, (4.2 * (len(arms) + 1), 7.2), sharex=True)
    last = results["runs"][arms[-1]]["last"]["groups"]
    worst = sorted(groups, key=lambda name: -last[name]["loss"] if name in last else math.inf)
    named = [name for name in groups if len(groups) <= NAMED_GROUPS or name in worst[: NAMED_GROUPS - 2]]
    styles = {name: {"color": COLOURS[i % len(COLOURS)], "label": name} for i, name in enumerate(named)}
    others = {"color": "0.8", "linewidth": 0.8, "zorder": 1}
    markers, dotted = {"marker": "o", "markersize": 3}, {"color": "0.5", "linestyle": ":", "linewidth": 1}

    def draw(where: Any, arm: str, key: str, **style: Any) -> Any:
        records = [record for record in histories[arm] if key in record]
        return where.plot([r["step"] for r in records], [r[key] for r in records], **style)

    alpha, worst_losses = axes[:, -1]
    for column, arm in enumerate(arms):
        for row, (score, level) in enumerate((("loss", at_zero), ("accuracy", 0.5))):
            where = axes[row, column]
            for group in groups:
                draw(where, arm, f"eval_groups/{group}/{score}", **markers, **styles.get(group, others))
            where.axhline(level, **dotted)
            where.set_title(f"{arm}: {score} of each group")
            where.sharey(axes[row, 0])
        draw(worst_losses, arm, "eval_groups/worst_loss", **markers, color=COLOURS[-1 - column], label=arm)
    worst_losses.axhline(at_zero, **dotted)
    worst_losses.set_title("Loss of the worst group")
    for group in groups:
        draw(alpha, arms[-1], f"groups/{group}/alpha", **styles.get(group, others))
    entropy = draw(alpha, arms[-1], "groups/alpha_entropy", linestyle="--", **others)
    alpha.legend(entropy, ["entropy of alpha / log K"], fontsize="small")
    alpha.set(title=f"{arms[-1]}: weight alpha of each group", ylim=(0, 1.02))
    for where in (axes[0, 0], worst_losses):
        where.legend(fontsize="small")
    figure.supxlabel("step", fontsize="medium")
    explained = f"held-out pairs (dotted: {at_zero:.3g}, where nothing is learned)"
    figure.suptitle(f"{TITLE.format(**results)}: {explained}", fontsize="medium")
    figure.savefig(path, dpi=110, format="png")


def samples_of(trainer: Any, options: TrainOptions) -> list[tuple[str, str]]:
    """(prompt, the trained model's answer), greedily, for the first held-out prompts that differ."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model).eval()
    how = {"do_sample": False, "max_new_tokens": options.sample_tokens, "pad_token_id": tokenizer.pad_token_id}
    answers = []
    for prompt in list(dict.fromkeys(map(tuple, trainer.eval_dataset["prompt_ids"])))[: options.samples]:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)[0]
        asked, answer = (tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, out[len(prompt) :]))
        answers.append((asked.strip(), answer.strip()))
    return answers
