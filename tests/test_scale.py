"""The calculator of docs/distributed.md against what the package allocates and sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import batch

import grpo_kernels as gk
from grpo_kernels.__main__ import main
from grpo_kernels.batch import Rows
from grpo_kernels.distributed import context_parallel, group_sync, mesh, scale, vocab_parallel
from grpo_kernels.kernels import devices, dispatch
from grpo_kernels.kernels.linear import LinearHead
from grpo_kernels.kernels.linear_plan import Budget, plan_for

DOCUMENT = Path(__file__).parent.parent / "docs" / "distributed.md"


class Sent(list):
    """Collects the bytes of collectives instead of sending them."""

    def all_reduce(self, tensor: torch.Tensor, **_: object) -> None:
        self.append(tensor.nbytes)

    def all_gather_into_tensor(self, out: torch.Tensor, tensor: torch.Tensor, **_: object) -> None:
        self.append(tensor.nbytes)
        out.copy_(tensor)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    collected = Sent()
    monkeypatch.setattr(dist, "all_reduce", collected.all_reduce)
    monkeypatch.setattr(dist, "all_gather_into_tensor", collected.all_gather_into_tensor)
    monkeypatch.setattr(dist, "get_world_size", lambda _=None: 1)
    return collected


def test_group_statistics(sent: Sent) -> None:
    clock = torch.zeros(3, dtype=torch.int64)
    group_sync.sum_over_ranks(torch.zeros(7), torch.zeros(7, dtype=torch.int64), None, clock)
    assert sent == [scale.group_statistics_bytes(7)]


def test_vocabulary_gather(sent: Sent) -> None:
    labels = torch.zeros(3, 5, dtype=torch.int64)
    vocab_parallel.merge(torch.zeros(3, 5), torch.zeros(3, 5, 2), labels, -100, None)
    assert sent == [scale.vocabulary_gather_bytes(15)]


def test_context_sum(sent: Sent) -> None:
    context_parallel.SumOverRanks.apply(torch.zeros(2, 6, dtype=torch.float64), None)
    assert sent == [scale.context_sum_bytes(6)]


def test_saved_bytes(backend: str) -> None:
    if backend == "reference":
        return
    logits, labels = batch(dtype=torch.bfloat16)
    _, lse = dispatch.kernels_of(backend).token_logps_forward(logits.detach(), labels, -100)
    assert lse.nbytes == scale.saved_bytes_a_token() * labels.numel()
    assert logits.nbytes == scale.logits_bytes(labels.numel(), logits.shape[-1])


def test_dweight_bytes() -> None:
    head = scale.Head("small", 1e3, 5, 13)
    dweight = torch.zeros(head.vocab_size, head.hidden_size, dtype=torch.float32)
    assert dweight.nbytes == scale.dweight_bytes(head)
    assert scale.dweight_bytes(head, 4) == 4 * 5 * 4  # the largest of uneven shards


def test_shares() -> None:
    assert 0.06 < scale.head_share_of_step(scale.HEADS[0]) < 0.07
    shares = [scale.head_share_of_step(head) for head in scale.HEADS]
    assert shares == sorted(shares, reverse=True)


def test_the_document_is_current() -> None:
    text = DOCUMENT.read_text()
    assert scale.table() in text
    for head in scale.HEADS:
        assert f"{scale.dweight_bytes(head) / 2**30:.1f} GiB for {head.name}" in text
    for name in (
        "GroupWeights(process_group=",
        "VocabShard(start, stop, process_group)",
        "total_pairs",
        "context_group",
    ):
        assert name in text
    assert gk.VocabShard(0, 1, None).stop == 1
    table = mesh.table(devices.named("h100"))
    assert f"<!-- mesh -->\n{table}<!-- /mesh -->" in text, (
        "docs/distributed.md is not what grpo_kernels.distributed.mesh says"
    )


@pytest.mark.parametrize("tensor_ranks", [1, 4])
def test_a_rank_has_the_plan_that_the_linear_path_takes(tensor_ranks: int) -> None:
    """Of its part of the batch and the head, on this machine's CPU."""
    hidden, weight = (
        torch.zeros(6, 50, 8, requires_grad=True),
        torch.zeros(-(-70 // tensor_ranks), 8, requires_grad=True),
    )
    shard = None if tensor_ranks == 1 else gk.VocabShard(0, weight.shape[0], None)
    rows = Rows(torch.zeros(6, 50, dtype=torch.int64), vocab_shard=shard)
    taken = plan_for(hidden, LinearHead(weight, None), rows, Budget(), accumulators=1)
    of_mesh = mesh.Mesh(dp=3, tp=tensor_ranks, pp=2)
    cost = mesh.cost_of_rank((6, 50, 8, 70), of_mesh, torch.float32, devices.named("cpu"))
    assert cost.plan == taken
    assert (cost.tokens, cost.vocab_columns) == (300, weight.shape[0])
    assert (cost.dhidden_bytes, cost.dweight_bytes) == (hidden.nbytes, weight.nbytes)
    split = mesh.cost_of_rank(
        (6, 50, 8, 70), mesh.Mesh(dp=3, tp=tensor_ranks, cp=5), torch.float32, devices.named("cpu")
    )
    assert split.tokens == 60
    assert split.summed_bytes - scale.context_sum_bytes(6) == cost.summed_bytes - (cost.dhidden_bytes * 4 // 5) * (
        tensor_ranks > 1
    )


def test_a_mesh_from_the_command_line(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--linear", "2x8192x405B", "--mesh", "dp=128,tp=8,pp=16,ep=32", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "16,384 x h100" in out
    assert "16,384 tokens and 16,032 columns" in out
    assert main(["doctor", "--linear", "2x8192x405B", "--mesh", "dp=2,cp=2", "--device", "h100", "--json"]) == 0
    assert '"gpus": 4' in capsys.readouterr().out
    for wrong, text in (
        ("--linear 2x8x70B --mesh dp=2,xp=2", "mesh must be like dp=32,tp=8"),
        ("--linear 2x8x70B --mesh dp=0", "mesh must be like"),
        ("--linear 2x8x70B --mesh dp=4,ep=3", "an ep that divides dp * cp = 4"),
        ("--linear 2x8x70B --mesh cp=16", "leave each rank a position"),
        ("--linear 2x8x7B --mesh dp=2", "and one of 8B, 70B, 405B"),
        ("--mesh dp=2", "mesh belongs to --linear"),
    ):
        assert main(["doctor", *wrong.split()]) == 2
        assert text in capsys.readouterr().err
