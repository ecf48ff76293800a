"""What `GroupWeights.diagnose` says of alpha, and the trail of past updates that it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.groups.rules import ALPHA_RULES
from grpo_kernels.groups.watch import is_capturing

GroupWeights = Any  # of groups/weights.py, which stands above this module

# Updates that are looked back on, fewer of very many groups: their alphas are kept on the device.
WINDOW, WINDOW_ELEMENTS = 64, 1 << 18
# alpha swings where a weight goes over so much of the simplex, and so many times over.
SWING, TIMES_OVER = 0.3, 3.0
# alpha has not left uniform while no weight is further from 1 / K, relatively.
NEARLY_UNIFORM = 0.1


class Diagnosis(NamedTuple):
    """The state of alpha in a few numbers, and what to do about it in plain words. K groups."""

    updates: int
    """That were seen: of this process, and not those of a compiled loss."""
    entropy: float
    """Of alpha, in units of log K: 1 where it is uniform, 0 where one group has all the weight."""
    rarest_group: int | None
    """The group of fewest pairs: of the data set where group_sizes are known, else of the batches seen."""
    rarest_alpha: float | None
    """Its weight."""
    step_size: float | None
    """eta, with step_size="auto" that of now, infinite before losses have differed; None for other rules."""
    effective_groups: float
    """1 / sum_g q_g^2, with q the weights of the loss: K where they are uniform, 1 where one group has them all."""
    effective_pairs: float | None
    """1 / sum_g q_g^2 / N_g, where group_sizes are known: a mean of so many pairs would be as noisy as the loss."""
    unseen: tuple[int | None, ...]
    """(K,): updates since a batch last had a pair of the group; None: not yet seen."""
    warnings: tuple[str, ...]
    empty_sequences: int
    """Without a counted token, in the training forwards of this process. (Of a compiled loss they are not counted.)"""

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """The numbers as a trainer logs them; a group that was not seen yet counts from the first update."""
        values = {"groups/alpha_entropy": self.entropy, "groups/effective_groups": self.effective_groups}
        if self.step_size is not None:
            values["groups/step_size"] = self.step_size
        if self.rarest_alpha is not None:
            values["groups/rarest_alpha"] = self.rarest_alpha
        if self.effective_pairs is not None:
            values["groups/effective_pairs"] = self.effective_pairs
        for name, unseen in zip(names, self.unseen, strict=True):
            values[f"groups/{name}/unseen"] = float(self.updates if unseen is None else unseen)
        return values


class Trail:
    """(alpha, counts of pairs) of past updates. Nothing is read, and next to nothing computed, before `look_back`."""

    def __init__(self) -> None:
        self.updates = 0
        self._recent: list[tuple[Tensor, Tensor]] = []  # (K,) each, newest last
        self._folded = 0  # of self._recent, whose counts are in the two below
        self._pairs: Tensor | None = None  # (K,) of all updates
        self._last_seen: Tensor | None = None  # (K,) number of the update, from 1; 0: not yet

    def saw(self, alpha: Tensor, counts: Tensor) -> None:
        """After an update. Neither may be written to later."""
        if torch.compiler.is_compiling() or alpha.is_meta or is_capturing(alpha):
            return
        self.updates += 1
        self._recent.append((alpha.detach(), counts.detach()))
        window = max(2, min(WINDOW, WINDOW_ELEMENTS // alpha.shape[0]))
        if len(self._recent) >= 2 * window:
            self._fold()
            self._recent = self._recent[-window:]
            self._folded = window

    def look_back(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """((n, K) alphas of the last updates, (K,) pairs seen, (K,) updates since), or None before the first."""
        self._fold()
        if self._pairs is None or self._last_seen is None:
            return None
        alphas = [alpha.to(self._pairs.device) for alpha, _ in self._recent[-WINDOW:]]
        of_none = self._pairs.new_empty(0, self._pairs.shape[0], dtype=torch.float64)
        return torch.stack(alphas) if alphas else of_none, self._pairs, self.updates - self._last_seen

    def state_dict(self) -> dict[str, Any]:
        """Without the alphas. (Not in the weights' own: alpha goes on without it.)"""
        self._fold()
        return {"updates": self.updates, "pairs": self._pairs, "last_seen": self._last_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self._pairs, self._last_seen = state["updates"], state["pairs"], state["last_seen"]
        self._recent, self._folded = [], 0

    def _fold(self) -> None:
        new = [counts for _, counts in self._recent[self._folded :]]
        if not new:
            return
        counts = torch.stack([count.to(new[-1].device) for count in new])
        first = self.updates - len(new) + 1
        numbers = torch.arange(first, self.updates + 1, device=counts.device).unsqueeze(1)
        seen, pairs = torch.where(counts > 0, numbers, 0).amax(0), counts.sum(0)
        if self._last_seen is not None and self._pairs is not None:
            seen = torch.maximum(seen, self._last_seen.to(seen.device))
            pairs = pairs + self._pairs.to(pairs.device)
        self._last_seen, self._pairs, self._folded = seen, pairs, len(self._recent)


def diagnose(weights: GroupWeights, trail: Trail, step: int | None, total_steps: int | None) -> Diagnosis:
    """See `GroupWeights.diagnose`."""
    num_groups, found = weights.num_groups, trail.look_back()
    alpha, of_loss = weights.alpha.cpu(), weights.loss_weights().cpu()
    sizes = None if weights.group_sizes is None else weights.group_sizes.cpu()
    alphas, pairs, since = (alpha.unsqueeze(0), None, None) if found is None else (x.cpu() for x in found)
    never = trail.updates  # since an update number 0
    unseen = [None if s == never else s for s in since.tolist()] if since is not None else [None] * num_groups
    by_size = pairs if sizes is None else sizes
    rarest = None if by_size is None else int(by_size.argmin())
    return Diagnosis(
        updates=trail.updates,
        entropy=entropy(alpha),
        rarest_group=rarest,
        rarest_alpha=None if rarest is None else float(alpha[rarest]),
        step_size=float(weights.current_step_size()) if weights.rule == "exponentiated_gradient" else None,
        effective_groups=1 / float(of_loss.square().sum()),
        effective_pairs=None if sizes is None else 1 / float((of_loss.square() / sizes).sum()),
        unseen=tuple(unseen),
        warnings=tuple(_warnings(weights, alphas, trail.updates if step is None else step, total_steps)),
        empty_sequences=weights._watch.num_empty(),
    )


def _warnings(weights: GroupWeights, alphas: Tensor, step: int, total_steps: int | None) -> list[str]:
    entry = ALPHA_RULES[weights.rule]
    softer, sharper = ("smaller", "larger") if entry.softer == "smaller" else ("larger", "smaller")
    now = f"{entry.parameter} (now {weights.rule_parameter:g})"
    steadier = "Larger batches or" if weights.is_hedged else f"A {softer} {now}, larger batches or"
    found = []
    if (swings := swing(alphas)) is not None:
        group, low, high = swings
        found.append(
            f"alpha swings: in the last {len(alphas)} updates the weight of group {group} went to and fro between "
            f"{low:.2f} and {high:.2f}. {steadier} loss_ema make it steadier"
        )
    stays = weights.num_groups == 1 or weights.chi == 0 or weights.is_hedged
    stays = stays or (weights.rule == "exponentiated_gradient" and weights.step_size == 0)  # uniform on purpose
    late = total_steps is not None and 2 * step >= total_steps
    if not stays and late and is_nearly_uniform(weights.alpha):
        found.append(
            f"alpha has not left uniform: after {step} of {total_steps} steps each weight is within "
            f"{100 * NEARLY_UNIFORM:.0f} % of 1 / K. Where the groups' losses differ, a {sharper} {now} is needed; "
            "where they do not, there is nothing to balance"
        )
    return found


def swing(alphas: Tensor) -> tuple[int, float, float] | None:
    """(group, lowest, highest) where a weight of (n, K) goes to and fro; the one that goes furthest."""
    if not len(alphas):
        return None
    low, high = alphas.amin(0), alphas.amax(0)
    path = alphas.diff(dim=0).abs().sum(0)
    to_and_fro = (high - low >= SWING) & (path >= TIMES_OVER * (high - low))
    if not bool(to_and_fro.any()):
        return None
    group = int(torch.where(to_and_fro, high - low, -1).argmax())
    return group, float(low[group]), float(high[group])


def is_nearly_uniform(alpha: Tensor) -> bool:
    return bool(((alpha * alpha.shape[0] - 1).abs() < NEARLY_UNIFORM).all())


def entropy(alpha: Tensor) -> float:
    """In units of log K; 1 for one group."""
    num_groups = alpha.shape[0]
    return float(-torch.special.xlogy(alpha, alpha).sum()) / math.log(num_groups) if num_groups > 1 else 1.0
