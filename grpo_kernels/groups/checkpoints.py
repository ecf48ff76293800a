"""What GroupWeights checks in a checkpoint before and after it is loaded."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from grpo_kernels.groups.rules import ALPHA_RULES
from grpo_kernels.types import ESTIMATORS, PRIORS, UPDATE_MODES

GroupWeights = Any  # of groups/weights.py, which stands above this module

_CHOICES = {"rule": ALPHA_RULES, "estimator": ESTIMATORS, "update_mode": UPDATE_MODES, "prior": PRIORS}
_BASELINES = ("none", "given", "running")
# What is gathered for an option, and saved where it is used.
_OF_OPTIONS = {
    "loss_ema": ("ema_losses", "ema_weights"),
    "step_size='auto' (with it alpha)": ("hedge_gains", "hedge_gap_sum"),
    "baseline='running'": ("baseline", "baseline_sums", "baseline_weights"),
    "inner_tilt": ("tilted_means", "pending_log_tilts"),
}
_NUMBERS = ("rule_parameter", "loss_ema", "floor", "chi", "adjustment")


def settings_of(weights: GroupWeights) -> Tensor:
    """The options that alpha's course depends on, as numbers that any kind of checkpoint can hold."""
    chosen = [list(options).index(getattr(weights, name)) for name, options in _CHOICES.items()]
    numbers = [*chosen, *(getattr(weights, name) for name in _NUMBERS)]
    later = [_BASELINES.index(baseline_of(weights)), weights.inner_tilt]
    while later and not later[-1]:  # checkpoints of who does not use them stay as they were
        later.pop()
    return torch.tensor([*numbers, *later], dtype=torch.float64)


def made_with(weights: GroupWeights) -> dict[str, Any]:
    """What must be the same on all ranks, by the names that the user gave it: the groups and the options above."""
    sizes, given = weights.given_sizes, weights.given_baseline
    own_names = {"rule_parameter": ALPHA_RULES[weights.rule].parameter, "update_mode": "update"}
    names = [*_CHOICES, *_NUMBERS, "inner_tilt"]
    return {
        "num_groups": weights.num_groups,
        "group_sizes": None if sizes is None else sizes.tolist(),
        **{own_names.get(name, name): getattr(weights, name) for name in names},
        "baseline": baseline_of(weights) if given is None else given.tolist(),
    }


def baseline_of(weights: GroupWeights) -> str:
    return "running" if weights.has_running_baseline else "none" if weights.given_baseline is None else "given"


def before_loading(weights: GroupWeights, state_dict: dict[str, Any], prefix: str, error_msgs: list[str]) -> None:
    """Refuse the alpha of other groups, and say what a checkpoint lacks or had otherwise. Fills in what it lacks, and
    leaves out what other options have gathered."""
    mine, theirs = weights.given_sizes, state_dict.get(f"{prefix}group_sizes")
    if mine is not None and theirs is not None and mine.tolist() != theirs.tolist():
        error_msgs.append(f"group_sizes of the checkpoint {theirs.tolist()} are not this module's {mine.tolist()}")
        return
    log_alpha = state_dict.get(f"{prefix}log_alpha")
    if log_alpha is None:
        _say(f"the checkpoint holds no alpha ({prefix}log_alpha): the weights of the groups stay as they are")
        return
    if log_alpha.numel() != weights.num_groups:
        error_msgs.append(f"log_alpha of the checkpoint is of {log_alpha.numel()} groups, not {weights.num_groups}")
        return
    if mine is None:  # an option, which not every estimator needs
        state_dict.pop(f"{prefix}group_sizes", None)
    elif theirs is None:
        state_dict[f"{prefix}group_sizes"] = mine.clone()
    saved = state_dict.get(f"{prefix}settings")
    differences = [] if saved is None else _differences(weights, saved)
    news = []
    if differences:
        news.append(
            f"the checkpoint's alpha was moved with other options: {', '.join(differences)}. It goes on with these"
        )
    state_dict[f"{prefix}settings"] = settings_of(weights)
    state_dict.setdefault(f"{prefix}shared_updates", weights.shared_updates)
    initial = weights._initial_values()
    if weights.update_mode == "lagged":  # older ones had no shares
        state_dict.setdefault(f"{prefix}pending_shares", initial["pending_shares"])
    else:
        state_dict.pop(f"{prefix}pending_shares", None)
    if weights.given_baseline is not None:  # an option, not what was gathered
        theirs = state_dict.get(f"{prefix}baseline")
        if theirs is not None and not torch.equal(theirs.cpu().double(), weights.given_baseline):
            news.append(
                f"the checkpoint's baseline was {theirs.tolist()}. It goes on with {weights.given_baseline.tolist()}"
            )
        state_dict[f"{prefix}baseline"] = weights.given_baseline
    for option, names in _OF_OPTIONS.items():
        lacking = [name for name in names if name in weights._buffers and f"{prefix}{name}" not in state_dict]
        if lacking:
            news.append(f"the checkpoint has no {', '.join(lacking)}: what {option} has gathered begins anew")
            state_dict.update({f"{prefix}{name}": initial[name] for name in names})
    of_options = dict.fromkeys(name for names in _OF_OPTIONS.values() for name in names)
    idle = [name for name in of_options if name not in weights._buffers and f"{prefix}{name}" in state_dict]
    if idle:
        news.append(f"left out of the checkpoint, as no option here uses them: {', '.join(idle)}")
        for name in idle:
            del state_dict[f"{prefix}{name}"]
    if news:
        _say("; ".join(news))


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
    numbers = saved.tolist()
    values = dict(zip([*_CHOICES, *_NUMBERS], numbers, strict=False))
    later = [*numbers[len(values) :], 0.0, 0.0][:2]
    for name, options in _CHOICES.items():
        theirs, mine = dict(enumerate(options)).get(int(values[name]), "unknown here"), getattr(weights, name)
        if theirs != mine:
            found.append(f"{name.removesuffix('_mode')}={theirs!r}, here {mine!r}")
    same_rule = values["rule"] == list(ALPHA_RULES).index(weights.rule)
    for name in _NUMBERS:
        theirs, mine = values[name], getattr(weights, name)
        near = theirs == mine or abs(theirs - mine) <= rounding * abs(mine)
        if not near and (same_rule or name != "rule_parameter"):
            shown = ALPHA_RULES[weights.rule].parameter if name == "rule_parameter" else name
            values_of_both = ["auto" if value == math.inf else f"{value:g}" for value in (theirs, mine)]
            found.append(f"{shown}={values_of_both[0]}, here {values_of_both[1]}")
    for name, of_theirs, of_mine in (
        ("baseline", _BASELINES[int(later[0])], baseline_of(weights)),
        ("inner_tilt", later[1], weights.inner_tilt),
    ):
        if of_theirs != of_mine:
            found.append(f"{name}={of_theirs}, here {of_mine}")
    return found


def _say(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
