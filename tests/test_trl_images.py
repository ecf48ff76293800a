"""GroupRobustDPOTrainer with images: a tiny Llava and its processor, built without downloads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'grpo-kernels[train]'")

import datasets  # noqa: E402
import transformers  # noqa: E402
from trl_cases import SIZES, first_batch, logged, options_of, policy_logps, rows, tokenizer  # noqa: E402

from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer  # noqa: E402

IMAGE, IMAGE_ID, SIDE = "<image>", 258, 8  # four patches an image


class OtherLlava(transformers.LlavaForConditionalGeneration):
    """Does something to images before its base model gets them."""

    def forward(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, pixel_values=None if pixel_values is None else -pixel_values, **kwargs)


def llava(seed: int = 0, kind: Any = transformers.LlavaForConditionalGeneration) -> Any:
    torch.manual_seed(seed)
    sizes = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=SIDE, patch_size=4),
        image_token_id=IMAGE_ID,
    )
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
    return model.eval()


def processor() -> Any:
    reads = tokenizer()
    reads.add_special_tokens({"additional_special_tokens": [IMAGE]})
    assert reads.convert_tokens_to_ids(IMAGE) == IMAGE_ID
    without_torchvision = getattr(transformers, "LlavaImageProcessorPil", None) or transformers.LlavaImageProcessor
    images = without_torchvision(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return transformers.LlavaProcessor(
        images, reads, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def pairs(groups: list[str], colours: Any = lambda pair: (30 * pair, 250 - 30 * pair, 90)) -> Any:
    each = rows(groups)
    for number, pair in enumerate(each):
        pair["prompt"] = IMAGE + pair["prompt"]
        pair["images"] = [pillow.new("RGB", (SIDE + 1, SIDE), colours(number))]
    return datasets.Dataset.from_list(each)


def trainer(model: Any = None, reference: Any = None, data: Any = None, **options: Any) -> GroupRobustDPOTrainer:
    return GroupRobustDPOTrainer(
        llava() if model is None else model,
        llava(1) if reference is None else reference,
        GroupRobustDPOConfig(**options_of(**options)),
        train_dataset=pairs(["all"] * 8) if data is None else data,
        eval_dataset=pairs(["all"] * 4) if options.get("eval_strategy") else None,
        processing_class=processor(),
    )


def test_one_group_is_trl() -> None:
    """Two steps and two evaluations, on both paths."""
    data, every = pairs(["all"] * 8), {"eval_strategy": "steps", "eval_steps": 1}
    args = trl.DPOConfig(**options_of(**every))
    given = {"train_dataset": data, "eval_dataset": pairs(["all"] * 4), "processing_class": processor()}
    theirs = trl.DPOTrainer(llava(), llava(1), args, **given)
    theirs.train()
    for fused_linear in (True, False):
        ours = trainer(fused_linear=fused_linear, **every)
        assert (ours._head is not None) is fused_linear
        ours.train()
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/margins", "num_tokens", "eval_loss"):
            assert len(logged(ours, name)) == 2
            assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-5, abs=1e-5), name
        for mine, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [transformers.LlavaForConditionalGeneration, OtherLlava])
def test_logps_are_those_of_the_model_s_own_logits(kind: Any) -> None:
    of = trainer(llava(0, kind), fused_linear=True, data=pairs(["a", "b", "b"]))
    batch = first_batch(of)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        logits = of.model(**inputs).logits
        others = of.model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    answers = batch["completion_mask"][:, 1:]

    def logps_of(logits: torch.Tensor) -> torch.Tensor:
        each = logits[:, :-1].double().log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (each * answers).sum(1)

    got, wanted = policy_logps(of, of.model, batch).detach(), logps_of(logits)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (logps_of(others) - wanted).abs().max() > 1e-3, "the images matter"


def test_streamed_and_single_images() -> None:
    data = pairs(["a", "b"] * 2)
    of = trainer(data=data)
    wanted = of.evaluate(data)["eval_loss"]
    single = data.map(lambda pair: {"image": pair["images"][0]}, remove_columns="images")
    for same in (single, data.with_format("torch"), data.to_iterable_dataset()):
        assert of.evaluate(same)["eval_loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_reference_by_name(tmp_path: Path) -> None:
    llava(1).save_pretrained(tmp_path)
    data = pairs(["a", "b"])
    named, ready = (trainer(reference=reference, data=data) for reference in (str(tmp_path), None))
    assert named.evaluate(data)["eval_loss"] == pytest.approx(ready.evaluate(data)["eval_loss"], rel=1e-6)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"max_length must leave a prompt its images' tokens, got 3"):
        trainer(max_length=3).train()
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True` is not supported for vision datasets"):
        trainer(precompute_ref_log_probs=True)
