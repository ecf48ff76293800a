"""GroupRobustDPOTrainer on two ranks, by DDP and by Accelerate's FSDP2, is that of one process."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from once import once

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
for package in ("trl", "datasets", "peft"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'grpo-kernels[test]'")
if not torch.distributed.is_available():
    pytest.skip("this PyTorch has no torch.distributed", allow_module_level=True)

import forks  # noqa: E402
import trl_cases  # noqa: E402
import trl_fsdp2  # noqa: E402
from trl_exact import EXACT, LOGGED, assert_same, gpt2, pairs, parameters, trainer  # noqa: E402

import grpo_kernels as gk  # noqa: E402
from grpo_kernels.integrations import transformers as hf  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "inline": {"per_device_train_batch_size": 4, "linear_plan": "keep"},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "fused_linear": False},
    "checkpointing": {"per_device_train_batch_size": 4, "gradient_checkpointing": True, "loss_type": "ipo"},
    "sweep": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "linear_plan": "sweep"},
}


def worker(world: int, folder: str) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "1"
    results = {**results_of_cases(world, folder), "bfloat16": in_bfloat16()}
    results["fsdp2"] = trl_fsdp2.results_of(trainer, world, Path(folder))
    torch.save(results, Path(folder) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def results_of_cases(world: int, folder: str) -> dict[str, dict[str, Any]]:
    results = {}
    for name, options in CASES.items():
        options = {**options, "per_device_train_batch_size": options["per_device_train_batch_size"] // world}
        options["ddp_backend"] = "gloo" if world > 1 else None
        of = trainer(Path(folder) / name, eval_data=pairs(7, 100), **options)
        with trl_cases.HeadProducts(300, of.ref_model.get_output_embeddings().weight) as products:
            of.train()
        assert of.accelerator.num_processes == world
        results[name] = {"history": of.state.log_history, "parameters": parameters(of), "eval": of.evaluate()}
        results[name]["products"] = torch.tensor([products.rows, products.of_reference])
        # 6 steps of 4 pairs are the 24 pairs once.
        results[name]["counted"] = sum(len(pair["chosen_ids"] + pair["rejected_ids"]) for pair in of.train_dataset)
        results[name]["alpha"] = of.group_weights.alpha
    return results


def in_bfloat16() -> dict[str, Any]:
    """Of a model in bfloat16, and of one that FSDP2 computes in it; both ranks have the same pairs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    start, half = gpt2().float(), torch.bfloat16
    hf.add_sequence_logps(start, hf.find_head(start))
    models = {"alone": copy.deepcopy(start).to(half), "sharded": start}
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=half)
    fully_shard(start, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    ids = torch.randint(3, 300, (4, 40), generator=torch.Generator().manual_seed(0))
    batch, ref_logps = {"input_ids": ids, "labels": ids}, torch.tensor([-220.3, -221.4, -219.9, -222.2])
    results = {}
    for name, model in models.items():
        loss_fn = gk.LinearGroupRobustLoss(gk.GroupWeights(group_sizes=[5, 3], step_size=0.5), shift_labels=True)
        found = model(**batch, loss_of_pairs=hf.LossOfPairs(loss_fn, torch.tensor([0, 1]), ref_logps))
        found.loss.backward()
        out, gradient = found.output, model.get_output_embeddings().weight.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        results[name] = {"loss": out.loss.detach(), "logps": out.chosen_logps.detach(), "rewards": out.chosen_rewards}
        with torch.no_grad():
            results[name]["reference"] = model(**batch, sequence_logps=True, sealed=True).value
            unsealed = model(**batch, sequence_logps=True)
        results[name]["gradient"] = gradient.to(half)
    return {**results, "unsealed": unsealed}


def run_both(folder: Path) -> None:
    forks.run_on_ranks(2, worker, 2, str(folder))
    results = results_of_cases(1, str(folder / "alone"))
    results["fsdp2"] = trl_fsdp2.results_of(trainer, 1, folder / "alone")
    torch.save(results, folder / "alone.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one process, and of each of two ranks."""
    folder = once(tmp_path_factory, "trl", run_both)
    return [torch.load(folder / f"{name}.pt", weights_only=False) for name in ("alone", "rank0", "rank1")]


@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks_are_one(ranks: list[dict[str, Any]], name: str) -> None:
    alone, *both = (results[name] for results in ranks)
    for together in both:
        assert_same(together["parameters"], alone["parameters"])
        torch.testing.assert_close(together["alpha"], alone["alpha"], rtol=EXACT, atol=0)
        of_groups = {key for key in alone["eval"] if "groups/" in key}
        assert {key for key in together["eval"] if "groups/" in key} == of_groups
        assert len(of_groups) == 17, "4 numbers of 3 groups, 2 more of those with 2 pairs or more, and the worst"
        for key, value in alone["eval"].items():
            if "groups/" in key or "rewards/" in key or "logps/" in key:
                assert together["eval"][key] == pytest.approx(value, rel=EXACT, abs=EXACT), key
        for mine, theirs in zip(both[0]["history"], alone["history"], strict=True):
            for key in ("loss", "groups/rare/count", "groups/worst_loss", "rewards/margins", "grad_norm", "num_tokens"):
                assert (key in mine) == (key in theirs)
                if key in theirs:
                    assert mine[key] == pytest.approx(theirs[key], rel=LOGGED, abs=EXACT), key
    assert torch.equal(both[0]["alpha"], both[1]["alpha"])
    if "linear_plan" in CASES[name]:  # three products of the policy, one of the reference
        expected = torch.tensor([3, 1]) * alone["counted"]
        assert torch.equal(alone["products"], expected)
        assert torch.equal(sum(together["products"] for together in both), expected)


def test_fsdp2_goes_on_from_its_checkpoint(ranks: list[dict[str, Any]]) -> None:
    """As if it had not been stopped, and as one process."""
    alone, *both = (results["fsdp2"] for results in ranks)
    for whole, resumed in ((run["whole"], run["resumed"]) for run in (alone, *both)):
        assert abs(whole["history"][1]["groups/usual/alpha"] - 1 / 3) > 0.05, "alpha is not uniform at the stop"
        assert torch.equal(resumed["alpha"], whole["alpha"])
        assert all(torch.equal(value, resumed["parameters"][name]) for name, value in whole["parameters"].items())
        for before, after, one in zip(whole["history"], resumed["history"], alone["whole"]["history"], strict=True):
            for key in ("loss", "objective", "grad_norm", "groups/usual/alpha", "num_tokens"):
                assert after[key] == before[key], key
                assert before[key] == pytest.approx(one[key], rel=LOGGED, abs=EXACT), key
        assert_same(whole["parameters"], alone["whole"]["parameters"])
        torch.testing.assert_close(whole["alpha"], alone["whole"]["alpha"], rtol=EXACT, atol=0)


def test_a_wrapper_rounds_no_log_probability(ranks: list[dict[str, Any]]) -> None:
    """FSDP2's mixed precision casts what a forward takes and gives: only what is sealed comes through as it is."""
    for results in ranks[1:]:
        alone, sharded, unsealed = (results["bfloat16"][name] for name in ("alone", "sharded", "unsealed"))
        assert unsealed.dtype == torch.bfloat16, "it does cast"
        for name, value in alone.items():
            assert sharded[name].dtype == value.dtype
            close = 2**-7 if name == "gradient" else 1e-6
            torch.testing.assert_close(sharded[name], value, rtol=close, atol=0 if name != "gradient" else close)
        assert (alone["logps"] - alone["logps"].bfloat16()).abs().max() > 1e-2
