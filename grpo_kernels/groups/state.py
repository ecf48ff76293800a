"""What GroupWeights checks in a checkpoint before and after it is loaded."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.groups.rules import ALPHA_RULES
from grpo_kernels.types import ESTIMATORS, PRIORS, UPDATE_MODES

GroupWeights = Any  # of groups/weights.py, which imports this module

_CHOICES = {"rule": tuple(ALPHA_RULES), "estimator": ESTIMATORS, "update_mode": UPDATE_MODES, "prior": PRIORS}
_NUMBERS = ("rule_parameter", "loss_ema", "floor", "chi", "adjustment")


def settings_of(weights: GroupWeights) -> Tensor:
    """The options that alpha's course depends on, as numbers that any kind of checkpoint can hold."""
    chosen = [options.index(getattr(weights, name)) for name, options in _CHOICES.items()]
    return torch.tensor([*chosen, *(getattr(weights, name) for name in _NUMBERS)], dtype=torch.float64)


def before_loading(weights: GroupWeights, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Refuse the alpha of other groups, and say what a checkpoint lacks or had otherwise. Fills in what it lacks."""
    mine, theirs = weights.group_sizes, state_dict.get(f"{prefix}group_sizes")
    if mine is not None and theirs is not None and mine.tolist() != theirs.tolist():
        error_msgs.append(f"group_sizes of the checkpoint {theirs.tolist()} are not this module's {mine.tolist()}")
        return
    if f"{prefix}log_alpha" not in state_dict:
        _say(f"the checkpoint holds no alpha ({prefix}log_alpha): the weights of the groups stay as they are")
        return
    saved = state_dict.get(f"{prefix}settings")
    if saved is not None:
        differences = _differences(weights, saved)
        if differences:
            _say(
                f"the checkpoint's alpha was moved with other options: {', '.join(differences)}. It goes on with these"
            )
    state_dict[f"{prefix}settings"] = weights.settings
    state_dict.setdefault(f"{prefix}shared_updates", weights.shared_updates)
    if weights.loss_ema:  # saved without: the mean begins anew
        for name in ("ema_losses", "ema_weights"):
            state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(weights.log_alpha))


def mend_log_alpha(weights: GroupWeights, error_msgs: list[str]) -> None:
    """A checkpoint that was cast to bfloat16 has a rounded alpha: back onto the simplex. Far off it is refused."""
    loaded = weights.log_alpha.double()
    off = float(loaded.logsumexp(-1))
    if not abs(off) <= 0.05:
        error_msgs.append(f"log_alpha of the checkpoint must be weights on the simplex; they add up to {math.exp(off)}")
        return
    if abs(off) > 1e-9 or weights.log_alpha.dtype != torch.float64:
        weights.log_alpha = loaded - loaded.logsumexp(-1)


def _differences(weights: GroupWeights, saved: Tensor) -> list[str]:
    rounding = 0.0 if saved.dtype == torch.float64 else torch.finfo(saved.dtype).eps  # of a checkpoint that was cast
    found = []
    values = dict(zip([*_CHOICES, *_NUMBERS], saved.tolist(), strict=True))
    for name, options in _CHOICES.items():
        theirs, mine = options[int(values[name])], getattr(weights, name)
        if theirs != mine:
            found.append(f"{name.removesuffix('_mode')}={theirs!r}, here {mine!r}")
    same_rule = values["rule"] == _CHOICES["rule"].index(weights.rule)
    for name in _NUMBERS:
        theirs, mine = values[name], getattr(weights, name)
        if abs(theirs - mine) > rounding * abs(mine) and (same_rule or name != "rule_parameter"):
            shown = ALPHA_RULES[weights.rule].parameter if name == "rule_parameter" else name
            found.append(f"{shown}={theirs:g}, here {mine:g}")
    return found


def _say(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
