"""What a plain loop gets wrong without an error: each is warned of once for each GroupWeights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

UNSTEPPED = 1000  # forwards: more than gradients are accumulated over


class Watch:
    """Numbers on a GPU are read back only until they have been right once: no step waits for the device later."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._totals: list[Any] = []  # total_pairs of each forward since the last step()
        self._num_pairs = 0  # theirs, on this rank
        self._has_counted = False
        self._has_checked_total = False
        self.has_checked_graph = False  # of the first forward, for what FSDP2 does
        self._has_checked_empty = False
        self._num_empty = torch.zeros((), dtype=torch.int64, device="cpu")  # later where the batches are

    def once(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"{text}. This warns once", RuntimeWarning, stacklevel=3)

    def if_skipped(self, skipped_updates: Tensor, read_device: bool = False) -> None:
        if torch.compiler.is_compiling() or "skipped" in self._said or skipped_updates.is_meta:
            return
        if (skipped_updates.device.type == "cpu" or read_device) and int(skipped_updates) > 0:
            self.once(
                "skipped",
                "a group's loss was not finite (NaN or inf): alpha was not updated for that batch. A group id outside "
                "[0, K), a label outside the vocabulary, or a NaN in logits or ref_logps does that; with "
                "GRPO_KERNELS_DEBUG=1 ids and labels are checked, and the bad one is named. "
                "GroupWeights.skipped_updates counts on",
            )

    def saw_empty(self, is_empty: Tensor) -> None:
        """``is_empty``: a bool for each sequence of a training forward, True where no token counts."""
        if torch.compiler.is_compiling() or is_empty.is_meta or is_capturing(is_empty):
            return
        self._num_empty = self._num_empty.to(is_empty.device) + is_empty.sum()
        if is_empty.device.type == "cpu":
            self.num_empty()

    def num_empty(self) -> int:
        """Sequences without a counted token so far. Waits for the device."""
        found = int(self._num_empty)
        if found:
            self.once(
                "empty",
                f"{found} sequences have no counted token, all their labels are ignore_index: their log-probability is "
                "0, and of their pairs the other answer alone is trained. Leave such pairs out, give them a weight of "
                "0, or cut prompts rather than answers. GroupWeights.diagnose().empty_sequences counts on",
            )
        return found

    def saw_forward(self, num_pairs: int, total_pairs: Any) -> None:
        self._totals.append(total_pairs)
        self._num_pairs += num_pairs
        if "total" in self._said:
            return
        is_readable = not isinstance(total_pairs, Tensor) or total_pairs.device.type == "cpu"
        if total_pairs is not None and is_readable and self._num_pairs > float(total_pairs):
            self.once(
                "total",
                f"{len(self._totals)} forwards of {self._num_pairs} pairs since the last step(), more than "
                f"total_pairs={float(total_pairs):g}: call step() beside optimizer.step(), without which alpha does "
                "not move, and pass the number of pairs of all forwards and ranks in between, by which loss and "
                "gradient are divided",
            )
        elif len(self._totals) == UNSTEPPED:
            self.once(
                "step", f"{UNSTEPPED} forwards without step(): with update='lagged' alpha does not move until then"
            )

    def at_step(self, counts: Tensor, estimator: str, num_ranks: int) -> None:
        """``counts`` (K,): pairs of all ranks since the last step."""
        of_forwards, self._totals = self._totals, []
        num_pairs, self._num_pairs = self._num_pairs, 0
        if torch.compiler.is_compiling() or counts.is_meta or is_capturing(counts):
            return
        self._has_counted = self._has_counted or num_pairs > 0 or bool(counts.any())
        if not self._has_counted:
            self.once(
                "nothing",
                "step() has not seen a single pair: alpha does not move. Forwards count in training mode with "
                "gradients on, and by the GroupWeights that they were given",
            )
        if not self._has_checked_empty:
            self._has_checked_empty = True
            self.num_empty()
        totals = [total for total in of_forwards if total is not None]
        if estimator == "importance" and len(of_forwards) - len(totals) > 1:
            self.once(
                "forgotten",
                f"{len(of_forwards) - len(totals)} forwards since the last step() gave no total_pairs: each loss is a "
                "mean over its own batch, and their sum as many times the step's. Pass total_pairs=<pairs of the whole "
                "step>, over all forwards and ranks",
            )
        if totals and (counts.device.type == "cpu" or not self._has_checked_total):
            self._has_checked_total = True
            counted = round(float(counts.sum())) if num_ranks > 1 else num_pairs
            wrong = [total for total in totals if float(total) != counted]
            if wrong:
                self.once(
                    "total",
                    f"total_pairs={float(wrong[0]):g} in a step of {counted} pairs: it must be the number of pairs of "
                    "all forwards and ranks since the last step(), for the loss and its gradient are divided by it",
                )


def is_capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
