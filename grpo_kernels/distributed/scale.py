"""What the loss costs at scale, by arithmetic: memory of a rank, bytes of each collective, its share of a step.

docs/distributed.md shows `table`; tests hold the numbers against what the package really allocates and sends.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Head:
    """A language model as the loss sees it: ``parameters`` in all, hidden states (D), vocabulary (V)."""

    name: str
    parameters: float
    hidden_size: int
    vocab_size: int


# Llama 3's three sizes.
HEADS = (Head("8B", 8.0e9, 4096, 128_256), Head("70B", 70.6e9, 8192, 128_256), Head("405B", 405.9e9, 16_384, 128_256))
TOKENS = (8192, 32_768, 131_072)


def saved_bytes_a_token() -> int:
    """What the logits path keeps from forward to backward besides the logits: lse in two parts, float32."""
    return 8


def logits_bytes(tokens: int, vocab_size: int, vocab_ranks: int = 1, itemsize: int = 2) -> int:
    """A rank's logits; the in-place backward writes the gradient over them."""
    return tokens * -(-vocab_size // vocab_ranks) * itemsize


def dweight_bytes(head: Head, vocab_ranks: int = 1) -> int:
    """The linear path's float32 accumulator of the head's gradient."""
    return -(-head.vocab_size // vocab_ranks) * head.hidden_size * 4


def group_statistics_bytes(num_groups: int) -> int:
    """One all-reduce a forward (or a step, with total_pairs) over the data-parallel ranks: sums, counts and a clock."""
    return 8 * (2 * num_groups + 2)


def vocabulary_gather_bytes(tokens: int) -> int:
    """What a rank sends in the one all-gather of a sharded vocabulary: (lse, label's logit) in float64."""
    return 2 * 8 * tokens


def context_sum_bytes(num_sequences: int) -> int:
    """One all-reduce over the context-parallel ranks: (sum, count) of each sequence in float64."""
    return 2 * 8 * num_sequences


def head_share_of_step(head: Head) -> float:
    """The head's three matrix products against 6 * parameters * tokens operations of the whole step."""
    return 6 * head.hidden_size * head.vocab_size / (6 * head.parameters)


def table() -> str:
    """Markdown: one row for each head and number of counted tokens on a rank, the vocabulary over 1 and 8 ranks."""
    lines = [
        "| head | tokens a rank | logits, 1 rank | logits, 8 ranks | saved | gather | head's share of a step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for head in HEADS:
        for tokens in TOKENS:
            one, eight = (logits_bytes(tokens, head.vocab_size, ranks) / MIB for ranks in (1, 8))
            cells = [
                head.name,
                f"{tokens:,}",
                f"{one:,.0f} MiB",
                f"{eight:,.0f} MiB",
                f"{saved_bytes_a_token() * tokens / MIB:.2f} MiB",
                f"{vocabulary_gather_bytes(tokens) / MIB:.2f} MiB",
                f"{head_share_of_step(head):.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
