"""Causal architectures of Transformers: log-probabilities and gradients against each model's own logits.

A few here, all of them by ``make test-models``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from grpo_kernels.integrations import transformers as hf

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'grpo-kernels[train]'")
from small_models import NAMES, batch, model_of

FEW = ["bloom", "falcon", "gpt_neox", "gpt_oss", "granitemoe", "llama4_text", "mamba", "mixtral", "mllama", "mpt"]
FEW += ["nanochat", "olmoe", "qwen3_moe", "stablelm", "xglm"]  # other families: test_transformers.py
ALL = os.environ.get("GRPO_KERNELS_ALL_MODELS") == "1"


@pytest.mark.parametrize("name", list(NAMES) if ALL else [name for name in FEW if name in NAMES])
def test_values_and_gradients(name: str) -> None:
    """Both paths; for a model with experts their balancing loss, too. Or an error before training begins."""
    model = or_skip(lambda: model_of(name), f"{name} cannot be built so small")
    inputs = batch()
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    outputs = or_skip(lambda: model(**given, use_cache=False), f"{name} does not run on token ids alone")
    labels = inputs["labels"][:, 1:]
    token_logps = outputs.logits[:, :-1].double().log_softmax(-1)
    token_logps = token_logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    expected = (token_logps * (labels != -100)).sum(1)
    gradients = or_skip(lambda: gradients_of(model, expected), f"{name} has no backward in evaluation mode")
    router = getattr(model.config.get_text_config(), "output_router_logits", None) is not None
    head = hf.head_or_none(model)
    assert ALL or head is not None
    for path in {None, head}:
        model.zero_grad()
        hf.add_sequence_logps(model, path)
        got = model(**inputs, sequence_logps=True)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
        compare(gradients_of(model, got), gradients)
        if not router:
            continue
        asked = {**given, "output_router_logits": True, "use_cache": False}
        its_own = or_skip(lambda asked=asked: model(**asked), f"{name} cannot compute its own balancing loss")
        if not hf.has_balancing_loss(model):
            with pytest.raises(NotImplementedError, match="computes no balancing loss"):
                model(**inputs, sequence_logps=True, output_router_logits=True)
        else:
            logps, aux_loss = model(**inputs, sequence_logps=True, output_router_logits=True)
            torch.testing.assert_close(logps, got, rtol=1e-6, atol=1e-4)
            assert float(aux_loss) == float(its_own.aux_loss.detach()) > 0


def or_skip(its_own: Callable[[], Any], why: str) -> Any:
    """What Transformers itself does, which of some models fails: a reason to skip where all are tried."""
    try:
        return its_own()
    except Exception as error:
        if not ALL:
            raise
        pytest.skip(f"{why}: {error!r}"[:200])


def gradients_of(model: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logps * torch.arange(1.0, 5.0)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To float32's rounding over two layers and 36 positions, relative to the largest of each parameter's gradient or,
    where that is 0 but for rounding, of all."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        scale = max(expected[name].abs().max().item(), 1e-3 * largest)
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-3 * scale, msg=name)
