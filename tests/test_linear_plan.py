"""The plans of the linear path: what each costs, which is taken, and what memory it makes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import grpo_kernels as gk
from grpo_kernels import doctor
from grpo_kernels.__main__ import main
from grpo_kernels.batch import Rows
from grpo_kernels.kernels import devices, linear, linear_plan, torch_chunked
from grpo_kernels.kernels.memory import on_huge_pages


@pytest.mark.parametrize(
    ("plan", "kept_rows", "needs_grad", "products"),
    [
        ("none", 0, (False, False), (1, 0)),
        ("frozen", 0, (True, False), (2, 0)),
        ("keep", 40, (True, True), (1, 2)),
        ("keep", 20, (True, True), (1, 2.5)),
        ("recompute", 0, (True, True), (1, 3)),
        ("recompute", 0, (False, True), (1, 2)),
    ],
)
def test_linear_plans_cost_what_they_say(
    plan: str, kept_rows: int, needs_grad: tuple[bool, bool], products: tuple
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # In bfloat16 dweight is a product and a sum: of addmm_ in place the counter knows nothing.
    hidden, weight = torch.randn(60, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    labels = torch.randint(0, 50, (60,))
    labels[::3] = -100  # 40 of 60 count
    one_product = 2 * 40 * 8 * 50
    head, rows = linear.LinearHead(weight, None), Rows(labels)
    chosen = linear_plan.LinearPlan(plan, 10, kept_rows, (*needs_grad, False), torch.float32)
    with FlopCounterMode(display=False) as counter:
        _, lse, kept = linear.linear_token_logps_forward(torch_chunked, hidden, head, rows, chosen)
    assert counter.get_total_flops() == products[0] * one_product
    if plan != "none":
        with FlopCounterMode(display=False) as counter:
            linear.linear_token_logps_backward(torch_chunked, torch.randn(60), hidden, head, rows, lse, chosen, kept)
        assert counter.get_total_flops() == products[1] * one_product


SLOW = devices.Device("slow", {2: 1e9, 4: 1e9, 8: 1e9}, 1e12, 0.0, 1 << 40, "products cost, and nothing else does")


def test_linear_plan_is_chosen_by_what_needs_gradients_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where products are all that costs: the fewest that fit, then the least memory."""
    monkeypatch.setattr(devices, "of", lambda device: SLOW)
    hidden, weight = (torch.zeros(2, 30, 4, requires_grad=True), torch.zeros(50, 4, requires_grad=True))
    row, of_rows = 50 * 4, 3 * 4 * 4

    def plan(*options, weight: Tensor = weight) -> tuple[str, int, float]:
        head, rows = linear.LinearHead(weight, None), Rows(torch.zeros(2, 30, dtype=torch.int64))
        chosen = linear_plan.plan_for(hidden, head, rows, linear_plan.Budget(*options))
        return chosen.name, chosen.kept_rows, chosen.products

    assert plan() == ("keep", 60, 3)
    assert plan(60 * (row + of_rows)) == ("keep", 60, 3)
    assert plan(60 * row - 1)[0] == "recompute"  # a chunk takes all of it
    assert plan(0) == ("recompute", 0, 4), "it is always possible"
    assert plan(10**6, "recompute") == ("recompute", 0, 4)
    assert plan(weight=weight.detach()) == ("frozen", 0, 2)
    monkeypatch.setattr(linear_plan, "GPU_CHUNK_ELEMENTS", 50 * 10)
    assert plan(40 * row + 10 * of_rows) == ("keep", 30, 3.5)
    with torch.no_grad():
        assert plan() == ("none", 0, 1)
    with pytest.raises(ValueError, match=r"got 'sweep': it needs the pairs' loss"):
        plan(10**6, "sweep")
    with pytest.raises(ValueError, match=r"got 'keep': max_extra_bytes=0 is too little for it"):
        plan(0, "keep")


@pytest.mark.parametrize(
    ("name", "chunk", "kept", "products", "extra", "traffic"),
    [
        ("recompute", 150, 0, 4, 150 * (2000 + 48) + 32000, 3 * 400 * 2000 + 3 * 64000),  # the third chunk is smaller
        ("none", 100, 0, 1, 100 * (2000 + 48), 400 * 2000),
        ("frozen", 100, 0, 2, 100 * (2000 + 48) + 400 * 16, 3 * 400 * 2000),
        ("recompute", 100, 0, 4, 100 * (2000 + 48) + 32000, 3 * 400 * 2000 + 4 * 64000),
        ("recompute", 400, 0, 4, 400 * (2000 + 48), 3 * 400 * 2000),  # one chunk: no sum
        ("keep", 100, 400, 3, 400 * 2000 + 100 * 48 + 32000, 3 * 400 * 2000 + 4 * 64000),
        ("keep", 100, 200, 3.5, 300 * 2000 + 100 * 48 + 32000, 3 * 400 * 2000 + 4 * 64000),
        (
            "sweep",
            100,
            0,
            3,
            100 * (2000 + 48) + 400 * 16 + 2 * 32000,
            3 * 400 * 2000 + 4 * 64000 + 3 * 32000 + (32000 + 16000) + 2 * 400 * 16,  # the last two: scaled in the end
        ),
    ],
)
def test_plans_cost_what_was_worked_out_by_hand(
    name: str, chunk: int, kept: int, products: float, extra: int, traffic: int
) -> None:
    """bfloat16, 400 tokens, D 8, V 1000, sums in float32: a row of logits has 2000 bytes, the sums 32000."""
    device = devices.Device("gpu", {2: 1e9}, 1e8, 1e-6, 1 << 30, "round numbers")
    needs = {"none": (False, False, False), "frozen": (True, False, False)}.get(name, (True, True, False))
    shape = linear_plan.LinearShape(400, 8, 1000, 2, needs, device, accumulators=2)
    plan = linear_plan._plan(shape, name, chunk, kept)
    assert (plan.products, plan.extra_bytes) == (products, extra)
    one_product = max(2 * 400 * 8 * 1000 / 1e9, 400 / chunk * 2 * (8000 + chunk * 1008) / 1e8)
    assert plan.seconds == pytest.approx(products * one_product + traffic / 1e8 + -(-400 // chunk) * 12e-6)
    of_float32 = linear_plan._plan(replace(shape, weight_itemsize=4), name, chunk, kept)  # copied to bfloat16
    sums = {"recompute": 32000 * (chunk < 400), "keep": 32000}.get(name, 0)  # are the gradient itself
    assert of_float32.extra_bytes == extra + 8000 * 2 - sums
    on_cpu = linear_plan._plan(replace(shape, device=replace(device, name="cpu")), name, chunk, kept)
    sums_up = needs[1] and chunk < 400  # the product is written, read and widened
    first_read = products * (2 * 400 * 8 * 1000 / 1e9 + 400 / chunk * 2 * (8000 + chunk * 1008) / 1e8 - one_product)
    more_traffic = sums_up * -(-400 // chunk) * 2 * 8000 * 2 + extra  # and new memory is cleared
    assert on_cpu.seconds == pytest.approx(plan.seconds + first_read + more_traffic / 1e8)


def test_a_sweep_s_chunk_is_made_for_the_pairs_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packed rows twice the mean pair, for no length is read."""
    monkeypatch.setattr(linear_plan, "plan_of", lambda shape, *_: shape)
    head, budget = linear.LinearHead(torch.zeros(5, 4), None), linear_plan.Budget()
    padded, packed = Rows(torch.zeros(6, 3, dtype=torch.int64)), Rows(torch.zeros(20, dtype=torch.int64))
    packed = replace(packed, cu_seqlens=torch.tensor([0, 1, 2, 3, 4, 8, 12, 16, 20]))
    assert linear_plan.plan_for(torch.zeros(6, 3, 4), head, padded, budget).longest_pair == 6
    assert linear_plan.plan_for(torch.zeros(20, 4), head, packed, budget).longest_pair == 10


def test_the_head_of_a_language_model() -> None:
    """With the memory that is the default on an H200, three products and little more; a plan that is here is found."""
    h200 = devices.named("h200")
    best, *others = doctor.linear_plans("8x2048x4096x128256", "bfloat16", h200)
    least = doctor.three_products("8x2048x4096x128256", "bfloat16", h200)
    assert least == pytest.approx(6 * 16384 * 4096 * 128256 / 720e12)
    assert best.products == 3
    assert best.seconds <= 1.08 * least
    assert best.extra_bytes <= h200.memory_bytes / 16
    assert {plan.name for plan in others} == {"sweep", "recompute"}
    shape = linear_plan.LinearShape(16384, 4096, 128256, 2, (True, True, False), h200)
    small = linear_plan.plan_of(shape, 1 << 20)
    assert small.name == "recompute"
    assert small.extra_bytes >= 4 * 4096 * 128256, "the sums are counted, and cannot be done without"
    large = linear_plan.plan_of(shape, 1 << 40)
    assert large.extra_bytes < 8 << 30, "no more than helps"


class Allocations(TorchDispatchMode):
    """(dtype, shape) of each tensor that is made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, torch.Size]] = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        out = function(*arguments, **(kwargs or {}))
        if isinstance(out, Tensor) and not function.is_view and "out" not in (kwargs or {}):
            given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
            if out.untyped_storage().data_ptr() not in given:
                self.made.append((out.dtype, out.shape))
        return out


def test_sums_take_no_temporary_of_their_size() -> None:
    """On a CPU, in bfloat16 with sums in float32: what is allocated while a chunk's product is added is small."""
    vocab, hidden_size = 6000, 1024  # larger than PRODUCT_ELEMENTS
    sums = torch.zeros(vocab, hidden_size)
    unit, rows = torch.randn(5, vocab).bfloat16(), torch.randn(5, hidden_size).bfloat16()
    with Allocations() as allocations:
        linear.add_products(sums, None, unit, rows, torch.ones(5, 1))
    assert max(shape.numel() for _, shape in allocations.made) < sums.numel()
    exact = unit.double().t() @ rows.double()
    assert (sums - exact).abs().max() <= 2**-8 * exact.abs().max(), "one rounding of a product to bfloat16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_chunk_is_summed_up_in_nothing(dtype: torch.dtype) -> None:
    """Its product is the weight's gradient; of the weight's size nothing else is made, in no dtype."""
    hidden, weight = torch.randn(2, 8, 16).to(dtype), torch.randn(40, 16).to(dtype)
    labels = torch.randint(0, 40, (2, 8))
    labels[0, :3] = -100
    head, rows = linear.LinearHead(weight, None), Rows.of("hidden", hidden, 40, labels, {})
    made = {}
    for chunk_rows in (16, 8):
        plan = linear_plan.LinearPlan("recompute", chunk_rows, 0, (True, True, False), torch.float32)
        token_logps, lse, kept = linear.linear_token_logps_forward(torch_chunked, hidden, head, rows, plan)
        with Allocations() as allocations:
            linear.linear_token_logps_backward(
                torch_chunked, torch.ones_like(token_logps), hidden, head, rows, lse, plan, kept
            )
        made[chunk_rows] = [kind for kind, shape in allocations.made if shape == weight.shape]
    assert made[16] == [dtype]
    assert made[8][0] == torch.float32, "of two chunks there is a sum"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's huge pages")
def test_large_memory_is_asked_for_in_huge_pages() -> None:
    def flags_of(x: Tensor) -> list[str]:
        """Of the mapping that holds the middle of x."""
        address, holds = x.data_ptr() + x.nbytes // 2, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            first = line.split()[0]
            if "-" in first:
                begin, end = (int(bound, 16) for bound in first.split("-"))
                holds = begin <= address < end
            elif holds and first == "VmFlags:":
                return line.split()[1:]
        return []

    plain, x = torch.empty(1 << 26), torch.empty(1 << 26)
    assert on_huge_pages(x) is x
    assert "hg" in flags_of(x)
    assert "hg" not in flags_of(plain)
    x.fill_(1)
    assert x.sum() == x.numel()


def test_a_frozen_head_keeps_no_float32_of_bfloat16() -> None:
    """LoRA: of hidden's size there are G weight and dhidden, both in hidden's dtype, and nothing else."""
    hidden, weight = torch.randn(2, 200, 24).bfloat16(), torch.randn(50, 24).bfloat16()
    labels = torch.randint(0, 50, (2, 200))
    head, rows = linear.LinearHead(weight, None), Rows(labels)
    plan = linear_plan.LinearPlan("frozen", 40, 0, (True, False, False), torch.float32)
    with Allocations() as allocations:
        _, lse, kept = linear.linear_token_logps_forward(torch_chunked, hidden, head, rows, plan)
        dlogps = torch.randn(2, 200)
        dhidden, *_ = linear.linear_token_logps_backward(torch_chunked, dlogps, hidden, head, rows, lse, plan, kept)
    assert kept.dtype == dhidden.dtype == torch.bfloat16
    large = [dtype for dtype, shape in allocations.made if shape[-1:] == (24,) and shape.numel() >= hidden.numel()]
    assert large == [torch.bfloat16, torch.bfloat16]
    assert torch.equal(dhidden, (kept * dlogps.unsqueeze(-1)).bfloat16())


def test_without_gradients_a_chunk_is_as_large_as_memory_allows() -> None:
    """The reference's pass: one product, whose weight is read as seldom as can be."""
    h200 = devices.named("h200")
    shape = linear_plan.LinearShape(16384, 4096, 128256, 2, (False, False, False), h200)
    plans = [linear_plan.plan_of(shape, memory << 20) for memory in (64, 256, 1 << 20)]
    assert [(plan.name, plan.products) for plan in plans] == [("none", 1)] * 3
    for plan, memory in zip(plans[:2], (64, 256), strict=True):
        twice = linear_plan._plan(shape, "none", 2 * plan.chunk_rows, 0)
        assert plan.extra_bytes <= memory << 20 < twice.extra_bytes
    assert plans[2].seconds <= 1.02 * 2 * 16384 * 4096 * 128256 / 720e12 + 16384 * 128256 * 2 / 4.3e12


def test_a_shard_of_the_vocabulary_has_one_plan() -> None:
    hidden, head = torch.zeros(2, 3, 4, requires_grad=True), linear.LinearHead(torch.zeros(5, 4), None)
    rows = Rows(torch.zeros(2, 3, dtype=torch.int64), vocab_shard=gk.VocabShard(0, 5, None))
    for plan in ("auto", "recompute"):
        assert linear_plan.plan_for(hidden, head, rows, linear_plan.Budget(plan=plan)).name == "recompute"
    for plan in ("keep", "sweep"):
        with pytest.raises(ValueError, match=f"plan must be 'auto' or 'recompute' with vocab_shard, got '{plan}'"):
            linear_plan.plan_for(hidden, head, rows, linear_plan.Budget(plan=plan))


@pytest.mark.parametrize("wrong", [1e9, 200.5, True, None, "auto "])
def test_memory_is_a_whole_number_of_bytes(wrong: object) -> None:
    """A float made a plan that no buffer could be allocated for."""
    with pytest.raises(TypeError, match="max_extra_bytes must be 'auto' or a whole number, got"):
        linear_plan.Budget(wrong)


def test_linear_options_are_checked() -> None:
    hidden, weight, labels = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    for options, message in (
        ({"max_extra_bytes": -1}, "max_extra_bytes must be finite and in"),
        ({"plan": "fast"}, "plan must be one of"),
        ({"softcap": 0.0}, "softcap must be finite and in"),
        ({"logit_scale": 0.0}, "logit_scale must not be 0"),
        ({"accumulate_dtype": torch.float16}, "accumulate_dtype must be"),
    ):
        with pytest.raises(ValueError, match=message):
            gk.linear_sequence_logps(hidden, weight, labels, **options)
        with pytest.raises(ValueError, match=message):
            gk.LinearGroupRobustLoss(gk.GroupWeights(2, estimator="group_mean", step_size=1.0), **options)


def test_doctor_shows_the_plans(capsys: pytest.CaptureFixture) -> None:
    asked = ["doctor", "--linear", "8x512x512x32000", "--dtype", "float32", "--device", "b200"]
    assert main([*asked, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert {plan["name"] for plan in plans} == {"sweep", "keep", "recompute"}
    assert all(plan["of_three_products"] >= 1 for plan in plans)
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("predicted, not measured (NVIDIA B200")
    assert lines[2].split()[0] == plans[0]["name"]
    assert main(["doctor", "--linear", "8x512x512x32000", "--device", "b2000"]) == 2
    assert "device must be one of cpu, a100, h100, h200, b200, got 'b2000'" in capsys.readouterr().err
    for sizes in ("8x512x512", "8x512x512x0", "8x512xax5"):
        assert main(["doctor", "--linear", sizes]) == 2
        assert f"got '{sizes}'" in capsys.readouterr().err
