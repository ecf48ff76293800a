"""From causal language models to log-probabilities: many families, one way, without logits."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from small_models import batch
from small_models import model_of as small_model_of

import grpo_kernels as gk
from grpo_kernels.integrations import transformers as hf

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'grpo-kernels[train]'"
)

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"word_embed_proj_dim": 16, "ffn_dim": 24}
FAMILIES = {  # name: (options, expected head)
    "Llama": ({}, hf.Head()),
    "Mistral": ({}, hf.Head()),
    "Qwen2": ({"tie_word_embeddings": True}, hf.Head()),
    "Qwen3": ({"tie_word_embeddings": False}, hf.Head()),
    "Phi": ({}, hf.Head()),  # its head has a bias
    "Gemma": ({}, hf.Head()),
    "Gemma2": ({"final_logit_softcapping": 5.0}, hf.Head(softcap=5.0)),
    "Cohere": ({"logit_scale": 0.25}, hf.Head(scale=0.25)),
    "Granite": ({"logits_scaling": 8.0}, hf.Head(scale=0.125)),  # divides by it
    "GPT2": ({}, hf.Head()),
    "OPT": (OPT, hf.Head()),
}


# The same hidden states to the bit, then sums of 16 products and of 60 exponentials in float64, up to 100 in size.
EXACT = {"rtol": 0, "atol": 100 * 60 * 2**-50}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    options = GPT2 if family == "GPT2" else {**SIZES, **FAMILIES[family][0]}
    model_config = getattr(transformers, f"{family}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(model_config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):  # as large as a trained model's
                parameter.normal_(std=0.4)
    return model.train()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_head_is_found(family: str) -> None:
    model = model_of(family)
    assert hf.find_head(model) == FAMILIES[family][1]
    assert model.training
    assert not model.get_output_embeddings()._forward_hooks


@pytest.mark.parametrize("family", list(FAMILIES))
def test_hidden_and_head_make_the_logits(family: str) -> None:
    model = model_of(family, torch.float64).eval()
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    hidden, weight, bias, head = hf.hidden_and_head(model, hf.find_head(model), **inputs)
    made = head.of(torch.nn.functional.linear(hidden, weight, bias))
    expected = model(**inputs).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(made, expected, **EXACT)
    tied = model.get_input_embeddings().weight is weight
    assert tied is bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_both_paths_give_the_model_s_own_log_probabilities(family: str) -> None:
    """Values and the gradient of every parameter, against the model's logits in eager PyTorch."""
    model = model_of(family, torch.float64).eval()
    inputs = batch()
    labels = inputs["labels"]
    logps = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != -100
    expected = (logps.gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1) * counted).sum(1)
    (expected * torch.arange(1.0, 5.0)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values() if gradient is not None)
    for head in (None, hf.find_head(model)):
        model.zero_grad()
        hf.add_sequence_logps(model, head)
        got = model(**inputs, sequence_logps=True)
        torch.testing.assert_close(got, expected, **EXACT)
        (got * torch.arange(1.0, 5.0)).sum().backward()
        for name, parameter in model.named_parameters():
            if gradients[name] is None:
                continue
            # Norms compute in float32 in every dtype: a difference of 1e-16 may round the other way, by 2**-23, in each
            # of at most four norms on the way back, in a sum of 28 rows.
            rounding = 4 * 28 * 2**-23 * largest
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=rounding, msg=name)


def test_without_the_flag_the_forward_is_as_before() -> None:
    model, inputs = model_of("Llama"), batch()
    before = model(**inputs)
    signature = inspect.signature(model.forward)
    hf.add_sequence_logps(model, hf.Head())
    hf.add_sequence_logps(model, hf.Head())
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert inspect.signature(model.forward) == signature
    assert not hasattr(model.forward.plain_forward, "plain_forward"), "twice is not twice around"


def test_no_logits_on_the_linear_path() -> None:
    model = model_of("Llama")
    hf.add_sequence_logps(model, hf.find_head(model))

    def fail(*_: Any) -> None:
        raise AssertionError("the head was run")

    model.get_output_embeddings().register_forward_hook(fail)
    assert model(**batch(), sequence_logps=True).shape == (4,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Cohere", "Granite"])
def test_head_is_found_in_other_dtypes(family: str, dtype: torch.dtype) -> None:
    assert hf.find_head(model_of(family, dtype)) == FAMILIES[family][1]


def test_what_is_refused() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=60, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    )
    for function in (hf.find_head, lambda model: hf.add_sequence_logps(model, None)):
        with pytest.raises(ValueError, match=r"must be a causal .* got T5ForConditionalGeneration, an encoder-decoder"):
            function(t5)
    with pytest.raises(ValueError, match=r"must have a language-model head, got LlamaModel"):
        hf.find_head(model_of("Llama").model)

    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1
            return out

    with pytest.raises(NotImplementedError, match=r"Shifted changes its logits in a way that its config does not say"):
        hf.find_head(Shifted(model_of("Llama").config))

    model = model_of("Llama")
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] / 2,))
    with pytest.raises(NotImplementedError, match=r"does not read its last hidden states"):
        hf.find_head(model)


class Doubled(torch.nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(rows)


def test_a_head_that_is_more_than_its_matrix_takes_the_logits_path() -> None:
    """An untrained LoRA changes no logits yet, but will."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model_of("Qwen3"), lora).get_base_model()
    with pytest.raises(NotImplementedError, match=r"the head of Qwen3ForCausalLM is no plain matrix"):
        hf.find_head(adapted)
    model = model_of("Llama")
    model.lm_head = Doubled(16, 60, bias=False)
    with pytest.raises(NotImplementedError, match=r"the head of LlamaForCausalLM is more than its matrix"):
        hf.find_head(model)
    in_float32 = model_of("Llama").to(torch.bfloat16)
    in_float32.lm_head.float().register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    with pytest.raises(NotImplementedError, match=r"the head of LlamaForCausalLM does not read its last hidden states"):
        hf.find_head(in_float32)


def test_an_optimizer_made_after_find_head_has_the_shards(tmp_path: Path) -> None:
    """find_head runs a forward, which alone leaves FSDP2's root gathered, and its parameters no shards."""
    fsdp2 = pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for look in (hf.find_head, hf.has_balancing_loss):
            model = model_of("Llama")
            fsdp2.fully_shard(model, mesh=mesh)
            look(model)
            assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["linear", "logits", "experts"])
def test_a_wrapped_forward_is_entered_once(way: str) -> None:
    """Accelerate puts one autocast object around the forward: entered again inside, it would stay on for ever."""
    operations = pytest.importorskip("accelerate.utils.operations", reason="accelerate is not installed")
    model = small_model_of("qwen3_moe") if way == "experts" else model_of("Llama")
    experts = {"output_router_logits": True} if way == "experts" else {}
    hf.add_sequence_logps(model, None if way == "logits" else hf.find_head(model))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch(), sequence_logps=True, **experts)
    wrapped = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(operations.convert_outputs_to_fp32(wrapped), model)  # as accelerate does
    found = model(**batch(), sequence_logps=True, **experts)
    assert not torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("linear", [True, False])
def test_a_copy_computes_with_its_own_parameters(linear: bool) -> None:
    model = model_of("Llama").eval()
    hf.add_sequence_logps(model, hf.find_head(model) if linear else None)
    twin = copy.deepcopy(model)
    before = model(**batch(), sequence_logps=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(twin(**batch(), sequence_logps=True), before)
    assert not torch.allclose(model(**batch(), sequence_logps=True), before)


@pytest.mark.parametrize("family", ["Phi", "Gemma2", "Granite"])
@pytest.mark.parametrize("linear", [True, False])
def test_a_loss_inside_the_forward_is_the_one_outside(family: str, linear: bool) -> None:
    """Everything that comes back, and the gradient of every parameter."""
    model = model_of(family, torch.float64).eval()
    head = hf.find_head(model)
    hf.add_sequence_logps(model, head if linear else None)
    of_head = {"logit_scale": head.scale, "softcap": head.softcap} if linear else {}
    ids, ref, margin = torch.tensor([1, 0]), torch.randn(4), torch.tensor([0.5, 0.0])
    outputs, gradients = [], []
    for inside in (True, False):
        groups = gk.GroupWeights(group_sizes=[3, 1], step_size=0.5)
        if inside:
            cls = gk.LinearGroupRobustLoss if linear else gk.GroupRobustLoss
            loss = hf.LossOfPairs(cls(groups, beta=0.5, shift_labels=True, **of_head), ids, ref, margin=margin)
            found = model(**batch(), loss_of_pairs=loss)
            assert found.loss is found.output.loss
            out = found.output
        else:
            logps = model(**batch(), sequence_logps=True)
            out = gk.GroupRobustLoss(groups, beta=0.5).from_logps(logps, ids, ref, margin=margin)
        model.zero_grad()
        out.loss.backward()
        outputs.append(out)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, one, other in zip(out._fields, *outputs, strict=True):
        torch.testing.assert_close(one, other, msg=name, **EXACT)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-9, msg=name)


def test_a_loss_of_another_path_or_head_is_refused() -> None:
    groups, ids = gk.GroupWeights(num_groups=1, estimator="group_mean", step_size=0.1), torch.tensor([0, 0])
    on_logits, on_hidden = (
        hf.LossOfPairs(cls(groups, reference_free=True, shift_labels=True), ids)
        for cls in (gk.GroupRobustLoss, gk.LinearGroupRobustLoss)
    )
    model = model_of("Granite")
    hf.add_sequence_logps(model, None)
    with pytest.raises(TypeError, match="must be a GroupRobustLoss on the logits path, got LinearGroupRobustLoss"):
        model(**batch(), loss_of_pairs=on_hidden)
    hf.add_sequence_logps(model, hf.find_head(model))
    with pytest.raises(TypeError, match="must be a LinearGroupRobustLoss on the linear path, got GroupRobustLoss"):
        model(**batch(), loss_of_pairs=on_logits)
    with pytest.raises(ValueError, match=r"the model's logit_scale=0.125 and softcap=None, got 1.0 and None"):
        model(**batch(), loss_of_pairs=on_hidden)


def test_the_loss_learns_through_it() -> None:
    """The whole way: a model, a batch of pairs, group weights."""
    model = model_of("Qwen2")
    reference = copy.deepcopy(model)
    for each in (model, reference):
        hf.add_sequence_logps(each, hf.find_head(each))
    weights = gk.GroupWeights(group_sizes=[3, 1], step_size=0.5)
    loss_fn = gk.GroupRobustLoss(weights, beta=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        ref_logps = reference(**batch(), sequence_logps=True)
    losses = []
    for _ in range(5):
        out = loss_fn.from_logps(model(**batch(), sequence_logps=True), torch.tensor([0, 1]), ref_logps)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.pair_losses.max().item())
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5
