"""The options of `python -m grpo_kernels train`, and every rule on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grpo_kernels import validation
from grpo_kernels.functional import preference_losses
from grpo_kernels.groups.sampling import STRATEGIES
from grpo_kernels.kernels import dispatch


@dataclass(frozen=True)
class TrainConfig:
    """The options of `train`; help texts are in __main__.py."""

    data: str | None = None
    eval_data: str | None = None
    eval_fraction: float = 0.2
    model: str | None = None
    hidden_size: int = 64
    num_layers: int = 2
    vocab_size: int = 512
    max_length: int = 256
    loss: str = "sigmoid"
    beta: float = 0.1
    step_size: float | None = None
    sampling: str = "pooled"
    compare: bool = False
    steps: int = 300
    sft_steps: int = 150
    batch_size: int = 32
    learning_rate: float = 1e-3
    sft_learning_rate: float = 1e-3
    eval_every: int = 25
    checkpoint_every: int = 50
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    out: str | None = None

    def __post_init__(self) -> None:
        """Every rule on an option, before anything is written or trained.

        Raises:
            ValueError, TypeError, NotImplementedError: the message names the option.
        """
        whole = ("hidden_size", "num_layers", "max_length", "steps", "batch_size", "eval_every", "checkpoint_every")
        for name, least in (*((name, 1) for name in whole), ("sft_steps", 0), ("vocab_size", 258)):
            value = getattr(self, name)
            validation.check_number(name, value, least)
            if not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value}")
        for name in ("beta", "learning_rate", "sft_learning_rate"):
            validation.check_number(name, getattr(self, name), 0.0, open_low=True)
        validation.check_number("eval_fraction", self.eval_fraction, 0.0, 1.0, open_low=True, open_high=True)
        if self.step_size is not None:
            validation.check_number("step_size", self.step_size, 0.0)
        if self.hidden_size % (64 if self.hidden_size >= 64 else 2):
            raise ValueError(f"hidden_size must be a multiple of 64, or even and below 64, got {self.hidden_size}")
        validation.check_choice("loss", self.loss, ("sigmoid", "ipo"))
        validation.check_choice("sampling", self.sampling, STRATEGIES)
        dispatch.select(self.backend, dispatch.Request("logits", (), torch.float32, self.resolved_device))

    @property
    def resolved_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device must be one that works here, got {self.device!r}: {error}") from error
        return torch.device(self.device)


def resolved_step_size(config: TrainConfig) -> float:
    """eta; by default 0.05 in units of the loss at margin 0, so that DPO and IPO move alpha alike.

    log 2 for "sigmoid", 1 / (4 beta^2) for "ipo".
    """
    if config.step_size is not None:
        return config.step_size
    at_zero = preference_losses(torch.zeros(2), beta=config.beta, loss_type=config.loss).item()
    return 0.05 / at_zero
