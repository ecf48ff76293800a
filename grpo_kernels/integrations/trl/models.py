"""The trainer's two models: what they must be, and the reference that is the policy without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils import is_peft_model
from transformers import AutoModelForCausalLM

from grpo_kernels.integrations import transformers as hf
from grpo_kernels.integrations.trl.config import GroupRobustDPOConfig


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


def model_called(name: str, policy: Any, args: GroupRobustDPOConfig) -> Any:
    """A reference by name, loaded as TRL loads the policy."""
    given: Any = args.model_init_kwargs or {}
    dtype = "float32" if isinstance(policy, str) else policy.dtype
    options = {"dtype": dtype, "trust_remote_code": args.trust_remote_code, **given}
    return AutoModelForCausalLM.from_pretrained(name, **options)


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
