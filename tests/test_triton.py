"""The Triton kernels beyond what every backend is tested for: splits, alignments, the fused forward, compilation.

Without a GPU they run in Triton's interpreter. There programs run one after another, so these tests see wrong
arithmetic and wrong tickets, but no races.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import fused_cases
import pytest
import torch
import torch.nn.functional as F
import truth
from conftest import EMPTY_BY_DESIGN, batch
from fused_cases import (
    IDS,
    METHODS,
    SIZES,
    assert_any_number_of_groups,
    assert_rows_of_no_sequence,
    calls_with_vectors,
    packed_calls,
    two_calls,
)

import grpo_kernels as gk
from grpo_kernels.batch import Pairs, Rows

if gk.backends()["triton"]:
    pytest.skip("; ".join(gk.backends()["triton"]), allow_module_level=True)

from grpo_kernels.kernels import gate
from grpo_kernels.kernels import group_robust as tables
from grpo_kernels.kernels import triton as kernels
from grpo_kernels.kernels.rows import empty_gradient
from grpo_kernels.kernels.triton import group_robust, launch, logps, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Every torch.empty is filled with NaN (or the largest integer): an output left unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 128 columns, so that a small vocabulary takes several, and several splits."""
    for key in tiles.TILES:
        monkeypatch.setitem(tiles.TILES, key, tiles.Tile(128, 1, "for the tests"))


def rows(vocab: int, dtype: torch.dtype, num_rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (3 * torch.randn(num_rows, vocab)).to(dtype)
    labels = torch.randint(0, vocab, (num_rows,))
    labels[0], labels[1], labels[num_rows - 2] = vocab - 1, 0, -100
    return logits.to(DEVICE), labels.to(DEVICE)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 257, 640])
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_any_vocabulary_and_splits(vocab: int, splits: int) -> None:
    logits, labels = rows(vocab, torch.float32)
    got, lse = logps.token_logps_forward(logits, labels, -100, splits=splits)
    exact, slopes = truth.token_terms(logits.cpu(), labels.cpu())
    torch.testing.assert_close(got.cpu().double(), exact, rtol=2e-6, atol=2e-6)
    out = torch.full_like(logits, torch.nan)
    upstream = torch.linspace(-1, 2, 5, device=DEVICE)
    logps.token_logps_backward(upstream, logits, labels, lse, -100, out)
    torch.testing.assert_close(out.cpu().double(), upstream.cpu().double()[:, None] * slopes, rtol=3e-6, atol=1e-7)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # float16 is as wide
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("stride", [300, 301, 304])
def test_rows_that_begin_anywhere(dtype: torch.dtype, offset: int, stride: int) -> None:
    """Neighbours of a row hold huge numbers: reading one column too many would show, and writing one too."""
    vocab = 290
    storage = torch.full((offset + 5 * stride + 16,), 3e4, device=DEVICE).to(dtype)
    view = storage.as_strided((5, vocab), (stride, 1), offset)
    values, labels = rows(vocab, dtype)
    view.copy_(values)
    got, lse = logps.token_logps_forward(view, labels, -100)
    exact, slopes = truth.token_terms(values.cpu(), labels.cpu())
    torch.testing.assert_close(got.cpu().double(), exact, rtol=2e-6, atol=2e-6)
    logps.token_logps_backward(torch.ones(5, device=DEVICE), view, labels, lse, -100, view)
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(view.cpu().double(), slopes, rtol=tolerance, atol=1e-6)
    untouched = torch.ones_like(storage, dtype=torch.bool)
    untouched.as_strided((5, vocab), (stride, 1), offset).fill_(False)
    assert (storage[untouched] == torch.tensor(3e4).to(dtype)).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_label_dtypes_and_strided_labels(dtype: torch.dtype) -> None:
    logits, labels = rows(40, torch.float32)
    strided = labels.to(dtype).repeat_interleave(3)[::3]
    expected, _ = logps.token_logps_forward(logits, labels, -100)
    got, _ = logps.token_logps_forward(logits, strided, -100)
    assert torch.equal(got, expected)


class RecordedLaunches(list):
    """Stands in for a kernel and notes the grids it would have been launched with."""

    def __getitem__(self, grid):
        return lambda *_, **__: self.append(grid)


def test_grids_stay_within_the_limits_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """T > 65535, more than 2**24 rows, more than 2**31 logits: x may go to 2**31 - 1, y to 65535."""
    launches = RecordedLaunches()
    for module, kernel in ((logps, "_logps_fwd_kernel"), (logps, "_logps_bwd_kernel"), (logps, "_merge_splits_kernel")):
        monkeypatch.setattr(module, kernel, launches)
    monkeypatch.setattr(group_robust, "_group_robust_fwd_kernel", launches)
    for shape in ((2, 70_000, 128_256), (2, 2**23 + 1, 32_000), (2, 1, 10_000_000)):
        logits = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        labels = torch.empty(shape[:2], dtype=torch.int64, device="meta")
        _, lse = logps.token_logps_forward(logits, labels, -100)
        logps.token_logps_backward(lse[..., 0], logits, labels, lse, -100, logits)
        state = gk.GroupWeights(group_sizes=SIZES, step_size=0.3).to("meta")
        pairs = Pairs(labels[:1, 0])
        group_robust.group_robust_forward(logits, Rows(labels), pairs, state.fused_state("inline"))
    assert len(launches) >= 9
    for grid in launches:
        assert grid[0] < 2**31
        assert all(y <= 65_535 for y in grid[1:])


# -- the fused forward -----------------------------------------------------------------------------------------------


loss_of = functools.partial(fused_cases.loss_of, device=DEVICE)
assert_same_method = functools.partial(fused_cases.assert_same_method, "triton", device=DEVICE)


@pytest.mark.parametrize(("loss_options", "group_options"), METHODS)
def test_fused_is_the_method(loss_options: dict, group_options: dict) -> None:
    assert_same_method(loss_options, group_options, two_calls())


def test_fused_with_vectors_for_each_pair() -> None:
    assert_same_method({}, {}, calls_with_vectors())
    for name in ("beta", "margin", "weights"):
        assert_same_method({}, {}, calls_with_vectors((name,))[:1])


@EMPTY_BY_DESIGN
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("average", [False, True])
def test_fused_packed_with_empty_sequences(splits: int, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_robust, "row_splits", lambda *_: splits)
    monkeypatch.setattr(group_robust, "BLOCK_T", 4)  # sequences take several blocks
    assert_same_method({"average_log_prob": average}, {}, packed_calls())


@pytest.mark.parametrize("num_groups", [1, 256, 257, 600])
@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
def test_fused_with_any_number_of_groups(num_groups: int, estimator: str) -> None:
    assert_any_number_of_groups(assert_same_method, num_groups, estimator)


def test_fused_with_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_robust, "BLOCK_B", 4)  # 9 pairs take several blocks
    logits, labels = batch(num_pairs=9, vocab=5)
    ids = torch.tensor([0, 2, 1, 0, 0, 2, 1, 1, 0])
    assert_same_method({"reference_free": True}, {}, [((logits, labels, ids), {})])


@EMPTY_BY_DESIGN
@pytest.mark.parametrize("shape", [(4, 0, 7), (0, 3, 7), (0, 0, 7)])
def test_fused_without_rows(shape: tuple[int, int, int]) -> None:
    logits, labels = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:2], dtype=torch.int64)
    call = ((logits, labels, IDS[: shape[0] // 2], torch.zeros(shape[0])), {})
    assert_same_method({"reference_free": False}, {}, [call])


def test_fused_bad_ids_and_labels_give_nan_and_keep_alpha() -> None:
    logits, labels = batch(num_pairs=4)
    for ids, bad_labels in (
        (torch.tensor([0, 3, 1, 1]), labels),
        (torch.tensor([0, -1, 1, 1]), labels),
        (IDS, labels + 5),
    ):
        loss_fn = loss_of("triton", {"reference_free": True})
        with pytest.warns(RuntimeWarning, match="not finite") if DEVICE == "cpu" else pytest.MonkeyPatch.context():
            out = loss_fn(logits.detach().to(DEVICE), bad_labels.to(DEVICE), ids.to(DEVICE))
        assert out.loss.isnan()
        assert int(loss_fn.group_weights.skipped_updates) == 1
        torch.testing.assert_close(loss_fn.group_weights.alpha.cpu(), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_tickets_survive_any_order_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last program to arrive finishes, whichever it is: the result is the same to the bit."""
    if DEVICE != "cpu":
        pytest.skip("the order of programs is the GPU's own")
    from triton.runtime import interpreter

    (logits, labels, ids, ref), _ = two_calls()[0]
    logits = logits.detach().float()
    results = []
    for order in ("given", "reversed", "shuffled"):
        loss_fn = loss_of("triton", {})
        with monkeypatch.context() as patch:
            if order != "given":
                reorder_programs(patch, interpreter, order)
            out = loss_fn(logits, labels, ids, ref)
        results.append((out.loss, out.pair_losses, out.chosen_logps, out.alpha))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def reorder_programs(patch: pytest.MonkeyPatch, interpreter, order: str) -> None:
    builder = interpreter.interpreter_builder
    original = builder.set_grid_idx
    generator = torch.Generator().manual_seed(5)
    maps: dict[int, list[int]] = {}

    def reordered(x: int, y: int, z: int) -> None:
        count = builder.grid_dim[0]
        if count not in maps:
            maps[count] = (
                list(reversed(range(count)))
                if order == "reversed"
                else torch.randperm(count, generator=generator).tolist()
            )
        original(maps[count][x], y, z)

    patch.setattr(builder, "set_grid_idx", reordered)


def test_fused_inplace_backward_writes_over_the_logits() -> None:
    logits, labels = batch(num_pairs=4)
    grads = []
    for inplace in (False, True):
        base = (logits.detach() * 1).to(DEVICE).requires_grad_()
        loss_fn = loss_of("triton", {"inplace_backward": inplace, "reference_free": True})
        (grad,) = torch.autograd.grad(loss_fn(base, labels.to(DEVICE), IDS.to(DEVICE)).loss, base)
        assert (grad.data_ptr() == base.data_ptr()) == inplace
        grads.append(grad)
    assert torch.equal(*grads)


# -- compilation without a GPU -----------------------------------------------------------------------------------------


COMPILE = """
import dataclasses, json, sys
from grpo_kernels.kernels import gate
from grpo_kernels.kernels.triton.compile_report import compile_variant, variant_of

reports = [
    compile_variant(variant_of(kernel, dtype, shape_class), target, [shape_class])
    for kernel, dtype, shape_class, target in json.loads(sys.argv[1])
]
print(json.dumps({"kernels": [dataclasses.asdict(one) for one in reports], "problems": gate.problems(reports)}))
"""

# The fewest that hold the claims; `doctor --kernels` compiles all.
COMPILED = [
    ("_group_robust_fwd_kernel", "bfloat16", "packed", 90),
    ("_group_robust_fwd_kernel", "bfloat16", "V odd", 100),
    ("_group_robust_fwd_kernel", "float32", "V % 16 == 8", 80),
    ("_logps_fwd_kernel", "bfloat16", "[:, :-1]", 100),
    ("_logps_fwd_kernel", "float16", "V % 16 == 8", 80),
    ("_logps_fwd_kernel", "bfloat16", "transposed", 90),
    ("_logps_bwd_kernel", "bfloat16", "packed", 90),
    ("_logps_bwd_kernel", "float32", "V % 16 == 8", 80),
    ("_merge_splits_kernel", "bfloat16", "V odd", 90),
    ("_group_robust_fwd_kernel", "bfloat16", "V odd", "gfx942"),
    ("_logps_bwd_kernel", "bfloat16", "V odd", "gfx950"),
]


def test_the_gate_passes() -> None:
    """No spill, 16-byte loads, four in flight, four blocks a multiprocessor, few instructions, no barrier in a loop."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(COMPILED)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["problems"] == []
    for one, (kernel, _, shape_class, target) in zip(report["kernels"], COMPILED, strict=True):
        if kernel == "_merge_splits_kernel" or shape_class == "transposed":
            continue
        assert one["hot"]["wide_loads"] == 4, one  # 64 bytes of each thread: all that it takes of the logits in a step
        assert isinstance(target, str) or 0.5 < one["predicted_fraction"] <= 1, one
        if "bwd" in kernel:
            assert one["hot"]["wide_stores"] >= 4, one


def test_every_contiguous_shape_takes_the_wide_path() -> None:
    """What the launch says of rows of a class; the gate looks at the code that this picks."""
    for name, make in gate.SHAPE_CLASSES.items():
        for dtype in (torch.bfloat16, torch.float32):
            of_rows = launch.layout(make(dtype), skipped=0)
            assert of_rows["STRIDED"] == (name == gate.STRIDED)
            assert of_rows["EDGES"] == (name not in ("V % 16 == 0", "V % 16 == 8", "packed, V % 16 == 0"))
            gradient = empty_gradient(make(dtype))
            assert launch.alike(make(dtype), gradient, 0, 0) == (name != gate.STRIDED), name


def test_logits_off_a_boundary_are_given_from_it() -> None:
    storage = torch.zeros(200, dtype=torch.bfloat16)
    origin, skipped = launch.aligned_origin(storage[13:].view(11, 17))
    assert (origin.data_ptr() - storage.data_ptr(), skipped) == (16, 5)
    assert launch.aligned_origin(storage[16:])[1] == 0


def test_tables_have_names_for_all_rows() -> None:
    """Two files number the rows of the tables: they agree because one imports the other."""
    from grpo_kernels.kernels.triton import finish

    for name in ("LOGPS", "REWARDS", "COEFFICIENTS", "TOKEN_SCALES", "PAIR_LOSSES", "SLOPES", "PAIR_FACTORS"):
        assert getattr(finish, name).value == getattr(tables, name)


@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_no_sequence(splits: int) -> None:
    """Rows behind the last sequence are not read; without any in a sequence the loss is still that of the pairs."""
    assert_rows_of_no_sequence(kernels, splits, DEVICE)


def test_padded_and_packed_agree() -> None:
    logits, labels = batch(num_pairs=4, dtype=torch.float32)
    padded = loss_of("triton", {"reference_free": True})(logits.to(DEVICE), labels.to(DEVICE), IDS.to(DEVICE))
    flat = logits.detach().flatten(0, 1).to(DEVICE)
    ends = torch.tensor(list(itertools.accumulate([7] * 8, initial=0)), device=DEVICE)
    packed = loss_of("triton", {"reference_free": True})(flat, labels.flatten().to(DEVICE), IDS.to(DEVICE), None, ends)
    assert torch.equal(padded.pair_losses, packed.pair_losses)
    assert torch.equal(padded.loss, packed.loss)


def test_padding_changes_nothing() -> None:
    logits, labels = batch(num_pairs=4)
    longer, more = F.pad(logits.detach(), (0, 0, 0, 3), value=torch.nan), F.pad(labels, (0, 3), value=-100)
    results = [
        loss_of("triton", {"reference_free": True})(x.to(DEVICE), y.to(DEVICE), IDS.to(DEVICE))
        for x, y in ((logits.detach(), labels), (longer, more))
    ]
    assert torch.equal(results[0].loss, results[1].loss)
