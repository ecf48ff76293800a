"""What an engine does with the gradients of data-parallel ranks: average them or add them up.

DistributedDataParallel, FSDP2 and DeepSpeed say so. Where nobody does, a `Probe` measures it at the first step of an
optimizer, and refuses the step if it is not what was taken for granted. It cannot be put there unasked: gradients that
were clipped or scaled before the step look as if they were reduced otherwise.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

UNKNOWN = "unknown"
MAX_ELEMENTS = 4096
# Of the ratio that is measured: clipping or bfloat16's rounding at most; the two answers differ by the number of ranks.
NEAR = 0.1


def of_engine(model: nn.Module, num_ranks: int) -> str:
    """ "mean", "sum", or UNKNOWN where the model is in no engine that says so.

    Raises:
        ValueError: the engine does neither, or over ranks that are no multiple of the data-parallel ``num_ranks``.
    """
    found = {answer for module in model.modules() for answer in _answers(module, num_ranks)}
    if len(found) > 1:
        raise ValueError(f"model must reduce all gradients alike, its parts say {sorted(found)}")
    return found.pop() if found else UNKNOWN


def _answers(module: nn.Module, num_ranks: int) -> list[str]:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        _check_size("DistributedDataParallel", dist.get_world_size(module.process_group), num_ranks)
        return [UNKNOWN if module._comm_hooks else "mean"]
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and isinstance(module, deepspeed.DeepSpeedEngine):
        return ["mean" if module.gradient_average else "sum"]
    fsdp2 = sys.modules.get("torch.distributed.fsdp")  # where nobody imported it, nothing is sharded by it
    if fsdp2 is None or not isinstance(module, fsdp2.FSDPModule):
        return []
    return [_of_factor(group, num_ranks) for group in module._get_fsdp_state()._fsdp_param_groups]


def _of_factor(param_group: Any, num_ranks: int) -> str:
    size = param_group.mesh_info.mesh.size()
    _check_size("fully_shard", size, num_ranks)
    factor = param_group.gradient_divide_factor
    if factor is None or factor == size:
        return "mean"
    if factor == 1:
        return "sum"
    raise ValueError(
        f"model must average gradients over {size} ranks or add them up, its set_gradient_divide_factor({factor:g}) "
        "does neither"
    )


def _check_size(engine: str, size: int, num_ranks: int) -> None:
    if size % num_ranks:
        raise ValueError(
            f"process_group must be the data-parallel ranks, or a part of those that {engine} averages over: "
            f"{num_ranks} ranks against {size}"
        )


def check_not_summed(of_model: Tensor) -> None:
    """Refuse "mean" where FSDP2 adds up: modules that it shards within the model leave nodes in the autograd graph.

    (The root leaves none, for its inputs are tokens, and nor do other engines.) "sum" is believed where FSDP2 averages:
    a loop may multiply the loss by the number of ranks, as NeMo-RL's does.

    Raises:
        ValueError: all such modules have the divide factor 1.
    """
    nodes: list[Any] = [of_model.grad_fn]
    seen: set[Any] = set()
    factors = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes.extend(before for before, _ in node.next_functions)
        if type(node).__name__ == "RegisterPostBackwardFunctionBackward":
            factors.add(node.param_group.gradient_divide_factor)
    if factors == {1}:
        check_answer("sum", "mean")


def check_answer(of_engine: str, taken_for: str) -> None:
    if of_engine not in (UNKNOWN, taken_for):
        raise ValueError(
            f"gradient_reduction must be {of_engine!r}, for so the model's engine reduces, got {taken_for!r}"
        )


class Probe:
    """Compares one parameter's gradient, as the first step of an optimizer finds it, with the ranks' own.

    Several micro-batches of the step are added up. A gradient of 0, or one that is not finite, tells nothing: then the
    next step is looked at.
    """

    def __init__(self, model: nn.Module, taken_for: str, process_group: dist.ProcessGroup | None) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("model must have a parameter that requires a gradient")
        # A vector near the loss, such as the last norm's: small, and of a gradient that is not 0.
        self.parameter = ([p for p in trainable if p.dim() == 1] or trainable)[-1]
        self.taken_for, self.process_group = taken_for, process_group
        self.own: Tensor | None = None
        optimizers = sys.modules["torch.optim.optimizer"]
        self._handles = [
            self.parameter.register_hook(self._add),
            optimizers.register_optimizer_step_pre_hook(self._check),
        ]

    def _add(self, grad: Tensor) -> None:
        part = _part(grad)
        self.own = part if self.own is None else self.own + part

    def _check(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if all(p is not self.parameter for group in optimizer.param_groups for p in group["params"]):
            return
        size = dist.get_world_size(self.process_group)
        total = torch.zeros_like(_part(self.parameter)) if self.own is None else self.own
        dist.all_reduce(total, group=self.process_group)
        self.own = None
        reduced = None if self.parameter.grad is None else _part(self.parameter.grad)
        ratio = float("nan") if reduced is None else float(reduced @ total / (total @ total))
        if ratio != ratio or ratio in (0.0, float("inf")):
            return
        assert reduced is not None
        is_multiple = float((reduced - ratio * total).norm()) <= NEAR * float(reduced.norm())
        near = [name for name, r in (("mean", 1 / size), ("sum", 1.0)) if is_multiple and abs(ratio / r - 1) <= NEAR]
        if not near:
            raise RuntimeError(
                "gradient_reduction must be given, 'mean' or 'sum': the first gradient of a parameter is "
                f"{ratio:.3g} x the sum of the {size} ranks' own, which is neither. Was it clipped or scaled before "
                "the step, or not reduced at all?"
            )
        if near != [self.taken_for]:
            raise RuntimeError(
                f"gradient_reduction must be {near[0]!r}, for so the gradients of {size} ranks were reduced; with "
                f"{self.taken_for!r} the step would be {size if self.taken_for == 'mean' else 1 / size:g} times as long"
            )
        for handle in self._handles:
            handle.remove()


def _part(x: Tensor) -> Tensor:
    return x.detach().reshape(-1)[:MAX_ELEMENTS].double()
