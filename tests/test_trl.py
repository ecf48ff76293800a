"""GroupRobustDPOTrainer in one process: against TRL's own DPOTrainer, over a stop, and its errors."""

from __future__ import annotations

import copy
import os
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'grpo-kernels[trl]'")
peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")

import trl_cases  # noqa: E402
from trl_exact import (  # noqa: E402
    AS_TRL,
    AS_TRL_LOGS,
    EXACT,
    GROUPS,
    LOGGED,
    assert_same,
    config,
    gpt2,
    llama,
    pairs,
    parameters,
    shaken,
    steps,
    tokenizer,
    trainer,
)

from grpo_kernels.integrations import transformers as hf  # noqa: E402
from grpo_kernels.integrations.trl import GroupRobustDPOTrainer, check_version  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "robust"])
def test_one_group_is_trl(tmp_path: Path, loss_type: str) -> None:
    """8 steps, on both paths. IPO's log-probabilities are averaged over tokens by both."""
    options = {"loss_type": loss_type, "max_steps": 8, "beta": 0.3, "max_length": 14, "eval_strategy": "epoch"}
    options |= {"label_smoothing": 0.1} if loss_type == "robust" else {}
    data = pairs().map(lambda _: {"group": "all"})
    theirs = trl.DPOTrainer(
        model=gpt2(),
        ref_model=shaken(gpt2()),
        args=config(tmp_path / "theirs", trl.DPOConfig, **options),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )
    theirs.train()
    names = ["loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"]
    names += ["rewards/margins", "rewards/accuracies"]
    for fused_linear in (True, False):
        ours = trainer(tmp_path / "ours", data=data, eval_data=data, fused_linear=fused_linear, **options)
        assert (ours._head is not None) is fused_linear
        ours.train()
        for name in [*names, "num_tokens", "eval_loss", *(f"eval_{name}" for name in names[2:])]:
            mine = steps(ours, name)
            assert len(mine) == 8 if "eval_" not in name else len(mine) == 2
            assert mine == pytest.approx(steps(theirs, name), rel=AS_TRL_LOGS, abs=AS_TRL_LOGS), name
        assert_same(parameters(ours), parameters(theirs), AS_TRL)


def test_two_lines_are_enough(tmp_path: Path) -> None:
    """AdamW, bfloat16 and gradient checkpointing as TRL has them by default; alpha goes to the worst group."""
    of = trainer(tmp_path, optim="adamw_torch", gradient_checkpointing=True, bf16=True, eval_data=pairs(8, 100))
    of.train()
    last = of.evaluate()
    alphas = [last[f"eval_groups/{name}/alpha"] for name in ("other", "rare", "usual")]
    assert of.group_names == ["other", "rare", "usual"]
    assert of.group_weights.group_sizes.tolist() == [6, 6, 12]
    assert alphas == pytest.approx(of.group_weights.alpha.tolist())
    assert sum(alphas) == pytest.approx(1)
    assert max(alphas) > 0.35
    counts = [last[f"eval_groups/{name}/count"] for name in of.group_names]
    assert counts == [2, 2, 4]
    losses = [last[f"eval_groups/{name}/loss"] for name in of.group_names]
    assert last["eval_groups/worst_loss"] == max(losses) > min(losses)


def test_group_metrics_are_those_of_the_groups(tmp_path: Path) -> None:
    """Against evaluations of each group's pairs alone."""
    of = trainer(tmp_path, eval_data=pairs(8, 100))
    together = of.evaluate()
    for number, name in enumerate(GROUPS):
        if name == "usual":
            continue
        alone = of.evaluate(pairs(8, 100).select([number, number + 4]), metric_key_prefix="eval_alone")
        assert together[f"eval_groups/{name}/loss"] == pytest.approx(alone[f"eval_alone_groups/{name}/loss"], rel=1e-6)
        assert alone["eval_alone_groups/worst_loss"] == alone[f"eval_alone_groups/{name}/loss"]
        accuracy = alone["eval_alone_rewards/accuracies"]
        assert together[f"eval_groups/{name}/accuracy"] == alone[f"eval_alone_groups/{name}/accuracy"] == accuracy
        assert alone["eval_alone_groups/usual/count"] == 0
        assert "eval_alone_groups/usual/loss" not in alone


def test_tokens_are_counted_between_logs_too(tmp_path: Path) -> None:
    often = trainer(tmp_path, max_steps=2, logging_steps=1)
    often.train()
    seldom = trainer(tmp_path, max_steps=2, logging_steps=100, eval_data=pairs(4), eval_strategy="steps", eval_steps=1)
    seldom.train()
    assert steps(seldom, "eval_num_tokens") == steps(often, "num_tokens")


def test_precomputed_reference_is_the_online_one(tmp_path: Path) -> None:
    """What TRL precomputes comes back as float32: half a rounding of each of its own log-probabilities."""
    ready = trainer(tmp_path, precompute_ref_log_probs=True)
    assert ready.ref_model is None
    ready.train()
    online = GroupRobustDPOTrainer(
        gpt2(), gpt2(), config(tmp_path), train_dataset=pairs(), processing_class=tokenizer()
    )
    online.train()
    assert_same(parameters(ready), parameters(online), AS_TRL)


@pytest.mark.parametrize("kind", ["lora", "another adapter as reference"])
def test_peft_reference_is_an_adapter_switch(tmp_path: Path, kind: str) -> None:
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)

    def adapted() -> Any:
        torch.manual_seed(3)
        return peft.get_peft_model(llama(), lora)

    of = trainer(tmp_path, model=adapted())
    if kind == "lora":
        of.model.delete_adapter("ref")  # TRL copies the adapter of a ready PEFT model; a fresh one has no copy
        reference = llama()
    else:
        reference = adapted()
    batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
    hf.add_sequence_logps(hf_model := getattr(reference, "get_base_model", lambda: reference)(), None)
    with torch.no_grad():
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        plain = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        expected = hf_model(**plain, labels=labels, sequence_logps=True)
    got = torch.cat(of.compute_ref_log_probs(of.model, batch))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    policy = of.model(**plain, labels=labels, sequence_logps=True)
    if kind == "lora":
        assert (policy - got).abs().min() > 1e-3
    before = parameters(of)
    of.train()
    moved = [name for name, value in parameters(of).items() if not torch.equal(value, before[name])]
    assert moved
    assert all("lora" in name and "ref" not in name for name in moved)


def test_accumulation_is_one_large_batch(tmp_path: Path) -> None:
    """24 pairs, 3 micro-batches of 3 a step: the last step of an epoch has 2 micro-batches only."""
    many = trainer(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    many.train()
    assert many.args.group_update == "lagged"
    one = trainer(tmp_path, per_device_train_batch_size=9, group_update="lagged")
    one.train()
    assert steps(many, "groups/rare/alpha") == pytest.approx(steps(one, "groups/rare/alpha"), rel=EXACT)
    assert steps(many, "loss") == pytest.approx(steps(one, "loss"), rel=LOGGED)
    assert_same(parameters(many), parameters(one))


@pytest.mark.parametrize("reference", ["model", "adapter", "precomputed"])
def test_compiled_is_eager(tmp_path: Path, reference: str) -> None:
    """``torch_compile=True`` hands the trainer models that are wrapped once more."""
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)
    trained = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        torch.compiler.reset()
        model = gpt2()
        if reference == "adapter":
            model = peft.get_peft_model(model, lora)
        options |= {"precompute_ref_log_probs": reference == "precomputed", "max_steps": 2}
        options["pad_to_multiple_of"] = 32  # batches of one shape: each model is compiled once
        trained.append(trainer(tmp_path, model=model, eval_data=pairs(4, 50), **options))
        trained[-1].train()
        trained[-1].evaluate()
    eager, compiled = trained
    for name in ("loss", "eval_loss", "groups/usual/alpha", "logps/chosen"):
        assert steps(compiled, name) == pytest.approx(steps(eager, name), rel=LOGGED), name


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_is_uninterrupted(tmp_path: Path, accumulation: int) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": accumulation}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(whole.group_weights.log_alpha, again.group_weights.log_alpha)
    assert abs(steps(whole, "groups/usual/alpha")[1] - 1 / 3) > 0.05, "alpha is not uniform at the stop"
    assert steps(again, "loss") == steps(whole, "loss")
    for name, value in parameters(whole).items():
        assert torch.equal(value, parameters(again)[name]), name


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    renamed = pairs().map(lambda pair: {"group": pair["group"].upper()})
    with pytest.raises(ValueError, match=r"groups \['other', 'rare', 'usual'\] are not the data's \['OTHER'"):
        trainer(tmp_path / "x", data=renamed).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-1" / "group_weights.pt").unlink()
    with pytest.raises(ValueError, match=r"must hold group_weights\.pt"):
        trainer(tmp_path / "x").train(resume_from_checkpoint=checkpoint)


def test_group_columns_of_numbers_and_class_labels(tmp_path: Path) -> None:
    numbers = pairs().map(lambda pair: {"group": 7 if pair["group"] == "rare" else 3})
    assert trainer(tmp_path, data=numbers).group_names == ["3", "7"]
    labels = datasets.ClassLabel(names=["usual", "rare", "other"])
    assert trainer(tmp_path, data=pairs().cast_column("group", labels)).group_names == ["other", "rare", "usual"]
    named = trainer(tmp_path, data=pairs().rename_column("group", "source"), group_column="source")
    assert named.group_weights.group_sizes.tolist() == [6, 6, 12]


def test_one_process_takes_three_products(tmp_path: Path) -> None:
    """Although alpha moves with each batch; the reference takes one."""
    for plan, products in (("sweep", 3), ("keep", 3), ("recompute", 4)):
        of = trainer(tmp_path, linear_plan=plan, per_device_train_batch_size=8, max_steps=3)
        counted = sum(len(pair["chosen_ids"] + pair["rejected_ids"]) for pair in of.train_dataset)
        with trl_cases.HeadProducts(300, of.ref_model.get_output_embeddings().weight) as seen:
            of.train()
        assert (seen.rows, seen.of_reference) == (products * counted, counted), plan
        assert (of.group_weights.alpha - 1 / 3).abs().max() > 1e-3


def test_an_adapter_takes_two_products(tmp_path: Path) -> None:
    """The head is frozen; the model without the adapter is the reference, which takes one."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    of = trainer(tmp_path, model=peft.get_peft_model(llama(), lora), per_device_train_batch_size=8, max_steps=3)
    counted = sum(len(pair["chosen_ids"] + pair["rejected_ids"]) for pair in of.train_dataset)
    with trl_cases.HeadProducts(300) as seen:
        of.train()
    assert seen.rows == (2 + 1) * counted


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_lengths_are_trl_s(tmp_path: Path, loss_type: str) -> None:
    """Without a prompt the answer's first token has no log-probability, and counts in TRL's lengths all the same."""
    data, losses = pairs().map(lambda _: {"group": "all", "prompt": ""}), []
    options = {"loss_type": loss_type, "max_steps": 2, "beta": 0.3}
    for make, args in (
        (GroupRobustDPOTrainer, config(tmp_path, **options)),
        (trl.DPOTrainer, config(tmp_path, trl.DPOConfig, **options)),
    ):
        of = make(gpt2(), shaken(gpt2()), args, train_dataset=data, processing_class=tokenizer())
        of.train()
        losses.append([*steps(of, "loss"), *steps(of, "logps/chosen")])
    assert losses[0] == pytest.approx(losses[1], rel=AS_TRL_LOGS)


def test_streamed_data_needs_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"group_sizes must be given"):
        trainer(tmp_path, data=pairs().to_iterable_dataset())
    sizes = {"usual": 12, "rare": 6, "other": 6}
    of = trainer(tmp_path, data=pairs().to_iterable_dataset(), group_sizes=sizes, max_steps=2)
    of.train()
    assert of.group_weights.group_sizes.tolist() == [6, 6, 12]
    with pytest.raises(ValueError, match=r"group 'rare' is not in args.group_sizes, which has \['other', 'usual'\]"):
        trainer(tmp_path, data=pairs().to_iterable_dataset(), group_sizes={"usual": 12, "other": 6}).train()


def test_sizes_beside_data_that_can_be_counted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'usual': 12\}: the share of \['other', 'rare', 'usual'\] is off"):
        of = trainer(tmp_path, group_sizes={"usual": 4, "rare": 4, "other": 4})
    assert of.group_weights.group_sizes.tolist() == [4, 4, 4]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="group_sizes")
        trainer(tmp_path, group_sizes={"usual": 200, "rare": 103, "other": 97})


def test_trl_s_own_trainer_refuses_the_config(tmp_path: Path) -> None:
    """One of the two lines changed alone would train plain DPO."""
    args = config(tmp_path, max_steps=1)
    of = trl.DPOTrainer(llama(), llama(), args, train_dataset=pairs(), processing_class=tokenizer())
    with pytest.raises(TypeError, match="must be given to a GroupRobustDPOTrainer"):
        of.train()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"must have a column 'group', it has \[[^g]*\]; pass its name as group_column="
    ):
        trainer(tmp_path, data=pairs().remove_columns("group"))
    with pytest.raises(ValueError, match=r"is it 'groups'\? Pass group_column='groups'"):
        trainer(tmp_path, data=pairs().rename_column("group", "groups"))
    with pytest.raises(ValueError, match=r"train_dataset has groups that args.group_sizes lacks: 'rare' \(6 pairs\)"):
        trainer(tmp_path, group_sizes={"usual": 6, "other": 6})
    for name, wrong in (("group_step_size", -1.0), ("group_update", "inlin"), ("group_estimator", "mean")):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            trainer(tmp_path, **{name: wrong}, gradient_accumulation_steps=2)
    new = pairs(4).map(lambda _: {"group": "unheard"})
    with pytest.raises(ValueError, match=r"groups that the training data lacks: 'unheard' \(4 pairs\)"):
        trainer(tmp_path, eval_data=new)
    with pytest.raises(ValueError, match=r"'unheard' \(4 pairs\)"):
        trainer(tmp_path).evaluate(new)
    with pytest.raises(ValueError, match=r"group_update='lagged' \(the default"):
        config(tmp_path, group_update="inline", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"group_estimator must be 'importance'"):
        config(tmp_path, group_estimator="group_mean", gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"loss_type must be one of .*, got 'aot'"):
        config(tmp_path, loss_type=["sigmoid", "aot"])
    with pytest.raises(NotImplementedError, match=r"loss_type='ipo' must be alone"):
        config(tmp_path, loss_type=["ipo", "sft"])
    with pytest.raises(TypeError, match=r"args must be a GroupRobustDPOConfig, got DPOConfig"):
        GroupRobustDPOTrainer(llama(), args=config(tmp_path, trl.DPOConfig), train_dataset=pairs())
    with pytest.raises(ValueError, match=r"linear_plan must be one of .*, got 'fast'"):
        config(tmp_path, linear_plan="fast")
    for options in ({"linear_plan": "keep"}, {"max_extra_bytes": 0}):
        with pytest.raises(ValueError, match=r"must be left out on the logits path"):
            trainer(tmp_path, fused_linear=False, **options)
    long = pairs().map(lambda pair: {"prompt": pair["prompt"] * (20 if pair["group"] == "rare" else 1)})
    with pytest.raises(ValueError, match=r"max_length=20 leaves no training pair of the groups \['rare'\]"):
        trainer(tmp_path, data=long, max_length=20)


def test_encoder_decoder_and_softcap(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 300, "num_hidden_layers": 1, "num_layers": 1}
    t5 = T5ForConditionalGeneration(T5Config(**small, d_model=16, d_ff=16, d_kv=8, num_heads=2))
    with pytest.raises(ValueError, match=r"got T5ForConditionalGeneration, an encoder-decoder"):
        trainer(tmp_path, model=t5)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    gemma = Gemma2ForCausalLM(Gemma2Config(**small, **sizes, head_dim=8, pad_token_id=0)).double()
    of = trainer(tmp_path / "linear", model=copy.deepcopy(gemma), max_steps=2)
    assert of._head == hf.Head(softcap=30.0)
    of.train()
    logits = trainer(tmp_path / "logits", model=gemma, max_steps=2, fused_linear=False)
    logits.train()
    assert steps(of, "loss") == pytest.approx(steps(logits, "loss"), rel=1e-6)
    for name, value in parameters(logits).items():
        torch.testing.assert_close(parameters(of)[name], value, rtol=0, atol=1e-6, msg=name)


def test_a_head_that_peft_trains_takes_the_logits_path(tmp_path: Path) -> None:
    """The weight of modules_to_save's wrapper is not all there is to it."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(NotImplementedError, match=r"is no plain matrix in memory: use the logits path"):
        trainer(tmp_path, model=peft.get_peft_model(llama(), lora), fused_linear=True)
    of = trainer(tmp_path, model=peft.get_peft_model(llama(), lora), max_steps=1)
    before = parameters(of)
    of.train()
    assert of._head is None
    moved = [name for name, value in parameters(of).items() if not torch.equal(value, before[name])]
    assert any("lm_head.modules_to_save" in name for name in moved)


def test_versions() -> None:
    check_version("1.99.0", trl.DPOTrainer)
    for version in ("1.14.2", "2.0.0", "0.29.1"):
        with pytest.raises(ImportError, match=rf"needs 1\.15 <= trl < 2, got {version}"):
            check_version(version, trl.DPOTrainer)
    with pytest.raises(ImportError, match=r"trl 1\.17\.0 has changed: its DPOTrainer lacks \['compute_ref_log_probs"):
        check_version(
            "1.17.0", type("Trainer", (), dict.fromkeys(set(dir(trl.DPOTrainer)) - {"compute_ref_log_probs"}))
        )


def test_no_host_synchronisation_before_the_log(tmp_path: Path) -> None:
    """On a GPU each of these would wait for it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    reads: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                stack = "".join(traceback.format_stack())
                if not any(name in stack for name in ("masking_utils", "if_skipped", "saw_empty")):  # on the CPU only
                    reads.append(stack)
            return function(*args, **(kwargs or {}))

    of = trainer(tmp_path, group_update="lagged", fused_linear=False, backend="reference")
    batch = of._prepare_inputs(next(iter(of.get_train_dataloader())))
    of.model.train()
    with Reads():
        of.compute_loss(of.model, batch).backward()
        assert not reads, reads[0]
        float(of._totals["train"].groups.sum())
        assert len(reads) == 1, "this one is seen"
