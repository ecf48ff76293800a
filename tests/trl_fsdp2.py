"""Accelerate's FSDP2 on CPUs, for the ranks of test_trl_ranks.py: training that is stopped and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.accelerator
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"], "state_dict_type": "SHARDED_STATE_DICT"}
# Saved after 2 of 4 steps. AdamW's state is in the checkpoint; its epsilon keeps it from dividing rounding by rounding.
OPTIONS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "adam_epsilon": 0.1}


class OnCPUs(AcceleratorState):
    """Accelerate takes its FSDP plugin on accelerators only."""

    def __init__(self, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def results_of(make: Callable[..., Any], world: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Of a run, and of one that goes on from its checkpoint: ``make(folder, **options)`` gives the trainer."""
    options = {**OPTIONS, "per_device_train_batch_size": 4 // world}
    if world > 1:
        accelerate.accelerator.AcceleratorState = OnCPUs  # in this process of a rank
        options |= {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": FSDP2}
    results = {}
    for name, checkpoint in (("whole", None), ("resumed", str(folder / "fsdp2-whole" / "checkpoint-2"))):
        of = make(folder / f"fsdp2-{name}", **options)
        of.train(resume_from_checkpoint=checkpoint)
        parameters = dict(of.model.named_parameters())
        assert all(hasattr(value, "full_tensor") for value in parameters.values()) == (world > 1), "sharded"
        results[name] = {
            "parameters": {key: whole(value.detach()).clone() for key, value in parameters.items()},
            "alpha": of.group_weights.alpha,
            "history": [record for record in of.state.log_history if "loss" in record],
        }
    return results
