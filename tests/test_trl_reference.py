"""Reference and policy of GroupRobustDPOTrainer: other families, heads, dtypes, vocabularies; adapters around heads."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

from trl_cases import first_batch, llama, logps_of_logits, model_of, policy_logps, trainer  # noqa: E402

from grpo_kernels.integrations.trl import models  # noqa: E402

REFERENCES: dict[str, tuple[Any, Any]] = {  # policy, reference: (family, options)
    "another scale": (("Granite", {"logits_scaling": 8.0}), ("Granite", {"logits_scaling": 16.0})),
    "another softcap": (("Gemma2", {"final_logit_softcapping": 5.0}), ("Gemma2", {"final_logit_softcapping": 30.0})),
    "no softcap": (("Gemma2", {"final_logit_softcapping": 2.0}), ("Gemma2", {"final_logit_softcapping": None})),
    "another family": (("Cohere", {"logit_scale": 0.25}), ("Llama", {})),
    "a bias": (("Llama", {}), ("Phi", {})),
    "a tied head": (("Qwen2", {"tie_word_embeddings": False}), ("Qwen2", {"tie_word_embeddings": True})),
    "more embeddings": (("Llama", {}), ("Llama", {"vocab_size": 320})),
    "no plain head": (("Llama", {}), ("ModernBertDecoder", {"bos_token_id": 2})),
}


@pytest.mark.parametrize("kind", list(REFERENCES))
@pytest.mark.parametrize("fused_linear", [None, False])
def test_each_model_has_its_own_head(kind: str, fused_linear: bool | None) -> None:
    """Log-probabilities of both, against the logits of each in eager PyTorch."""
    (family, options), (ref_family, ref_options) = REFERENCES[kind]
    policy, reference = model_of(family, 0, **options), model_of(ref_family, 1, **ref_options)
    of = trainer(policy, reference, fused_linear=fused_linear)
    batch = first_batch(of)
    expected, ref_expected = (logps_of_logits(model, batch) for model in (policy, reference))
    assert (expected - ref_expected).abs().max() > 0.3
    with torch.no_grad():
        torch.testing.assert_close(policy_logps(of, policy, batch), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(of._reference_logps(reference, batch).double(), ref_expected, rtol=1e-5, atol=1e-3)
    ready = trainer(policy, reference, fused_linear=fused_linear, precompute_ref_log_probs=True)
    batch = first_batch(ready)
    got = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double()
    torch.testing.assert_close(got, ref_expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_reference_of_another_dtype(dtype: torch.dtype) -> None:
    """In float32, from its own hidden states; those of its half-precision logits are one rounding each off."""
    reference = model_of("Granite", 1, logits_scaling=16.0).to(dtype)
    of = trainer(model_of("Granite", 0, logits_scaling=8.0), reference)
    batch = first_batch(of)
    got = of._reference_logps(reference, batch)
    largest = 20.0  # of a logit
    tolerance = batch["input_ids"].shape[1] * largest * torch.finfo(dtype).eps + 1e-3
    torch.testing.assert_close(got.double(), logps_of_logits(reference, batch), rtol=0, atol=tolerance)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_reference_by_name(tmp_path: Path) -> None:
    """A directory, of another head than the policy's, which is given by name or ready."""
    model_of("Granite", 0, logits_scaling=8.0).save_pretrained(tmp_path / "policy")
    reference = model_of("Granite", 1, logits_scaling=16.0)
    reference.save_pretrained(tmp_path / "reference")
    for policy in (str(tmp_path / "policy"), model_of("Granite", 0, logits_scaling=8.0)):
        of = trainer(policy, str(tmp_path / "reference"))
        batch = first_batch(of)
        torch.testing.assert_close(of._reference_logps(of.ref_model, batch).double(), logps_of_logits(reference, batch))
    of = trainer(str(tmp_path / "policy"), None)  # TRL loads the policy's name once more
    expected = logps_of_logits(model_of("Granite", 0, logits_scaling=8.0), batch)
    torch.testing.assert_close(of._reference_logps(of.ref_model, batch).double(), expected)


def test_a_reference_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"ref_model must be given: model was not loaded by a name"):
        trainer(reference=None)
    with pytest.raises(ValueError, match=r"it has 257 embeddings, the tokenizer 258 tokens"):
        trainer(reference=model_of("Llama", 1, vocab_size=257))
    base = llama()
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"ref_model must have parameters of its own, it shares some"):
        trainer(adapted, base)
    with pytest.raises(ValueError, match=r"model_init_kwargs must be left out, nothing is loaded by name"):
        trainer(model_init_kwargs={"dtype": "bfloat16"})
    for reference, count in (
        (model_of("Phi", 1), 20),
        (model_of("Llama", 1, intermediate_size=32, tie_word_embeddings=True), 3),
    ):
        with pytest.raises(ValueError, match=rf"sync_ref_model must be False where ref_model .* \({count} in all\)"):
            trainer(reference=reference, sync_ref_model=True)
    with pytest.raises(ValueError, match=r"ref_model must be a model's name or directory, got '/no/such/model': "):
        trainer(reference="/no/such/model")
    import transformers

    t5 = transformers.T5Config(vocab_size=300, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"got T5ForConditionalGeneration, an encoder-decoder"):
        trainer(reference=transformers.T5ForConditionalGeneration(t5))


ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {  # options of the model, of LoRA; linear path?
    "frozen head": ({}, {"target_modules": ["q_proj"]}, True),
    "tied head": ({"tie_word_embeddings": True}, {"target_modules": ["q_proj"]}, True),
    "whole head": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "embeddings": ({}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "tokens": ({}, {"target_modules": ["q_proj"], "trainable_token_indices": [65, 66]}, True),
    "tied tokens": (
        {"tie_word_embeddings": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [65, 66]},
        False,
    ),
    "all layers": ({}, {"target_modules": "all-linear"}, True),
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_an_adapter_is_switched_off_for_the_reference(kind: str) -> None:
    model_options, lora_options, linear = ADAPTERS[kind]
    model = model_of("Llama", 0, **{"tie_word_embeddings": False, **model_options})
    plain = copy.deepcopy(model)
    lora = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **lora_options)
    of = trainer(model, None, peft_config=lora, learning_rate=5.0)
    assert (of._head is not None) is linear
    of.train()
    batch = first_batch(of)
    base, of.model = logps_of_logits(plain, batch), of.model.eval()
    torch.testing.assert_close(of._reference_logps(of.model, batch).double(), base, rtol=1e-5, atol=1e-3)
    with torch.no_grad():
        got = policy_logps(of, of.model, batch)
    torch.testing.assert_close(got, logps_of_logits(of.model, batch), rtol=1e-5, atol=1e-3)
    assert (got - base).abs().max() > 0.01, "it has learned"


def lora(model: Any = None, name: str = "default", **options: Any) -> Any:
    base = model_of("Llama", 0, tie_word_embeddings=False) if model is None else model
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], **options)
    return peft.get_peft_model(base, config, adapter_name=name)


def test_the_adapter_that_is_trained_is_the_one_that_is_copied() -> None:
    """TRL's reference is a copy of "default", whichever is active."""
    two = lora(init_lora_weights=False)
    two.add_adapter("second", two.peft_config["default"])
    two.set_adapter("second")
    for model, name in ((two, "second"), (lora(name="mine"), "mine")):
        with pytest.raises(ValueError, match=rf"model must train the adapter 'default', .* got \['{name}'\]"):
            trainer(model, None)
    trainer(two, llama(1)).train()


def test_a_reference_without_the_adapter_stays_where_it_is() -> None:
    """Biases and other parameters of the base that are trained stay when the adapter is switched off."""
    phi = model_of("Phi", 0, tie_word_embeddings=False)
    biases = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all")
    with pytest.raises(ValueError, match=r"model must train nothing but its adapter .* got \['base_model.*bias'"):
        trainer(phi, None, peft_config=biases)
    norm = lora()
    norm.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"got \['base_model.model.model.norm.weight'\] \(1 in all\)"):
        trainer(norm, None)
    trainer(norm, llama(1))
    again = lora()
    again.base_model.model.model.norm.weight.requires_grad_(True)
    trainer(again, None, precompute_ref_log_probs=True)


def test_parameters_of_an_adapter_may_have_its_kind_in_their_names_alone() -> None:
    """X-LoRA's classifier, in a stand-in: the model itself is made of adapters in files."""
    model = torch.nn.ModuleDict({"internal_xlora_classifier": torch.nn.Linear(2, 2)})
    model.base_model, model.peft_config = torch.nn.Module(), {"default": None}
    model.base_model.prefix = "xlora_"
    models.check_base_is_frozen(model)
    model["head"] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got \['head.weight', 'head.bias'\] \(2 in all\)"):
        models.check_base_is_frozen(model)


def test_an_adapter_on_the_head_is_trl_s_error() -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"adapter to `lm_head` is not supported"):
        trainer(peft.get_peft_model(model_of("Llama", 0, tie_word_embeddings=False), lora), None)
