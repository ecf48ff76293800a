"""Every rule on user input, stated once. Each error names the argument, the rule and the value."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32)

_CUMULATED = "Of lengths (2B,) torch.nn.functional.pad(lengths.cumsum(0), (1, 0)) makes it"


def debug_checks_on() -> bool:
    """True when GRPO_KERNELS_DEBUG=1: labels and ids are read back and checked (a host synchronisation)."""
    return os.environ.get("GRPO_KERNELS_DEBUG", "0") not in ("", "0") and not torch.compiler.is_compiling()


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_option_names(options: Mapping[str, Any], known: type) -> None:
    """Keyword options against the names of a TypedDict."""
    names = [*known.__annotations__]  # with those that it inherits
    for name in options:
        if name not in names:
            raise TypeError(f"{name!r} is no option here; there are {', '.join(names)}")


def _is(value: Any, kind: type) -> bool:
    """For Real and Integral, which NumPy's scalars are, too. Dynamo cannot trace it: plain numbers do not come here."""
    return isinstance(value, kind)


def check_number(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """A finite real number in the interval; bool and tensors are refused."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or _is(value, Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    above = value > low if open_low else value >= low
    below = value < high if open_high else value <= high
    if not (abs(value) < math.inf and above and below):  # Dynamo traces this; not math.isfinite
        interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high or high == math.inf else ']'}"
        raise ValueError(f"{name} must be finite and in {interval}, got {value}")


def check_whole_number(name: str, value: Any, low: int, or_else: str = "") -> None:
    """An int (NumPy's, too) of at least ``low``. ``or_else``: what the argument may be instead, for the message."""
    if isinstance(value, bool) or not (isinstance(value, int) or _is(value, Integral)):
        raise TypeError(f"{name} must be {or_else}a whole number, got {value!r}")
    check_number(name, value, low)


def check_sequence(name: str, value: Any, what: str) -> None:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}{_how_to_make(name, value)}")


def _how_to_make(name: str, value: Any) -> str:
    """A tensor of what was given in its place: numbers, names, a module or a model's output."""
    if isinstance(getattr(value, name, None), Tensor):  # a Linear for its weight, a model's output for its logits
        return f": pass its .{name}"
    first = value
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    if isinstance(first, str):
        return f" of names: number them, {name} are numbers"
    is_array = type(value).__module__ == "numpy"
    return f"; torch.as_tensor({name}) makes one" if is_array or (first is not value and _is(first, Real)) else ""


def check_index_tensor(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} must be int64 or int32, got {value.dtype}")


def check_float_tensor(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on the log-probabilities' device {device}, got {value.device}")


def check_whole_vocabulary(vocab_shard: Any) -> None:
    if vocab_shard is not None:
        raise NotImplementedError(
            "return_metrics must be False where the vocabulary is sharded (vocab_shard, or a DTensor): a rank has no "
            "whole row of logits"
        )


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {value.device}")


def check_weights_device(log_alpha: Tensor, device: torch.device) -> None:
    if log_alpha.device != device:
        raise ValueError(
            f"group_weights must be on the batch's device {device}, got {log_alpha.device}: move the loss to it"
        )


def check_rows_and_labels(
    rows_name: str, rows: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, vocab_size: int | None
) -> None:
    """``rows`` is logits (S,T,V) or hidden (S,T,D), or packed (N,V) / (N,D) with cu_seqlens; labels fit its rows.

    ``vocab_size`` None: not known here, the vocabulary is sharded.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    check_float_tensor(rows_name, rows)
    check_index_tensor("labels", labels)
    want = 3 if cu_seqlens is None else 2
    if rows.dim() != want:
        layout = "(S, T, .) without cu_seqlens" if cu_seqlens is None else "(N, .) with cu_seqlens"
        raise ValueError(f"{rows_name} must have {want} dimensions, {layout}, got shape {tuple(rows.shape)}")
    is_empty_shard = rows_name == "logits" and vocab_size is None
    if rows.shape[-1] == 0 and not is_empty_shard:
        raise ValueError(f"{rows_name} must not have an empty last dimension, got shape {tuple(rows.shape)}")
    if vocab_size == 0:
        raise ValueError(f"weight must have a row for each token of the vocabulary, got shape (0, {rows.shape[-1]})")
    check_one_label_a_row(rows_name, rows, labels)
    check_same_device("labels", labels, rows_name, rows)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, rows_name, rows)
    if vocab_size is not None and debug_checks_on():
        bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocab_size))
        if bad.any():
            value = labels[bad][0].item()
            raise ValueError(f"labels must be {ignore_index} or in [0, {vocab_size}), got {value}")


def check_one_label_a_row(rows_name: str, rows: Tensor, labels: Tensor) -> None:
    if labels.shape != rows.shape[:-1]:
        raise ValueError(
            f"labels must have shape {tuple(rows.shape[:-1])}, one for each row of {rows_name}, "
            f"got {tuple(labels.shape)}"
        )


def _check_cu_seqlens(cu_seqlens: Tensor, rows_name: str, rows: Tensor) -> None:
    check_index_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must have shape (S + 1,) with S >= 1, got {tuple(cu_seqlens.shape)}")
    check_same_device("cu_seqlens", cu_seqlens, rows_name, rows)
    # On a GPU the values are read back only in debug mode; on the CPU looking at them costs nothing.
    readable = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable or debug_checks_on():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != rows.shape[0] or any(b < a for a, b in pairwise(ends)):
            mend = f". {_CUMULATED}" if sum(ends) == rows.shape[0] else ""
            raise ValueError(
                f"cu_seqlens must rise from 0 to {rows.shape[0]}, the number of rows of {rows_name}, got {ends}{mend}"
            )


def check_no_overlap(name: str, value: Tensor) -> None:
    """Memory that several rows share cannot take a gradient for each."""
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"inplace_backward must be False for {name} that were expanded, got strides {value.stride()}")


def check_token_weights(token_weights: Any, labels: Tensor) -> None:
    check_float_tensor("token_weights", token_weights)
    if token_weights.shape != labels.shape:
        raise ValueError(
            f"token_weights must have labels' shape {tuple(labels.shape)}, got {tuple(token_weights.shape)}"
        )
    check_same_device("token_weights", token_weights, "labels", labels)
    if token_weights.requires_grad:
        raise ValueError("token_weights is a constant of the loss: pass token_weights.detach()")


def check_vocab_shard(vocab_shard: Any, columns_name: str, num_columns: int) -> None:
    if vocab_shard.stop - vocab_shard.start != num_columns:
        raise ValueError(
            f"vocab_shard must be as wide as {columns_name}: {num_columns} columns, "
            f"got {vocab_shard.start}:{vocab_shard.stop}"
        )


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden (..., D), weight (V, D), bias (V,) on the same device."""
    check_float_tensor("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    named = [("weight", weight)]
    if bias is not None:
        check_float_tensor("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
        named.append(("bias", bias))
    for name, tensor in named:
        check_same_device(name, tensor, "hidden", hidden)


def check_logit_options(logit_scale: Any, softcap: Any) -> None:
    check_number("logit_scale", logit_scale, -math.inf)
    if logit_scale == 0:
        raise ValueError("logit_scale must not be 0: every token would be as likely")
    if softcap is not None:
        check_number("softcap", softcap, 0.0, open_low=True)


def check_online_reference(ref_hidden: Any, ref_weight: Any, ref_logps: Any, reference_free: bool) -> None:
    if ref_hidden is None or ref_weight is None:
        missing = "ref_hidden" if ref_hidden is None else "ref_weight"
        raise ValueError(f"ref_hidden and ref_weight must be given together, got no {missing}")
    if ref_logps is not None or reference_free:
        other = "reference_free=True" if reference_free else "ref_logps"
        raise ValueError(f"ref_hidden must be None where the reference policy is given by {other}")


def rule_parameter(rule: str, numbers: dict[str, Any], rules: dict[str, Any]) -> float:
    """The one number that the rule takes; the others must be None. ``rules`` is ALPHA_RULES of groups/rules.py.

    Infinity for step_size="auto".
    """
    check_choice("rule", rule, tuple(rules))
    entry = rules[rule]
    known = [other.parameter for other in rules.values()]
    for name, value in numbers.items():
        if name not in known:
            raise TypeError(f"GroupWeights has no option {name!r}; the rules' are {', '.join(known)}")
        if name != entry.parameter and value is not None:
            raise ValueError(f"{name} has no meaning for rule={rule!r}, which takes {entry.parameter}; got {value}")
    value = numbers.get(entry.parameter)
    if value is None:
        raise ValueError(f"{entry.parameter} must be given for rule={rule!r}, got None")
    if isinstance(value, str) and entry.parameter == "step_size":
        if value != "auto":
            raise ValueError(f"step_size must be a number or 'auto', got {value!r}")
        return math.inf
    check_number(entry.parameter, value, entry.low, entry.high, open_low=entry.open_low)
    return float(value)


def baseline(value: Any, num_groups: int) -> Tensor | None:
    """(K,) float64 of the numbers given; None for "running", and where there is none."""
    if value is None:
        return None
    if isinstance(value, str):
        if value != "running":
            raise ValueError(f"baseline must be 'running' or a number for each group, got {value!r}")
        return None
    try:
        numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"baseline must be 'running' or a number for each group, got {value!r}") from error
    if numbers.shape != (num_groups,) or not bool(numbers.isfinite().all()):
        raise ValueError(f"baseline must be {num_groups} finite numbers, one for each group, got {value!r}")
    return numbers.clone()


def inner_tilt(value: Any) -> float:
    """tau; 0.0 where there is none."""
    if value is None:
        return 0.0
    check_number("inner_tilt", value, -math.inf)
    if value == 0:
        raise ValueError(
            "inner_tilt must not be 0: a small positive number is the worst pair, a small negative the best"
        )
    return float(value)


def check_beta(beta: Any, num_pairs: int | None = None, device: torch.device | None = None) -> None:
    """A positive finite number, or one for each pair. A tensor's values are checked in debug mode."""
    if not isinstance(beta, Tensor):
        return check_number("beta", beta, 0.0, open_low=True)
    check_pair_vector("beta", beta, num_pairs, device)
    if debug_checks_on() and not bool((beta > 0).all()):
        raise ValueError(f"beta must be positive for each pair, got {beta.min().item()}")


def check_pair_vector(name: str, value: Any, num_pairs: int | None, device: torch.device | None = None) -> None:
    check_float_tensor(name, value)
    if value.dim() != 1 or (num_pairs is not None and value.shape[0] != num_pairs):
        want = "B" if num_pairs is None else num_pairs
        raise ValueError(f"{name} must have shape ({want},), one for each pair, got {tuple(value.shape)}")
    if device is not None:
        _check_device(name, value, device)
    if value.requires_grad:
        raise ValueError(f"{name} is a constant of the loss: pass {name}.detach()")


def check_pair_losses(pair_losses: Any) -> None:
    check_tensor("pair_losses", pair_losses)
    if pair_losses.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"pair_losses must be float32 or float64, got {pair_losses.dtype}")
    if pair_losses.dim() != 1:
        raise ValueError(f"pair_losses must have shape (B,), got {tuple(pair_losses.shape)}")


def _check_logps_dtype(name: str, value: Any) -> None:
    check_float_tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {value.dtype}, in which -812.3 and -811.9 are the same number. "
            "Keep log-probabilities out of what casts (under FSDP2, MixedPrecisionPolicy(cast_forward_inputs=True) "
            "casts the root's float arguments)"
        )


def check_logps(policy_logps: Tensor, ref_logps: Tensor | None) -> None:
    _check_logps_dtype("policy_logps", policy_logps)
    if policy_logps.dim() != 1 or policy_logps.shape[0] % 2:
        raise ValueError(
            "policy_logps must have shape (2B,), the B chosen sequences first and then the B rejected, "
            f"got {tuple(policy_logps.shape)}"
        )
    check_ref_logps(ref_logps, policy_logps.shape[0], policy_logps.device)


def check_token_counts(token_counts: Any, num_sequences: int, device: torch.device) -> None:
    if token_counts is None:
        raise ValueError("token_counts must be given for losses of means, one for each sequence, got None")
    check_tensor("token_counts", token_counts)
    if token_counts.shape != (num_sequences,):
        raise ValueError(
            f"token_counts must have shape ({num_sequences},), one for each sequence, got {tuple(token_counts.shape)}"
        )
    _check_device("token_counts", token_counts, device)


def check_ref_logps(ref_logps: Tensor | None, num_sequences: int, device: torch.device) -> None:
    if ref_logps is None:
        return
    _check_logps_dtype("ref_logps", ref_logps)
    if ref_logps.shape != (num_sequences,):
        raise ValueError(
            f"ref_logps must have shape ({num_sequences},), one for each sequence, got {tuple(ref_logps.shape)}"
        )
    _check_device("ref_logps", ref_logps, device)
    if ref_logps.requires_grad:
        raise ValueError("ref_logps is a constant of the loss: compute it under torch.no_grad() or detach it")


def check_reference(reference_free: bool, ref_logps: Tensor | None) -> None:
    if reference_free and ref_logps is not None:
        raise ValueError("ref_logps must be None when reference_free=True, got a tensor")
    if not reference_free and ref_logps is None:
        raise ValueError(
            "ref_logps must be given, one for each of the 2B sequences, unless reference_free=True, got None"
        )


def check_group_ids(group_ids: Tensor, num_pairs: int, num_groups: int, device: torch.device) -> None:
    """(B,) ids, or (B, K) float memberships."""
    check_tensor("group_ids", group_ids)
    if group_ids.dim() == 2:
        return _check_memberships(group_ids, num_pairs, num_groups, device)
    check_index_tensor("group_ids", group_ids)
    if group_ids.shape != (num_pairs,):
        raise ValueError(
            f"group_ids must have shape ({num_pairs},), one id for each pair, got {tuple(group_ids.shape)}"
        )
    _check_device("group_ids", group_ids, device)
    if debug_checks_on():
        bad = (group_ids < 0) | (group_ids >= num_groups)
        if bad.any():
            raise ValueError(f"group_ids must be in [0, {num_groups}), got {group_ids[bad][0].item()}")


def _check_memberships(shares: Tensor, num_pairs: int, num_groups: int, device: torch.device) -> None:
    if shares.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"group_ids of shape (B, K) must be float32 or float64 memberships, got {shares.dtype}")
    if shares.shape != (num_pairs, num_groups):
        raise ValueError(
            f"group_ids must have shape ({num_pairs},), one id for each pair, or ({num_pairs}, {num_groups}), its "
            f"share in each group, got {tuple(shares.shape)}"
        )
    _check_device("group_ids", shares, device)
    if debug_checks_on():
        bad = ~((shares >= 0).all(1) & ((shares.double().sum(1) - 1).abs() <= 1e-4))
        if bad.any():
            raise ValueError(f"group_ids must be at least 0 and add up to 1 in each row, got {shares[bad][0].tolist()}")


def check_pair_batch(rows_name: str, rows: Any, cu_seqlens: Any) -> None:
    """An even number of sequences."""
    check_tensor(rows_name, rows)
    if cu_seqlens is None:
        if rows.dim() and rows.shape[0] % 2:
            raise ValueError(
                f"a batch must hold an even number of sequences, chosen first and then rejected, got {rows.shape[0]}"
            )
        return
    check_index_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(
            "cu_seqlens must have shape (2B + 1,), 0 and the ends of the B chosen and the B rejected sequences, got "
            f"{tuple(cu_seqlens.shape)}. {_CUMULATED}"
        )


def group_sizes_tensor(group_sizes: Any, num_groups: int | None) -> Tensor:
    """(K,) int64 from a list or tensor of positive whole numbers."""
    if isinstance(group_sizes, Mapping):
        raise TypeError(
            f"group_sizes must be a list or tensor, the size of group 0, 1, ..., got a {type(group_sizes).__name__}. "
            "Number its keys, use those numbers as group_ids, and pass list(group_sizes.values())"
        )
    try:
        sizes = torch.as_tensor(group_sizes, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"group_sizes must be a list or tensor of whole numbers, got {group_sizes!r}") from error
    if sizes.dim() != 1 or sizes.shape[0] == 0:
        raise ValueError(f"group_sizes must have shape (K,) with K >= 1, got {tuple(sizes.shape)}")
    if sizes.is_floating_point() or sizes.dtype == torch.bool:
        raise TypeError(f"group_sizes must be whole numbers, got {sizes.dtype}")
    if num_groups is not None and sizes.shape[0] != num_groups:
        raise ValueError(f"group_sizes must have num_groups={num_groups} entries, got {sizes.shape[0]}")
    if bool((sizes < 1).any()):
        group = int((sizes < 1).nonzero()[0])
        raise ValueError(f"group_sizes must be at least 1, got {int(sizes[group])} for group {group}")
    return sizes.to(torch.int64, copy=True)


def groups(num_groups: Any, group_sizes: Any, needs_sizes: Sequence[str]) -> tuple[int, Tensor | None]:
    """(K, sizes (K,) int64 on the CPU, or None) from either or both; ``needs_sizes``: options that need sizes."""
    if num_groups is not None:
        if isinstance(num_groups, bool) or not isinstance(num_groups, int):
            raise TypeError(f"num_groups must be an int, got {type(num_groups).__name__}")
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
    if group_sizes is not None:
        sizes = group_sizes_tensor(group_sizes, num_groups)
        return int(sizes.shape[0]), sizes
    if num_groups is None:
        raise ValueError("num_groups or group_sizes must be given, got neither")
    if needs_sizes:
        raise ValueError(f"group_sizes must be given for {needs_sizes[0]}, got None")
    return num_groups, None
