from __future__ import annotations

import os

import pytest
import torch

# Without a GPU the Triton kernels run in its interpreter, which has to be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import grpo_kernels as gk


def usable_backends() -> list[str]:
    return [name for name, reasons in gk.backends().items() if not reasons]


@pytest.fixture(params=usable_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that can run here."""
    return request.param


def one_rounding(dtype: torch.dtype, backend: str) -> float:
    """Relative error of storing a number: half an ulp; a whole one where Triton's interpreter truncates to bfloat16."""
    truncates = backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    return torch.finfo(dtype).eps / (1 if truncates else 2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def batch(
    num_pairs: int = 3, length: int = 7, vocab: int = 13, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (2B, T, V) that require grad, labels (2B, T) with prompts and padding ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * num_pairs, length)
    logits = (3 * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, shape, generator=generator)
    for s in range(2 * num_pairs):
        labels[s, : s % 3] = -100
        labels[s, length - (s + 1) % 3 :] = -100 if (s + 1) % 3 else labels[s, length:]
    return logits, labels
