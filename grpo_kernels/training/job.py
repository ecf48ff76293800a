"""A run of `train`: data, model and phases, each with a checkpoint of its own in the output folder.

sft (warm-up on the chosen answers) -> reference log-probabilities -> robust -> plain (with --compare: DPO or IPO on the
pooled pairs, from the same start).
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.console import make_console, progress
from grpo_kernels.functional import preference_losses
from grpo_kernels.groups.sampling import GroupBatchSampler
from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.losses import GroupRobustLoss
from grpo_kernels.segments import segment_sum
from grpo_kernels.training import embedded_task, report
from grpo_kernels.training.config import TrainConfig, resolved_step_size
from grpo_kernels.training.data import (
    Groups,
    PreferencePair,
    TokenizedPair,
    collate_pairs,
    load_pairs,
    split_by_group,
    tokenize_pairs,
)
from grpo_kernels.types import IGNORE_INDEX

WARMUP_SHARE = 0.1  # of a phase's steps, over which the learning rate rises linearly


class Interrupted(Exception):
    """Ctrl-C or SIGTERM was seen between two steps, and the state is saved."""


class TrainingJob:
    """Data, model and the phases of one run in one output folder."""

    def __init__(self, config: TrainConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.device = config.resolved_device
        self.console = make_console()
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
        with progress(self.console, name, steps, first) as bar:
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
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.history).encode())

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
        write_atomically(self.out / "results.json", json.dumps(results, indent=2).encode())
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


def _save_atomically(state: dict[str, Any], path: Path) -> None:
    """A kill at any moment leaves either the old file or the new one, whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
