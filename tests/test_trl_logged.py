"""What GroupRobustDPOTrainer logs, experts' balancing loss, and options of the group weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")

from trl_cases import first_batch, logged, model_of, options_of, pairs, trainer, trl_trainer

from grpo_kernels.integrations.trl import GroupRobustDPOConfig

TOKEN_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
GROUPS = ["rare", "usual", "usual", "usual"]
SIZES = {"rare": 4, "usual": 12}


def plain_and_weighted(record: dict[str, float], alpha: dict[str, float], prefix: str = "") -> tuple[float, float]:
    """(the mean of pair losses, sum_g alpha_g (N / N_g) (1 / B) sum_i l_i), from a record's groups."""
    counts = {name: record[f"{prefix}groups/{name}/count"] for name in SIZES}
    sums = {name: record.get(f"{prefix}groups/{name}/loss", 0.0) * counts[name] for name in SIZES}
    pairs_of_all = sum(counts.values())
    weighted = sum(alpha[name] * 16 / SIZES[name] * sums[name] / pairs_of_all for name in SIZES)
    return sum(sums.values()) / pairs_of_all, weighted


@pytest.mark.parametrize("accumulation", [1, 3])
def test_loss_is_plain_and_objective_weighted(accumulation: int) -> None:
    """In the last accumulation of an epoch there are fewer micro-batches than in the others."""
    data = pairs(GROUPS * 4)
    options = {"group_step_size": 5.0, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    of = trainer(data=data, eval_data=data.select(range(5)), **options)
    of.train()
    records = [record for record in of.state.log_history if "loss" in record]
    before = dict.fromkeys(SIZES, 0.5)
    for record in records:
        after = {name: record[f"groups/{name}/alpha"] for name in SIZES}
        plain, weighted = plain_and_weighted(record, after if accumulation == 1 else before)
        assert record["loss"] == pytest.approx(plain, rel=1e-5)
        assert record["objective"] == pytest.approx(weighted, rel=1e-5)
        before = after
    assert abs(before["rare"] - 0.5) > 0.02, "alpha has moved"
    assert of.state.log_history[-1]["train_loss"] == pytest.approx(sum(record["loss"] for record in records) / 4)
    last = of.evaluate()
    plain, weighted = plain_and_weighted(last, before, "eval_")
    assert last["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert last["eval_objective"] == pytest.approx(weighted, rel=1e-5)
    assert abs(plain - weighted) > 0.01


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_tokens_are_counted_on_after_a_stop(tmp_path: Path, logging_steps: int) -> None:
    options = {"max_steps": 4, "logging_steps": logging_steps, "save_strategy": "steps", "save_steps": 2}
    whole, again = (trainer(data=pairs(GROUPS * 4), output_dir=str(tmp_path / x), **options) for x in "ab")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert logged(again, "num_tokens")[-1] == logged(whole, "num_tokens")[-1] > 0
    assert again.evaluate(pairs(["rare"]))["eval_num_tokens"] == logged(whole, "num_tokens")[-1]


@pytest.mark.parametrize("fused_linear", [True, False])
def test_token_metrics_are_those_of_trl(fused_linear: bool) -> None:
    """In training and in an evaluation of one batch; a softcap and a scale are in the logits that are averaged."""
    capped, runs = {"final_logit_softcapping": 5.0, "head_dim": 8}, []
    for make, more in ((trainer, {"fused_linear": fused_linear, "log_token_metrics": True}), (trl_trainer, {})):
        data = pairs(["all"] * 8)
        models = (model_of("Gemma2", seed, **capped) for seed in (0, 1))
        of = make(*models, data, data.select(range(3)), **more)
        of.train()
        runs.append((of, of.evaluate()))
    (ours, of_ours), (theirs, of_theirs) = runs
    assert (ours._head is not None) is fused_linear
    for name in TOKEN_METRICS:
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-5), name
        assert len(set(logged(ours, name))) > 1 or name == "mean_token_accuracy"
        assert of_ours[f"eval_{name}"] == pytest.approx(of_theirs[f"eval_{name}"], rel=1e-5), name


def test_tokens_of_several_batches_weigh_alike() -> None:
    """TRL averages the means of batches; here every token counts alike, over groups and micro-batches."""
    of = trainer(data=pairs(GROUPS * 2), log_token_metrics=True, eval_data=pairs(GROUPS * 2))
    of.args.per_device_eval_batch_size = 3
    metrics = of.evaluate()
    batch = of._prepare_inputs(of.data_collator(list(of.eval_dataset)))
    with torch.no_grad():
        z = of.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    counted, labels = batch["completion_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
    p, (chosen, _) = z.softmax(-1), counted.chunk(2)
    assert metrics["eval_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1)[counted].mean()), rel=1e-5)
    assert metrics["eval_logits/chosen"] == pytest.approx(float(z.mean(-1)[: len(chosen)][chosen].mean()), rel=1e-4)
    hits = (z.argmax(-1) == labels)[: len(chosen)][chosen]
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(float(hits.double().mean()))


EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


@pytest.mark.parametrize(("fused_linear", "accumulation"), [(True, 2), (False, 1)])
def test_experts_balance_as_in_trl(fused_linear: bool, accumulation: int) -> None:
    """One group; alpha has no part in it. TRL's ``loss`` holds the balancing loss, ours does not."""
    coef, runs = 0.5, []
    for make, more in ((trainer, {"fused_linear": fused_linear}), (trl_trainer, {})):
        options = {"router_aux_loss_coef": coef, "gradient_accumulation_steps": accumulation, **more}
        of = make(
            model_of("Qwen3Moe", 0, **EXPERTS), model_of("Qwen3Moe", 1, **EXPERTS), pairs(["all"] * 16), **options
        )
        of.train()
        runs.append(of)
    ours, theirs = runs
    assert (ours._head is not None) is fused_linear
    assert logged(ours, "aux_loss") == pytest.approx(logged(theirs, "aux_loss"), rel=1e-5)
    balanced = [loss + coef * aux for loss, aux in zip(logged(ours, "loss"), logged(ours, "aux_loss"), strict=False)]
    assert balanced == pytest.approx(logged(theirs, "loss"), rel=1e-5)
    start = dict(model_of("Qwen3Moe", 0, **EXPERTS).named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, theirs.model.get_parameter(name), rtol=0, atol=2e-6, msg=name)
        assert "gate" not in name or not torch.equal(parameter, start[name]), name


def test_experts_balance_outside_alpha() -> None:
    """Whatever alpha is: the loss grows by coefficient times balancing loss."""
    losses = []
    for coef in (0.0, 0.5):
        of = trainer(
            model_of("Mixtral", 0, num_local_experts=4),
            model_of("Mixtral", 1, num_local_experts=4),
            data=pairs(GROUPS * 2),
            eval_data=pairs(["rare"]),
            group_step_size=5.0,
            router_aux_loss_coef=coef,
        )
        of.model.train()
        losses.append(of.compute_loss(of.model, first_batch(of, 6)))
    assert of.group_weights.alpha.max() > 0.6
    batch = first_batch(of, 6)
    with torch.no_grad():
        aux = of._loss_in_forward(of.model, batch, of._reference_logps(of.ref_model, batch)).aux_loss
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * aux, rtol=1e-5, atol=1e-6)
    metrics = of.evaluate()
    assert metrics["eval_aux_loss"] > 1
    assert metrics["eval_loss"] == metrics["eval_groups/rare/loss"]
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8}
    with pytest.raises(
        NotImplementedError, match=r"must be 0.0 for DeepseekV3ForCausalLM, which computes no balancing"
    ):
        trainer(model_of("DeepseekV3", **experts), router_aux_loss_coef=0.5)
    with pytest.raises(ValueError, match=r"is not a Mixture-of-Experts model"):
        trainer(router_aux_loss_coef=0.5)


def test_other_rules_of_alpha() -> None:
    of = trainer(group_options={"rule": "soft_maximum", "temperature": 0.3}, data=pairs(GROUPS * 4), max_steps=1)
    of.train()
    (record,) = [record for record in of.state.log_history if "loss" in record]
    losses = torch.tensor([record.get(f"groups/{name}/loss", 0) * record[f"groups/{name}/count"] for name in SIZES])
    of_groups = losses * 16 / torch.tensor(list(SIZES.values())) / 4
    expected = (of_groups.double() / 0.3).softmax(0)
    assert not set(TOKEN_METRICS) & set(record), "not asked for"
    torch.testing.assert_close(of.group_weights.alpha, expected, rtol=1e-5, atol=0)
    assert trainer().group_weights.step_size == 0.01
    assert trainer(group_options={"step_size": 0.5, "floor": 0.1}).group_weights.step_size == 0.5


def test_options_inside_and_around_groups() -> None:
    """They reach GroupWeights, groups by name, and what diagnose() says is logged."""
    baseline = dict(zip(SIZES, (0.3, 0.2, 0.1), strict=False))
    options = {"group_step_size": "auto", "group_baseline": baseline, "group_options": {"inner_tilt": -0.5}}
    of = trainer(**options, data=pairs(GROUPS * 4), max_steps=1)
    of.train()
    weights = of.group_weights
    assert weights.is_hedged
    assert weights.inner_tilt == -0.5
    assert weights.baseline.tolist() == [baseline[name] for name in of.group_names]
    (record,) = [record for record in of.state.log_history if "loss" in record]
    found = weights.diagnose(1, 1)
    for name, value in found.metrics(of.group_names).items():
        assert record[name] == pytest.approx(value), name
    assert trainer(group_baseline="running").group_weights.has_running_baseline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_options": {"baseline": "running"}}, "it is the option group_baseline"),
        ({"group_options": {"step_size": 1.0}, "group_step_size": 2.0}, "it is the option group_step_size"),
        ({"group_options": {"update": "lagged"}}, "it is the option group_update"),
        ({"group_options": {"estimator": "group_mean"}}, "it is the option group_estimator"),
        ({"group_options": {"flor": 0.1}}, "must hold options of GroupWeights that are left to you, got 'flor'"),
        ({"group_options": {"num_groups": 2}}, "left to you, got 'num_groups'"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ({"weight_column": "x", "margin_column": "x"}, r"must be columns apart, got \['group', 'x', 'x'\]"),
    ],
)
def test_options_that_clash(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupRobustDPOConfig(**options_of(**options))
