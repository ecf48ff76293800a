"""Every option that GroupRobustDPOConfig inherits is honoured or refused. None is ignored."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
pytest.importorskip("trl", reason="trl is not installed: pip install 'grpo-kernels[trl]'")

import transformers
from trl import DPOConfig, DPOTrainer
from trl_cases import first_batch, logged, model_of, options_of, pairs, trainer, trl_trainer

from grpo_kernels import GroupWeights
from grpo_kernels.integrations.trl import GroupRobustDPOConfig, GroupRobustDPOTrainer, models
from grpo_kernels.integrations.trl.config import REFUSED

# Read by what this trainer replaces of TRL's; tests below and in test_trl.py run them.
OF_THE_LOSS = {"beta", "loss_type", "label_smoothing", "router_aux_loss_coef", "precompute_ref_log_probs"}
OF_THE_LOSS |= {"loss_weights", "f_divergence_type", "f_alpha_divergence_coef", "use_weighting", "discopop_tau"}
OF_THE_LOSS |= {"ld_alpha", "gradient_checkpointing_kwargs", "max_length"}  # the latter for the words of an error
# Read by TRL's and Transformers' own code alone, which runs as it is: test_what_is_replaced.
PASSED_ON_TEXT = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs activation_offloading
adafactor adam_beta1 adam_beta2 adam_epsilon batch_eval_metrics bf16 bf16_backend bf16_full_eval
data_seed dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context
dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
dataset_num_proc ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
ddp_static_graph ddp_timeout debug deepspeed disable_dropout disable_tqdm do_eval do_predict do_train
enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps
eval_strategy eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism
gradient_accumulation_steps gradient_checkpointing greater_is_better group_by_length
half_precision_backend hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
ignore_data_skip include_for_metrics include_num_input_tokens_seen include_tokens_per_second
jit_mode_eval learning_rate length_column_name liger_kernel_config load_best_model_at_end local_rank
log_level log_level_replica log_on_each_node logging_dir logging_first_step logging_nan_inf_filter
logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_steps
metric_for_best_model model_init_kwargs neftune_noise_alpha num_train_epochs optim optim_args
optim_target_modules output_dir overwrite_output_dir pad_to_multiple_of pad_token parallelism_config
past_index per_device_eval_batch_size per_device_train_batch_size per_gpu_eval_batch_size
per_gpu_train_batch_size precompute_ref_batch_size prediction_loss_only project push_to_hub ray_scope
ref_model_mixup_alpha ref_model_sync_steps remove_unused_columns report_to
restore_callback_states_from_checkpoint resume_from_checkpoint run_name save_on_each_node save_only_model
save_safetensors save_steps save_strategy save_total_limit seed skip_memory_metrics sync_ref_model tf32
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps torchdynamo
trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy truncation_mode
trust_remote_code use_cpu use_ipex use_liger_kernel use_mps_device warmup_ratio warmup_steps weight_decay
"""
PASSED_ON = set(PASSED_ON_TEXT.split())
REPLACED = {  # whose bodies this trainer does not call
    "_compute_loss": DPOTrainer,
    "compute_loss": DPOTrainer,
    "compute_ref_log_probs": DPOTrainer,
    "_get_num_items_in_batch": transformers.Trainer,
}
ANOTHER = {  # a value that is refused
    "auto_find_batch_size": True,
    "padding_free": True,
    "label_smoothing_factor": 0.1,
    "label_names": ["scores"],
    "average_tokens_across_devices": False,
    "use_cache": True,
}
INHERITED = {field.name for field in dataclasses.fields(DPOConfig)}


def test_every_field_is_honoured_or_refused() -> None:
    """A field that this does not know is a new one: find out what reads it."""
    assert sorted(INHERITED - OF_THE_LOSS - PASSED_ON - set(REFUSED)) == []
    assert not (OF_THE_LOSS & PASSED_ON) | (OF_THE_LOSS & set(REFUSED)) | (PASSED_ON & set(REFUSED))
    assert set(ANOTHER) == set(REFUSED)


@pytest.mark.parametrize("name", [name for name in ANOTHER if name in INHERITED])
def test_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{name} must be .* with group weights \(.*\), got"):
        GroupRobustDPOConfig(**options_of(**{name: ANOTHER[name]}))
    for taken in REFUSED[name][0]:
        GroupRobustDPOConfig(**options_of(**{name: taken}))


@pytest.mark.parametrize(
    ("name", "other", "honoured"),
    [
        ("discopop_tau", "loss_type", {"loss_type": ["sigmoid", "discopop"]}),
        ("f_alpha_divergence_coef", "f_divergence_type", {"f_divergence_type": "alpha_divergence"}),
    ],
)
def test_beside_another_option_only(name: str, other: str, honoured: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{name} has a meaning for {other}=.* only, got 0.3"):
        GroupRobustDPOConfig(**options_of(**{name: 0.3}))
    GroupRobustDPOConfig(**options_of(**{name: 0.3}, **honoured))


def test_what_is_replaced() -> None:
    """No option is read by a method that is replaced, but those that are refused or run with the loss.

    All other methods that this trainer overrides call TRL's.
    """
    kept_as = options_by_attribute(DPOTrainer.__init__)
    read = set()
    for name, owner in REPLACED.items():
        for node in ast.walk(tree_of(vars(owner)[name])):
            if isinstance(node, ast.Attribute):
                chain = ast.unparse(node)
                read |= {chain.removeprefix("self.args.")} if chain.startswith("self.args.") else set()
                read |= {kept_as[chain]} if chain in kept_as else set()
    assert {"beta", "ld_alpha", "discopop_tau"} <= read
    assert read & INHERITED <= OF_THE_LOSS | set(REFUSED)
    for name, method in vars(GroupRobustDPOTrainer).items():
        inherited = inspect.isfunction(method) and hasattr(DPOTrainer, name) and name not in REPLACED
        if inherited:
            calls = [ast.unparse(node.func) for node in ast.walk(tree_of(method)) if isinstance(node, ast.Call)]
            assert f"super().{name}" in calls, name


def tree_of(function: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def options_by_attribute(init: Any) -> dict[str, str]:
    """{"self.beta": "beta", ...}: what a trainer's __init__ keeps of its arguments."""
    kept = {}
    for node in ast.walk(tree_of(init)):
        if isinstance(node, ast.Assign):
            options = [ast.unparse(part) for part in ast.walk(node.value) if isinstance(part, ast.Attribute)]
            names = [name.split("args.")[1] for name in options if name.startswith("args.")]
            if len(names) == 1:
                kept |= {ast.unparse(target): names[0] for target in node.targets}
    return kept


# Whose losses are added up with weights of their own: a wrong one shows. The others have runs to themselves.
MANY = ["hinge", "exo_pair", "robust", "bco_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down", "discopop"]
OF_MANY = {"loss_type": MANY, "loss_weights": [0.7**i for i in range(len(MANY))], "label_smoothing": 0.1, "beta": 0.4}
# Options that meet nowhere share a run: the losses are TRL's only if both are honoured.
RUNS: dict[str, dict[str, Any]] = {
    "many": OF_MANY,
    "beta, reference in step": {
        "beta": 1.5,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.9,
    },
    "hinge, checkpointing": {
        "beta": 0.2,
        "loss_type": "hinge",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "norm": {"loss_type": "sigmoid_norm", "beta": 2.0},
    "weighted": {"loss_type": "nca_pair", "loss_weights": [5.0]},
    "divergence": {
        "loss_type": ["sigmoid"],
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
    },
    "tau, precomputed": {
        "loss_type": "discopop",
        "discopop_tau": 0.5,
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 3,
    },
    "length": {"ld_alpha": 0.3},
    "length on logits": {"ld_alpha": 0.3, "loss_type": "ipo", "precompute_ref_log_probs": True},
    "likelihood": {"use_weighting": True, "loss_type": ["sigmoid", "sigmoid_norm"], "loss_weights": [1.0, 0.5]},
    "keep_start, dropout": {"max_length": 8, "disable_dropout": False},
    "keep_end, padding": {"max_length": 8, "truncation_mode": "keep_end", "pad_to_multiple_of": 16},
    "noise": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("kind", list(RUNS))
def test_honoured_as_by_trl(kind: str) -> None:
    """Three steps of one group: the same losses as TRL's own trainer."""
    options = {"max_steps": 3, **RUNS[kind]}
    family, dropout = ("GPT2", {"n_embd": 16, "n_head": 2, "n_layer": 1}), {"resid_pdrop": 0.5, "embd_pdrop": 0.5}
    losses = []
    paths = [False] if kind.endswith("on logits") else [True, False] if kind == "many" else [True]
    for make, more in ((trl_trainer, {}), *((trainer, {"fused_linear": fused}) for fused in paths)):
        model = model_of(family[0], 0, **family[1], **dropout)
        of = make(model, model_of(family[0], 1, **family[1]), pairs(["all"] * 8), **options, **more)
        of.train()
        losses.append(logged(of, "loss"))
    theirs, *ours = losses
    assert len(set(theirs)) == 3
    for one in ours:
        assert one == pytest.approx(theirs, rel=1e-4)
    if "padding" in kind:
        assert first_batch(of)["input_ids"].shape[1] % 16 == 0


def test_alpha_follows_the_preferences_of_a_list(tmp_path: Path) -> None:
    args = GroupRobustDPOConfig(str(tmp_path), loss_type=["sigmoid", "sft"], alpha_follows="preference", bf16=False)
    groups = GroupWeights(group_sizes=[3, 1], step_size=0.1)
    assert models.loss_for(None, groups, args).spec_of_alpha.loss_types == ("sigmoid",)
