"""What happens beside the trainer's steps: a bar, metrics.jsonl, and a stop on Ctrl-C or SIGTERM that saves."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from grpo_kernels.integrations import checkpoints


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run, and everything is saved; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopOnSignal(TrainerCallback):
    """Between two steps of training a signal saves and stops; at any other time there is nothing to save."""

    def __init__(self) -> None:
        self.number, self._in_training = 0, False
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number or not self._in_training:  # again: at once
            raise Interrupted(number)
        self.number = number

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:  # not all ranks have seen it
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        if self.number and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_training = False


class EvaluateAtTheEnd(TrainerCallback):
    """Also where the last step is no multiple of eval_steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class Bar(ProgressCallback):
    """One bar for a phase: its name, the loss, and the worst group's evaluation loss."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self._shown = name, dict[str, str]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"{self.name:>8}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        for name, key in (("loss", "loss"), ("worst group", "eval_groups/worst_loss")):
            if key in logs:
                self._shown[name] = f"{logs[key]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)


class Metrics(TrainerCallback):
    """Each logged record as a line of a file; a resumed run takes back the lines that will come again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with checkpoints.naming(self.path):
                self.path.write_text("".join(json.dumps(record) + "\n" for record in state.log_history))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            with checkpoints.naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def show_bar(trainer: Any, name: str) -> None:
    """Our bar in place of Transformers' own and of its printed dicts; none with disable_tqdm."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar(name))
