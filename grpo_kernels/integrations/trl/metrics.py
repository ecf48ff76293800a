"""What the trainer logs of each group: sums on the device, read back once a log."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.segments import segment_sum

SIDES = ("chosen", "rejected")
# Sums over pairs of one group; of the last two the squares, for standard errors.
TOTALS = ("count", "loss", "accuracy", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "tokens")
# Sums over counted tokens, of a pair's chosen and of its rejected answer; zeros where nobody asks for them.
TOKEN_TOTALS = tuple(f"{name}/{side}" for name in ("counted", "entropy", "logits", "hits") for side in SIDES)
SQUARED = ("loss", "accuracy")
# Sums over micro-batches: of optimizer steps, of the loss that is minimised, of the experts' balancing loss.
SCALARS = ("steps", "objective", "batches", "aux_loss")


class BatchMetrics(NamedTuple):
    """One micro-batch, without gradients."""

    group_ids: Tensor  # (B,)
    pair_losses: Tensor  # (B,)
    rewards: Tensor  # (2B,)
    logps: Tensor  # (2B,)
    tokens: Tensor  # (2B,)
    scalars: tuple[float | Tensor, ...]  # as SCALARS
    token_sums: Tensor | None = None  # (4, 2B), as TOKEN_TOTALS


class GroupTotals:
    """Sums since the last reading. Nothing here waits for the device but `read`.

    ``gather`` is for evaluations: pairs of all ranks, without those that fill up the last batch; else each rank adds up
    its own, and they are summed when they are read.
    """

    def __init__(self, num_groups: int, device: torch.device, gather: Callable[[Any], Any] | None = None) -> None:
        self.num_groups, self.device, self.gather = num_groups, device, gather
        self.clear()

    def clear(self) -> None:
        columns = len(TOTALS) + len(TOKEN_TOTALS) + len(SQUARED)
        self.groups = torch.zeros(self.num_groups, columns, dtype=torch.float64, device=self.device)
        self.scalars = torch.zeros(len(SCALARS), dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def add(self, batch: BatchMetrics) -> None:
        chosen, rejected = batch.rewards.chunk(2)
        hits = 0.5 * ((chosen > rejected).double() + (chosen >= rejected).double())  # a tie is half a hit
        losses, tokens = batch.pair_losses, batch.tokens.view(2, -1).sum(0)
        columns = (torch.ones_like(losses), losses, hits, chosen, rejected, *batch.logps.chunk(2), tokens)
        token_sums = batch.logps.new_zeros(4, len(batch.logps)) if batch.token_sums is None else batch.token_sums
        columns += token_sums.view(len(TOKEN_TOTALS), -1).unbind()
        columns += tuple(columns[TOTALS.index(name)].double().square() for name in SQUARED)
        rows, group_ids = torch.stack([column.double() for column in columns], 1), batch.group_ids
        if self.gather is not None:
            rows, group_ids = self.gather((rows, group_ids))
        for column, total in zip(rows.unbind(1), self.groups.unbind(1), strict=True):
            total += segment_sum(column, group_ids, self.num_groups)
        for value, total in zip(batch.scalars, self.scalars.unbind(), strict=True):
            total += value

    def tokens(self) -> Tensor:
        return self.groups[:, TOTALS.index("tokens")].sum()

    def read(self, alpha: Tensor, reduce: Callable[[Tensor], Tensor], names: list[str]) -> GroupReading:
        """What has been added up, over all ranks, by one copy to the host; the sums begin anew."""
        groups = self.groups if self.gather is not None else reduce(self.groups)
        numbers = torch.cat([torch.cat([groups, alpha.unsqueeze(1)], 1).flatten(), reduce(self.scalars)]).tolist()
        self.clear()
        width = groups.shape[1] + 1
        rows = [numbers[start : start + width] for start in range(0, width * self.num_groups, width)]
        scalars = dict(zip(SCALARS, numbers[width * self.num_groups :], strict=True))
        return GroupReading(names, rows, scalars)


class GroupReading(NamedTuple):
    names: list[str]
    rows: list[list[float]]  # of each group: TOTALS, TOKEN_TOTALS, SQUARED, alpha
    scalars: dict[str, float]

    def total(self, name: str) -> float:
        column = (*TOTALS, *TOKEN_TOTALS).index(name)
        return sum(row[column] for row in self.rows)

    def of_tokens(self) -> dict[str, float]:
        """Means over the answers' tokens, TRL's names for them; nothing where nobody asked for them."""
        of_sides = {side: self.total(f"counted/{side}") for side in SIDES}
        if not all(of_sides.values()):
            return {}
        entropies = sum(self.total(f"entropy/{side}") for side in SIDES)
        return {
            "entropy": entropies / sum(of_sides.values()),
            **{f"logits/{side}": self.total(f"logits/{side}") / count for side, count in of_sides.items()},
            "mean_token_accuracy": self.total("hits/chosen") / of_sides["chosen"],
        }

    def metrics(self, *, standard_errors: bool) -> dict[str, float]:
        """Means over all pairs under TRL's names, and of each group."""
        pairs = self.total("count")
        metrics = {name: self.total(name) / pairs for name in TOTALS[3:7]}
        metrics["rewards/accuracies"] = self.total("accuracy") / pairs
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics |= self.of_tokens()
        for name, (count, loss, accuracy, *_, loss_squares, accuracy_squares, alpha) in zip(
            self.names, self.rows, strict=True
        ):
            metrics |= {f"groups/{name}/alpha": alpha, f"groups/{name}/count": count}
            if count:
                metrics |= {f"groups/{name}/loss": loss / count, f"groups/{name}/accuracy": accuracy / count}
            if count > 1 and standard_errors:
                metrics[f"groups/{name}/loss_se"] = _standard_error(count, loss, loss_squares)
                metrics[f"groups/{name}/accuracy_se"] = _standard_error(count, accuracy, accuracy_squares)
        metrics["groups/worst_loss"] = max(loss / count for count, loss, *_ in self.rows if count)
        if self.scalars["batches"]:
            metrics["aux_loss"] = self.scalars["aux_loss"] / self.scalars["batches"]
        return metrics


def _standard_error(count: float, total: float, squares: float) -> float:
    """Of the mean of ``count`` > 1 numbers with this sum and sum of squares."""
    return math.sqrt(max(0.0, squares - total * total / count) / (count * (count - 1)))
