"""The trainer's two models: what they must be, the loss inside the policy, and the reference without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.utils import create_model_from_path

from grpo_kernels.groups.weights import GroupWeights
from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl.config import GroupRobustDPOConfig
from grpo_kernels.losses import GroupRobustLoss, LinearGroupRobustLoss
from grpo_kernels.types import IGNORE_INDEX, GroupRobustOutput, PairOptions, TokenMetrics


def name_of(model: Any) -> str:
    """The last part of its name or directory, for a folder to write to."""
    return str(model if isinstance(model, str) else model.config._name_or_path).rstrip("/").split("/")[-1]


def check_reference_is_known(model: Any, ref_model: Any, args: GroupRobustDPOConfig, peft_config: Any) -> None:
    """Before TRL tries to load it. A model that was built from a config alone has no name to load it by."""
    loads = ref_model is None and peft_config is None and not is_peft_model(model)
    loads = loads and not args.precompute_ref_log_probs
    if loads and not model.config._name_or_path:
        raise ValueError(
            "ref_model must be given: model was not loaded by a name or directory, from which to load it again. Or "
            "take model as it is at the start, precompute_ref_log_probs=True"
        )
    if args.model_init_kwargs and not loads and not isinstance(ref_model, str):
        raise ValueError(f"model_init_kwargs must be left out, nothing is loaded by name, got {args.model_init_kwargs}")


def check_adapters(model: Any) -> None:
    """Of a PEFT model without a ``ref_model``: TRL copies its adapter "default" to "ref", whichever is active.

    Raises:
        ValueError: another adapter is trained than the one that is copied.
    """
    active = list(model.active_adapters)
    if active != ["default"]:
        raise ValueError(
            f"model must train the adapter 'default', which TRL copies for the reference, got {active} of "
            f"{sorted(model.peft_config)}: load it under that name, or give ref_model"
        )


def check_base_is_frozen(model: Any) -> None:
    """Of a PEFT model that is its own reference at each step.

    Raises:
        ValueError: parameters outside the adapter are trained, as with LoRA's bias="all": the reference would move.
    """
    prefix = getattr(model.base_model, "prefix", None)
    of_adapter = [f".{name}." for name in model.peft_config] + ([prefix] if prefix else [])
    moving = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in f"{name}." for part in of_adapter)
    ]
    if moving:
        raise ValueError(
            f"model must train nothing but its adapter where it is the reference without it, got {moving[:3]} "
            f"({len(moving)} in all): give ref_model, or take precompute_ref_log_probs=True"
        )


def model_called(name: str, policy: Any, args: GroupRobustDPOConfig) -> Any:
    """A reference by name, loaded as TRL loads the policy.

    Raises:
        ValueError: there is no such model.
    """
    given: Any = args.model_init_kwargs or {}
    dtype = "float32" if isinstance(policy, str) else policy.dtype
    options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code, "device_map": None, **given}
    try:
        return create_model_from_path(name, **options)
    except (OSError, ValueError) as error:  # Transformers'
        raise ValueError(f"ref_model must be a model's name or directory, got {name!r}: {error}") from error


def check_reference(policy: Any, reference: Any, tokenizer: Any) -> None:
    """
    Raises:
        ValueError: it is no causal language model, shares parameters that are trained, or lacks an embedding for a
            token that the policy reads.
    """
    hf.check_causal(reference)
    frozen = {id(parameter) for parameter in reference.parameters()}
    if any(parameter.requires_grad and id(parameter) in frozen for parameter in policy.parameters()):
        raise ValueError(
            "ref_model must have parameters of its own, it shares some that are trained with model: leave it out (with "
            "an adapter the model without it is the reference) or load it again"
        )
    sizes = [model.get_input_embeddings().weight.shape[0] for model in (policy, reference)]
    if min(sizes) > 0 and sizes[1] < min(len(tokenizer), sizes[0]):  # 0: sharded
        raise ValueError(
            f"ref_model must read the tokens of model: it has {sizes[1]} embeddings, the tokenizer {len(tokenizer)} "
            "tokens"
        )


def check_can_follow(policy: Any, reference: Any) -> None:
    """
    Raises:
        ValueError: sync_ref_model would mix the parameters of unlike models, which TRL takes by their order alone.
    """
    own, theirs = ({name: tuple(x.shape) for name, x in model.named_parameters()} for model in (policy, reference))
    differ = sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
    if differ and not (is_sharded(policy) or is_sharded(reference)):
        raise ValueError(
            f"sync_ref_model must be False where ref_model has other parameters than model: {differ[:3]} "
            f"({len(differ)} in all)"
        )


def is_sharded(model: Any) -> bool:
    """Whether its parameters are elsewhere: ZeRO-3 or FSDP."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in model.parameters())


def made_alike(policy: Any, reference: Any) -> bool:
    """Whether the reference, sharded already, has the head that was found of the policy."""
    same = type(reference).__name__.endswith(type(policy).__name__) and (
        policy.config.to_diff_dict() == reference.config.to_diff_dict()
    )
    return is_sharded(reference) and not is_sharded(policy) and same


def causal_model(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """A PEFT model as its reference: the adapter "ref" where TRL has put a copy, else none."""
    if "ref" not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter("ref")
    try:
        yield
    finally:
        model.set_adapter(active)


def loss_for(
    head: hf.Head | None, group_weights: GroupWeights, args: GroupRobustDPOConfig
) -> GroupRobustLoss | LinearGroupRobustLoss:
    """The loss of the policy's path; see `hf.LossOfPairs`."""
    options: dict[str, Any] = {
        "beta": args.beta,
        "loss_type": args.loss_type,
        "label_smoothing": args.label_smoothing,
        "shift_labels": True,
        "backend": args.backend,
        "alpha_follows": args.alpha_follows,
        **args.spec_options(),
    }
    if head is None:
        args.check_logits_path()
        return GroupRobustLoss(group_weights, inplace_backward=True, **options)
    of_head: dict[str, Any] = {"logit_scale": head.scale, "softcap": head.softcap}
    of_head |= {"plan": args.linear_plan, "max_extra_bytes": args.linear_bytes}
    return LinearGroupRobustLoss(group_weights, **of_head, **options)


@contextlib.contextmanager
def naming_max_length(max_length: int | None) -> Iterator[None]:
    """What a model says of images whose tokens were cut off, with the option that has cut them."""
    try:
        yield
    except ValueError as error:
        if max_length is None or "Image features and image tokens do not match" not in str(error):
            raise
        raise ValueError(f"max_length must leave a prompt its images' tokens, got {max_length}: {error}") from error


def answer_lengths(labels: Tensor) -> Tensor:
    """(2B,) tokens as TRL counts them: an answer's first also where it is the sequence's, which nothing predicts."""
    return (labels != IGNORE_INDEX).sum(1).clamp(min=1)


def counted(labels: Tensor) -> Tensor:
    """(2B, T), 1 at the answers' tokens that something predicts: not at a sequence's first."""
    return torch.cat([torch.zeros_like(labels[:, :1]), (labels[:, 1:] != IGNORE_INDEX).to(labels.dtype)], dim=1)


def ld_weights(labels: Tensor, ld_alpha: float) -> Tensor:
    """(2B, T): 1 up to the length of a pair's shorter answer, then ``ld_alpha`` (LD-DPO)."""
    of_answers = counted(labels)
    shared = of_answers.sum(1).view(2, -1).amin(0).repeat(2).unsqueeze(1)
    return torch.where(of_answers.cumsum(1) <= shared, 1.0, ld_alpha)


class PairsOfTrl(hf.LossOfPairs):
    """With what TRL weighs: tokens by the answers' lengths, as it counts them, and pairs by their likelihood (WPO)."""

    def __init__(self, args: GroupRobustDPOConfig, *of_batch: Any, **options: Any) -> None:
        super().__init__(*of_batch, **options)
        self.averages, self.ld_alpha, self.is_wpo = bool(args.average_log_prob), args.ld_alpha, args.use_weighting
        self.with_metrics = args.use_weighting or args.log_token_metrics

    def options_for(self, labels: Tensor) -> PairOptions:
        options, lengths, weights = self.options.copy(), answer_lengths(labels), None
        if self.loss_fn.spec.uses_counts:
            options["token_counts"] = lengths
        if self.ld_alpha is not None:
            weights = ld_weights(labels, self.ld_alpha)
        if self.averages:
            each = (1 / lengths.double()).unsqueeze(1)
            weights = each.expand(labels.shape) if weights is None else weights * each
        if weights is not None:
            options["token_weights"] = weights
        return options

    def of(self, rows: Any, labels: Tensor) -> tuple[GroupRobustOutput, TokenMetrics | None]:
        """With metrics, which WPO's weights are made of, the log-probabilities come before the loss."""
        if not self.with_metrics:
            return super().of(rows, labels)
        self.check(rows)
        loss_fn, options = self.loss_fn, dict[str, Any](self.options_for(labels))
        of_rows = {"token_weights": options.pop("token_weights", None), "shift_labels": True}
        budget: Any = getattr(loss_fn, "budget", None)
        of_linear = {} if budget is None else {"plan": budget.plan, "max_extra_bytes": budget.max_extra_bytes}
        logps, metrics = hf.logps_of(rows, labels, True, of_linear, backend=loss_fn.backend, **of_rows)
        if self.is_wpo:
            sums = logps.detach() * answer_lengths(labels) if self.averages else logps.detach()
            options["weights"] = options.get("weights", 1.0) * _wpo_weights(sums, metrics, labels)
        return loss_fn.from_logps(logps, self.group_ids, self.ref_logps, **options), metrics


def _wpo_weights(logps: Tensor, metrics: TokenMetrics, labels: Tensor) -> Tensor:
    """(B,): the likelihood a token of both answers over that of what the policy draws itself (WPO, as TRL has it)."""
    aligned = logps - metrics.log_sum_sq_probs.sum(1)
    return (aligned / counted(labels).sum(1).clamp(min=1)).view(2, -1).sum(0).exp()
