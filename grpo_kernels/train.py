"""`python -m grpo_kernels train`: group-robust preference training from data to table, resumable at any step.

Phases, each with a checkpoint of its own in the output folder: sft (warm-up on the chosen answers) -> reference
log-probabilities -> robust -> plain (with --compare: DPO or IPO on the pooled pairs, from the same start).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from grpo_kernels import dispatch, embedded_task, report, validation
from grpo_kernels.data import (
    Groups,
    PreferencePair,
    TokenizedPair,
    collate_pairs,
    load_pairs,
    split_by_group,
    tokenize_pairs,
)
from grpo_kernels.functional import preference_losses
from grpo_kernels.group_weights import GroupWeights
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.losses import GroupRobustLoss
from grpo_kernels.sampling import STRATEGIES, GroupBatchSampler
from grpo_kernels.segments import segment_sum
from grpo_kernels.types import IGNORE_INDEX

PACKAGES = ("transformers", "tokenizers", "rich", "matplotlib")
WARMUP_SHARE = 0.1  # of a phase's steps, over which the learning rate rises linearly


@dataclass(frozen=True)
class TrainConfig:
    """The options of `train`; help texts are in __main__.py."""

    data: str | None = None
    eval_data: str | None = None
    eval_fraction: float = 0.2
    model: str | None = None
    hidden_size: int = 64
    num_layers: int = 2
    vocab_size: int = 512
    max_length: int = 256
    loss: str = "sigmoid"
    beta: float = 0.1
    step_size: float | None = None
    sampling: str = "pooled"
    compare: bool = False
    steps: int = 300
    sft_steps: int = 150
    batch_size: int = 32
    learning_rate: float = 1e-3
    sft_learning_rate: float = 1e-3
    eval_every: int = 25
    checkpoint_every: int = 50
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        """Every rule on an option, before anything is written or trained.

        Raises:
            ValueError, TypeError, NotImplementedError: the message names the option.
        """
        whole = ("hidden_size", "num_layers", "max_length", "steps", "batch_size", "eval_every", "checkpoint_every")
        for name, least in (*((name, 1) for name in whole), ("sft_steps", 0), ("vocab_size", 258)):
            value = getattr(self, name)
            validation.check_number(name, value, least)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value}")
        for name in ("beta", "learning_rate", "sft_learning_rate"):
            validation.check_number(name, getattr(self, name), 0.0, open_low=True)
        validation.check_number("eval_fraction", self.eval_fraction, 0.0, 1.0, open_low=True, open_high=True)
        if self.step_size is not None:
            validation.check_number("step_size", self.step_size, 0.0)
        if self.hidden_size % (64 if self.hidden_size >= 64 else 2):
            raise ValueError(f"hidden_size must be a multiple of 64, or even and below 64, got {self.hidden_size}")
        validation.check_choice("loss", self.loss, ("sigmoid", "ipo"))
        validation.check_choice("sampling", self.sampling, STRATEGIES)
        dispatch.select(self.backend, dispatch.Request("logits", (), torch.float32, self.resolved_device))

    @property
    def resolved_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device must be one that works here, got {self.device!r}: {error}") from error
        return torch.device(self.device)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM was seen between two steps, and the state is saved."""


def resolved_step_size(config: TrainConfig) -> float:
    """eta; by default 0.05 in units of the loss at margin 0, so that DPO and IPO move alpha alike.

    log 2 for "sigmoid", 1 / (4 beta^2) for "ipo".
    """
    if config.step_size is not None:
        return config.step_size
    at_zero = preference_losses(torch.zeros(2), beta=config.beta, loss_type=config.loss).item()
    return 0.05 / at_zero


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
    _write_atomically(saved, json.dumps(stored, indent=2).encode())
    return job.run()


class TrainingJob:
    """Data, model and the phases of one run in one output folder."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.device = config.resolved_device
        self.console = report.console()
        train_pairs, eval_pairs = _load_data(config)
        self.groups = Groups(train_pairs)
        eval_ids = self.groups.ids(eval_pairs)
        torch.manual_seed(config.seed)
        self.model, self.tokenizer = self._model_and_tokenizer(train_pairs)
        self.pad_id = hf.pad_token_id(self.tokenizer)
        self.train_set = self._tokenized(train_pairs, self.groups.ids(train_pairs))
        self.eval_set = self._tokenized(eval_pairs, eval_ids)
        self.eval_ids = torch.tensor(eval_ids)
        self.history: list[dict[str, Any]] = []
        self.stop_requested = False
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._describe()
            start_state = self._sft()
            reference = self._reference_logps(start_state)
            evaluations = {"robust": self._preference_phase("robust", start_state, reference)}
            self.model.save_pretrained(self.out / "model")
            self.tokenizer.save_pretrained(self.out / "model")
            if self.config.compare:
                evaluations["plain"] = self._preference_phase("plain", start_state, reference)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._finish(evaluations)

    # -- phases ------------------------------------------------------------------------------------------------

    def _sft(self) -> dict[str, Tensor]:
        """Maximise the likelihood of the chosen answers; returns the weights that all later phases start from."""

        def loss_of(batch: dict[str, Tensor], _: Tensor) -> tuple[Tensor, dict[str, Any]]:
            num_pairs = batch["labels"].shape[0] // 2
            chosen = {name: rows[:num_pairs] for name, rows in batch.items()}
            loss = -self._logps(chosen).sum() / (chosen["labels"] != IGNORE_INDEX).sum()
            return loss, {}

        self._phase("sft", self.config.sft_steps, loss_of, GroupWeights(1, group_sizes=[1], step_size=0.0), None)
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def _reference_logps(self, start_state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(2, N) log-probabilities of train and evaluation pairs under the starting policy, kept in reference.pt."""
        path = self.out / "reference.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            return saved["train"], saved["eval"]
        self.model.load_state_dict(start_state)
        train, evaluation = self._logps_of_all(self.train_set), self._logps_of_all(self.eval_set)
        _save_atomically({"train": train, "eval": evaluation}, path)
        return train, evaluation

    def _preference_phase(
        self, name: str, start_state: dict[str, Tensor], reference: tuple[Tensor, Tensor]
    ) -> list[dict[str, Any]]:
        """Train with the group-robust loss, or ("plain") with one group that holds all pairs, which is DPO or IPO."""
        config, robust = self.config, name == "robust"
        self.model.load_state_dict(start_state)
        sizes = self.groups.sizes if robust else [len(self.train_set)]
        weights = GroupWeights(
            group_sizes=sizes,
            step_size=resolved_step_size(config) if robust else 0.0,
            estimator="group_mean" if robust and config.sampling in ("uniform", "balanced") else "importance",
        ).to(self.device)
        loss_fn = GroupRobustLoss(weights, beta=config.beta, loss_type=config.loss)
        train_reference, eval_reference = reference

        def loss_of(batch: dict[str, Tensor], indices: Tensor) -> tuple[Tensor, dict[str, Any]]:
            ids = batch["group_ids"] if robust else torch.zeros_like(batch["group_ids"])
            ref_logps = train_reference[:, indices].flatten().to(self.device)
            out = loss_fn.from_logps(self._logps(batch), ids, ref_logps)
            metrics = out.metrics()
            values = torch.stack(list(metrics.values())).tolist()
            return out.loss, dict(zip(metrics, values, strict=True))

        def evaluate() -> dict[str, Any]:
            return self._evaluation(eval_reference)

        return self._phase(name, config.steps, loss_of, weights, evaluate)

    def _phase(
        self,
        name: str,
        steps: int,
        loss_of: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, dict[str, Any]]],
        weights: GroupWeights,
        evaluate: Callable[[], dict[str, Any]] | None,
    ) -> list[dict[str, Any]]:
        """The training loop: from the phase's checkpoint if there is one, else from the weights as they are.

        Returns the evaluations of the phase.
        """
        config, path = self.config, self.out / f"{name}.pt"
        # The robust and the plain run see the same batches. The warm-up sees others.
        if name == "sft":
            strategy, seed, peak_rate = "pooled", config.seed + 1, config.sft_learning_rate
        else:
            strategy, seed, peak_rate = config.sampling, config.seed, config.learning_rate
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=peak_rate, weight_decay=0.0)
        sampler = GroupBatchSampler([pair.group_id for pair in self.train_set], config.batch_size, strategy, seed=seed)
        first, evaluations, seconds = self._restore(path, optimizer, weights)
        began = time.perf_counter() - seconds

        def checkpoint(step: int) -> None:
            self.seconds[name] = time.perf_counter() - began
            state = {
                "step": step,
                "model": self.model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "group_weights": weights.state_dict(),
                "rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
                "history": self.history,
                "evaluations": evaluations,
                "seconds": self.seconds,
            }
            _save_atomically(state, path)

        def observe(step: int) -> None:
            if evaluate is None:
                return
            alpha = dict(zip(self.groups.names, weights.alpha.tolist(), strict=False)) if name == "robust" else None
            evaluations.append({"step": step, **evaluate(), "alpha": alpha})
            self._log({"run": name, **evaluations[-1]})

        if first == 0 and not evaluations:
            observe(0)
        with report.progress(self.console, name, steps, first) as bar:
            self.model.train()
            for step in range(first, steps):
                if self.stop_requested:
                    checkpoint(step)
                    raise Interrupted(str(self.out))
                indices = torch.tensor(sampler.batch(step))
                batch = self._batch([self.train_set[i] for i in indices.tolist()])
                rate = peak_rate * min(1.0, (step + 1) / max(1, round(steps * WARMUP_SHARE)))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss, metrics = loss_of(batch, indices)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise ValueError(f"learning_rate is too high: the loss of {name} became {value} at step {step}")
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                optimizer.step()
                done = step + 1
                self._log({"run": name, "step": done, "loss": value, **metrics})
                if evaluate is not None and (done % config.eval_every == 0 or done == steps):
                    observe(done)
                    self.model.train()
                if done % config.checkpoint_every == 0 or done == steps:
                    checkpoint(done)
                bar.advance(done, value, evaluations[-1] if evaluations else None)
        return evaluations

    # -- pieces ------------------------------------------------------------------------------------------------

    def _restore(
        self, path: Path, optimizer: torch.optim.Optimizer, weights: GroupWeights
    ) -> tuple[int, list[dict[str, Any]], float]:
        """(steps done, evaluations, seconds spent) of the phase's checkpoint, its state put back; zeros if none."""
        metrics = self.out / "metrics.jsonl"
        if not path.exists():
            if metrics.exists():  # a run that was killed in this phase has left lines that come again
                self._write_history(metrics)
            return 0, [], 0.0
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        weights.load_state_dict(state["group_weights"])
        torch.set_rng_state(state["rng"].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"].cpu(), self.device)
        self.history = state["history"]
        self.seconds.update(state["seconds"])
        self._write_history(metrics)
        return state["step"], state["evaluations"], self.seconds[path.stem]

    def _write_history(self, path: Path) -> None:
        _write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.history).encode())

    def _evaluation(self, reference: Tensor) -> dict[str, Any]:
        """Mean loss and accuracy of each group on the evaluation pairs, and the worst group's loss."""
        config, reference = self.config, reference.cpu()
        logps = self._logps_of_all(self.eval_set)
        losses = preference_losses(logps.flatten(), reference.flatten(), beta=config.beta, loss_type=config.loss)
        ratios = logps - reference
        correct = (ratios[0] > ratios[1]).double()
        counts = torch.bincount(self.eval_ids, minlength=len(self.groups)).clamp(min=1)
        means, accuracies = (
            (segment_sum(x, self.eval_ids, len(self.groups)) / counts).tolist() for x in (losses, correct)
        )
        present = [g for g in range(len(self.groups)) if (self.eval_ids == g).any()]
        names = self.groups.names
        by_group = {names[g]: {"loss": means[g], "accuracy": accuracies[g]} for g in present}
        worst = max(by_group, key=lambda group: by_group[group]["loss"])
        return {"groups": by_group, "worst_group": worst, "worst_loss": by_group[worst]["loss"]}

    def _logps(self, batch: dict[str, Tensor]) -> Tensor:
        """(S,) log-probabilities of the labels, by the model's forward as `hf.add_sequence_logps` extends it."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        return self.model(**inputs, sequence_logps=True)

    @torch.no_grad()
    def _logps_of_all(self, pairs: Sequence[TokenizedPair]) -> Tensor:
        """(2, N) on the CPU: log-probabilities of chosen and rejected answers."""
        self.model.eval()
        pieces = []
        for first in range(0, len(pairs), self.config.batch_size):
            batch = self._batch(pairs[first : first + self.config.batch_size])
            pieces.append(self._logps(batch).view(2, -1).cpu())
        return torch.cat(pieces, dim=1)

    def _batch(self, pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in collate_pairs(pairs, pad_id=self.pad_id).items()}

    def _tokenized(self, pairs: Sequence[PreferencePair], ids: Sequence[int]) -> list[TokenizedPair]:
        def encode(text: str) -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=False)

        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        return tokenize_pairs(pairs, ids, encode, eos_id=eos, bos_id=bos, max_length=self.config.max_length)

    def _model_and_tokenizer(self, pairs: Sequence[PreferencePair]) -> tuple[Any, Any]:
        config = self.config
        if config.model is not None:
            model, tokenizer = hf.load_local(config.model)
        else:
            texts = (text for pair in pairs for text in (pair.prompt, pair.chosen, pair.rejected))
            tokenizer = hf.byte_level_tokenizer(texts, config.vocab_size)
            model = hf.small_llama(
                len(tokenizer),
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                max_length=config.max_length,
                pad_id=hf.pad_token_id(tokenizer),
            )
        model.to(self.device)
        hf.add_sequence_logps(model, hf.head_or_none(model), backend=config.backend)
        return model, tokenizer

    def _describe(self) -> None:
        sizes = ", ".join(f"{n} {s}" for n, s in zip(self.groups.names, self.groups.sizes, strict=True))
        parameters = sum(p.numel() for p in self.model.parameters())
        self.console.print(
            f"{len(self.train_set)} training pairs ({sizes}), {len(self.eval_set)} evaluation pairs, "
            f"{parameters / 1e6:.2f} M parameters on {self.device}, output in {self.out}",
            highlight=False,
        )

    def _log(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.console.print("stopping after this step (again to stop at once)")

    def _finish(self, evaluations: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        results = {
            "loss": self.config.loss,
            "seed": self.config.seed,
            "step_size": resolved_step_size(self.config),
            "group_sizes": dict(zip(self.groups.names, self.groups.sizes, strict=True)),
            "runs": {name: series[-1] for name, series in evaluations.items()},
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
            "peak_rss_gib": _peak_rss_gib(),
        }
        _write_atomically(self.out / "results.json", json.dumps(results, indent=2).encode())
        report.print_results(self.console, results)
        report.save_picture(evaluations, self.config.loss, self.out / "training.png")
        self.console.print(f"metrics.jsonl, results.json, training.png and model/ are in {self.out}", highlight=False)
        return results


def _load_data(config: TrainConfig) -> tuple[list[PreferencePair], list[PreferencePair]]:
    if config.data is None:
        if config.eval_data is not None:
            raise ValueError("eval_data needs data: the embedded task brings its own evaluation pairs")
        return embedded_task.generate_pairs(4000, config.seed), embedded_task.generate_pairs(600, config.seed + 10_000)
    pairs = load_pairs(config.data)
    if config.eval_data is not None:
        return pairs, load_pairs(config.eval_data)
    return split_by_group(pairs, config.eval_fraction, config.seed)


def _peak_rss_gib() -> float | None:
    """None where the operating system has no `resource` module (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    """A kill at any moment leaves either the old file or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def command(config: TrainConfig, resume: bool) -> int:
    """The exit status: 0 done, 130 interrupted with everything saved."""
    try:
        start(config, resume)
    except Interrupted as interrupted:
        print(f"stopped; go on with: python -m grpo_kernels train --resume --out {interrupted}", file=sys.stderr)
        return 130
    return 0
