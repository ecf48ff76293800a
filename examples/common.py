"""What the examples share: a tiny model, and pairs whose groups disagree about which token is better."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

import grpo_kernels as gk

VOCAB, LENGTH, PAIRS = 32, 6, 12


class TinyModel(nn.Module):
    """Tokens (S, T) to logits (S, T, V)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(tokens)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))


def pairs_of_rank(step: int, rank: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(tokens, labels, group_ids, ref_logps) of a rank's part of the step's batch, chosen sequences first."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (2, PAIRS, LENGTH), generator=generator)
    labels = torch.randint(0, VOCAB, (2, PAIRS, LENGTH), generator=generator)
    group_ids = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), PAIRS, replacement=True, generator=generator)
    labels[0, :, -1] = group_ids  # each group likes a token of its own
    labels[1, :, -1] = (group_ids + 1) % 3
    labels[:, :, :2] = -100  # the prompt
    mine = slice(PAIRS * rank // num_ranks, PAIRS * (rank + 1) // num_ranks)
    ref_logps = torch.full((2 * (mine.stop - mine.start),), -14.0)
    return tokens[:, mine].flatten(0, 1), labels[:, mine].flatten(0, 1), group_ids[mine], ref_logps


def show(step: int, out: gk.GroupRobustOutput) -> None:
    """A line every five steps, on one rank."""
    if step % 5 == 4 and (not dist.is_initialized() or dist.get_rank() == 0):
        print(f"step {step + 1}: loss {out.loss.item():.6f}, alpha {[round(a, 6) for a in out.alpha.tolist()]}")


def run_on_ranks(train: Callable[[], None]) -> None:
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()  # when train's model is gone: it holds the group, too
