"""The C++ kernels of the CPU: every instruction set of the build that runs here, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import truth
from torch import Tensor

_C = pytest.importorskip("grpo_kernels._C", reason="the extension is not built")

from grpo_kernels.kernels import native  # noqa: E402

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=_C.build_info()["compiled"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in _C.instruction_sets():
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setattr(native, "INSTRUCTION_SET", request.param)
    return request.param


def plain(logits: Tensor, labels: Tensor, dtoken_logps: Tensor) -> tuple[Tensor, Tensor]:
    """(token_logps, dlogits) by plain PyTorch."""
    leaf = logits.detach().clone().requires_grad_()
    wide = leaf if leaf.dtype == torch.float64 else leaf.float()
    picked = torch.log_softmax(wide, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    token_logps = torch.where(labels == -100, 0.0, picked)
    (grad,) = torch.autograd.grad(token_logps, leaf, dtoken_logps.to(token_logps.dtype))
    return token_logps.detach(), grad


def kernels(
    logits: Tensor, labels: Tensor, dtoken_logps: Tensor, out: Tensor | None = None, **options: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(token_logps, lse, dlogits); the gradient is written over NaN."""
    token_logps, lse = native.token_logps_forward(logits, labels, -100, **options)
    if out is None:
        out = torch.full(logits.shape, torch.nan, dtype=logits.dtype)
    native.token_logps_backward(dtoken_logps.to(lse.dtype), logits, labels, lse, -100, out, **options)
    return token_logps, lse, out


def check(logits: Tensor, labels: Tensor) -> None:
    """Values, lse and gradients of logits (N, V) within the budget."""
    scale = torch.linspace(-1.5, 2, labels.numel(), dtype=torch.float64).view(labels.shape)
    exact_logps, slopes = truth.token_terms(logits, labels)
    plain_logps, plain_grad = plain(logits, labels, scale)
    token_logps, lse, grad = kernels(logits, labels, scale)
    truth.assert_within_budget(token_logps, exact_logps, plain_logps, "token_logps")
    counted = labels != -100
    peak = logits.double().amax(-1)
    log_sum = (logits.double() - peak.unsqueeze(-1)).exp().sum(-1).log()
    assert torch.equal(lse[..., 0].double(), torch.where(counted, peak, 0))
    tolerance = (16 if lse.dtype == torch.float64 else 4) * torch.finfo(lse.dtype).eps
    torch.testing.assert_close(lse[..., 1].double(), torch.where(counted, log_sum, 0), rtol=tolerance, atol=tolerance)
    truth.assert_within_budget(grad, scale.unsqueeze(-1) * slopes, plain_grad, "dlogits")


def rows(num_rows: int, vocab: int, dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    logits = (3 * torch.randn(num_rows, vocab, dtype=torch.float64) + offset).to(dtype)
    labels = torch.randint(0, vocab, (num_rows,))
    labels[1::4] = -100
    return logits, labels


# -- arithmetic ----------------------------------------------------------------------------------------------------


def test_exp_is_within_one_ulp(instruction_set: str) -> None:
    x = torch.cat([torch.linspace(-87.6, 88, 200_001), -torch.rand(50_000), torch.zeros(1)])
    got = torch.empty_like(x)
    _C.testing.vector_exp(instruction_set, x.data_ptr(), got.data_ptr(), x.numel())
    exact = x.double().exp()
    ulp = 2.0 ** (exact.log2().floor() - 23)
    worst = ((got.double() - exact).abs() / ulp)[exact > 2.0**-125].max().item()
    assert worst < 1.01
    assert got[-1] == 1


def test_exp_far_out(instruction_set: str) -> None:
    x = torch.tensor([-torch.inf, -3e38, -1e4, -88.1, -87.8, torch.nan])
    got = torch.empty_like(x)
    _C.testing.vector_exp(instruction_set, x.data_ptr(), got.data_ptr(), x.numel())
    assert got[:5].tolist() == [0.0] * 5
    assert got[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail(instruction_set: str, dtype: torch.dtype) -> None:
    for vocab in range(1, 71):
        check(*rows(3, vocab, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [4095, 4096, 4097, 10_007])
def test_several_blocks(instruction_set: str, dtype: torch.dtype, vocab: int) -> None:
    logits, labels = rows(6, vocab, dtype)
    labels[0], labels[2] = 0, vocab - 1
    logits[0, -1] = logits[2, 0] = logits[3, vocab // 2] = 30  # the largest comes last, first, in the middle
    labels[3] = vocab // 2
    check(logits, labels)


@pytest.mark.parametrize("offset", [-1e4, -20.0, 40.0, 1e4])
def test_far_away_logits_keep_their_digits(instruction_set: str, offset: float) -> None:
    check(*rows(8, 777, torch.float32, offset))
    check(*rows(8, 777, torch.float64, offset))
    check(*rows(8, 777, torch.bfloat16, offset))
    if abs(offset) < 1e4:
        check(*rows(8, 777, torch.float16, offset))
    # Confident tokens: of the others' softmax only what is far below 1 is left.
    logits, labels = rows(8, 777, torch.float32, offset)
    logits[torch.arange(8), labels.clamp(min=0)] += 25
    check(logits, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_logits(instruction_set: str, dtype: torch.dtype) -> None:
    logits, labels = torch.full((2, 30_011), -7.25, dtype=dtype), torch.tensor([0, 30_010])
    token_logps, lse, grad = kernels(logits, labels, torch.ones(2))
    log_v = torch.tensor(30_011, dtype=torch.float64).log()
    torch.testing.assert_close(token_logps.double(), -log_v.expand(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(lse.double().sum(-1), log_v.expand(2) - 7.25, rtol=3e-7, atol=0)
    torch.testing.assert_close(grad[0, 1:].double(), torch.full((30_010,), -1 / 30_011).double(), rtol=4e-3, atol=1e-7)


def test_underflow_is_zero(instruction_set: str) -> None:
    logits = torch.full((1, 100), -1e4)
    logits[0, 3] = 1e4
    token_logps, lse, grad = kernels(logits, torch.tensor([3]), torch.ones(1))
    assert (token_logps.item(), *lse[0].tolist()) == (0.0, 1e4, 0.0)
    assert (grad == 0).all()
    assert kernels(logits, torch.tensor([5]), torch.ones(1))[0].item() == -2e4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 17, 4095, 4096, 9_000])
def test_values_that_are_not_finite(instruction_set: str, dtype: torch.dtype, where: int) -> None:
    logits, _ = rows(5, 9_001, dtype)
    logits[0, where] = torch.nan
    logits[1, where] = torch.inf
    logits[2] = -torch.inf
    logits[3, :where] = -torch.inf  # whole blocks of -inf, and a label among them
    logits[4] = -torch.inf
    logits[4, where] = torch.nan
    labels = torch.tensor([5, 5, 5, max(0, where - 1), 5])
    scale = torch.ones(5, dtype=torch.float64)
    got_logps, got_lse, got_grad = kernels(logits, labels, scale)
    plain_logps, plain_grad = plain(logits, labels, scale)
    torch.testing.assert_close(got_logps, plain_logps, equal_nan=True)
    torch.testing.assert_close(got_grad, plain_grad, equal_nan=True)
    assert got_lse.sum(-1)[[0, 1, 4]].isnan().all()
    assert got_lse[2].sum() == -torch.inf


# -- reading and writing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW)
def test_every_number_is_read(instruction_set: str, dtype: torch.dtype) -> None:
    """One number among -inf is its own lse: all 65536 of them, in each lane."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    logits = torch.full((2**16, 64), -torch.inf, dtype=dtype)
    logits[torch.arange(2**16), torch.arange(2**16) % 64] = numbers
    _, lse = native.token_logps_forward(logits, torch.zeros(2**16, dtype=torch.int64), -100)
    finite, lse = numbers.isfinite(), lse.sum(-1)
    assert torch.equal(lse[finite], numbers[finite].float())
    assert torch.equal(lse[numbers == -torch.inf], torch.tensor([-torch.inf]))
    assert lse[numbers.isnan() | (numbers == torch.inf)].isnan().all()


@pytest.mark.parametrize("dtype", NARROW)
def test_results_are_rounded_to_nearest_even(instruction_set: str, dtype: torch.dtype) -> None:
    """Softmax exactly 1 beside a label of -inf: the gradient is -dtoken_logps and +dtoken_logps, rounded once."""
    patterns = torch.randint(-(2**31), 2**31, (60_000,)).to(torch.int32).view(torch.float32)
    steps = torch.arange(2**15, dtype=torch.int32)  # bfloat16's halfway points, and their neighbours
    ties = torch.cat([(steps << 16) + low for low in (0x7FFF, 0x8000, 0x8001)]).view(torch.float32)
    halves = torch.arange(2**15).to(torch.int16).view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2  # float16's
    nan_payload = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    scale = torch.cat([patterns, ties, middles, torch.nextafter(middles, torch.tensor(0.0)), nan_payload])
    logits = torch.tensor([[-torch.inf, 0.0]], dtype=dtype).expand(scale.numel(), 2)
    labels = torch.zeros(scale.numel(), dtype=torch.int64)
    _, _, grad = kernels(logits, labels, scale)
    finite = scale.isfinite()
    expected = torch.stack([scale, -scale], 1).to(dtype)
    assert torch.equal(grad[finite], expected[finite])
    assert grad[scale.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_change_no_bit(instruction_set: str, dtype: torch.dtype) -> None:
    shape = (3, 4, 4133)
    logits = torch.randn(shape).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:2])
    labels[1, 2] = -100
    scale = torch.randn(3, 4)
    expected = kernels(logits, labels, scale)
    for shift in (1, 2, 3):  # rows that begin off every boundary
        flat = torch.full((logits.numel() + shift,), torch.nan, dtype=dtype)
        flat[shift:] = logits.flatten()
        unaligned = flat[shift:].view(shape)
        assert all(
            map(torch.equal, kernels(unaligned, labels, scale, torch.empty_like(flat)[shift:].view(shape)), expected)
        )
    for order in ((0, 2, 1), (2, 1, 0), (2, 0, 1), (1, 0, 2)):
        back = [order.index(i) for i in range(3)]
        view = logits.permute(order).contiguous().permute(back)
        out = torch.full(shape, torch.nan, dtype=dtype).permute(order).contiguous().permute(back)
        assert all(map(torch.equal, kernels(view, labels, scale, out), expected))
        assert all(map(torch.equal, kernels(view, labels, scale), expected)), "strided logits, contiguous gradient"
    # Gradient over the logits, in a tensor whose gaps nobody may touch.
    for steps in ((1, 1, 2), (2, 1, 1), (1, 3, 1), (2, 2, 2)):
        wide = torch.full([n * step for n, step in zip(shape, steps, strict=True)], 7.0, dtype=dtype)
        view = wide[:: steps[0], :: steps[1], :: steps[2]]
        view.copy_(logits)
        assert all(map(torch.equal, kernels(view, labels, scale, view), expected))
        view.fill_(7.0)
        assert (wide == 7).all()
    packed = kernels(logits.flatten(0, 1), labels.flatten(), scale.flatten())
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(packed, expected, strict=True))


def test_strided_and_expanded_rows(instruction_set: str) -> None:
    logits, labels = torch.randn(4, 6, 33), torch.randint(0, 33, (4, 6))
    scale = torch.randn(4)
    expected = kernels(logits, labels, scale[:, None].repeat(1, 6))
    _, lse, _ = expected
    for odd_labels in (labels.int(), labels.t().contiguous().t(), labels.repeat_interleave(2, 1)[:, ::2]):
        out = torch.full_like(logits, torch.nan)
        native.token_logps_backward(
            scale[:, None].expand(4, 6), logits, odd_labels, lse.transpose(0, 1).contiguous().transpose(0, 1), -100, out
        )
        assert torch.equal(out, expected[2])
        assert torch.equal(native.token_logps_forward(logits, odd_labels, -100)[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_outside_the_vocabulary(instruction_set: str, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 50).to(dtype)
    labels = torch.tensor([-1, 50, 3, 2**40, -(2**40), -100])
    logits[5] = torch.nan
    token_logps, lse, grad = kernels(logits, labels, torch.ones(6))
    bad = torch.tensor([True, True, False, True, True, False])
    for result in (token_logps, lse, grad):
        assert torch.equal(result.isnan().view(6, -1).all(1), bad)
        assert torch.equal(result.isnan().view(6, -1).any(1), bad)
        assert (result[5] == 0).all()
    other, _ = native.token_logps_forward(logits, labels, 3)
    assert other[2] == 0, "ignore_index is an argument"


def test_threads_change_no_bit(instruction_set: str) -> None:
    for dtype in DTYPES:
        logits, labels = rows(301, 4003, dtype)
        scale = torch.randn(301)
        expected = kernels(logits, labels, scale, num_threads=1)
        for num_threads in (2, 3, 64):
            got = kernels(logits, labels, scale, num_threads=num_threads)
            assert all(map(torch.equal, got, expected))


def test_nothing_to_do() -> None:
    for shape in ((0, 5), (3, 0, 5), (0, 3, 5)):
        token_logps, lse, grad = kernels(torch.randn(shape), torch.zeros(shape[:-1]).long(), torch.zeros(shape[:-1]))
        assert token_logps.shape == shape[:-1]
        assert lse.shape == (*shape[:-1], 2)
        assert grad.shape == shape


# -- misuse --------------------------------------------------------------------------------------------------------


def test_misuse_names_the_argument() -> None:
    logits, labels = torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)
    forward, backward = native.token_logps_forward, native.token_logps_backward
    token_logps, lse = forward(logits, labels, -100)
    with pytest.raises(ValueError, match=r"logits must have shape \(S, T, V\) or \(N, V\), got \(9,\)"):
        forward(logits[0], labels, -100)
    with pytest.raises(TypeError, match=r"logits must be float32, .* got torch.int64"):
        forward(logits.long(), labels, -100)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), got \(3,\)"):
        forward(logits, labels[:3], -100)
    with pytest.raises(TypeError, match=r"labels must be int64 or int32, got torch\.int16"):
        forward(logits, labels.short(), -100)
    with pytest.raises(ValueError, match="labels must be on the CPU, got meta"):
        forward(logits, labels.to("meta"), -100)
    for name, bad in (("out", torch.empty(4, 8)), ("lse", lse[:3]), ("dtoken_logps", token_logps.double())):
        arguments = {"dtoken_logps": token_logps, "lse": lse, "out": torch.empty(4, 9), name: bad}
        with pytest.raises(ValueError, match=f"{name} must be"):
            backward(logits=logits, labels=labels, ignore_index=-100, **arguments)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, "avx1024", r"instruction_set must be one of instruction_sets\(\), got 'avx1024'"),
        (1, "int8", "dtype must be float32, bfloat16, float16 or float64, got 'int8'"),
        (2, (1, -1, 5), "positions must be at least 0, got -1"),
        (2, (-2, 1, 5), "sequences must be at least 0, got -2"),
        (2, (1, 1, -3), "vocab_size must be at least 0, got -3"),
        (6, 2, "label_bytes must be 4 or 8, got 2"),
        (11, 0, "num_threads must be at least 1, got 0"),
    ],
)
def test_the_extension_refuses(position: int, value: object, message: str) -> None:
    arguments = ["baseline", "float32", (0, 0, 5), 0, (0, 5, 1), 0, 8, (0, 1), -100, 0, 0, 1]
    _C.token_logps_forward(*arguments)
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        _C.token_logps_forward(*arguments)


# -- the build -----------------------------------------------------------------------------------------------------


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={folder}", "build", f"--build-base={folder}"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_without_the_extension(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    assert build(tmp_path, GRPO_KERNELS_BUILD="none").returncode == 0
    # An editable install's finder would find the extension of the checkout.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "import grpo_kernels as gk; print(gk.__file__, gk.backends()['cpp'])"
    )
    (lib,) = tmp_path.glob("lib*")
    shown = subprocess.run([sys.executable, "-c", code], cwd=lib, capture_output=True, text=True, check=True).stdout
    assert str(lib) in shown
    assert "the extension is not built: pip install -e . with a C++ compiler" in shown


def test_a_build_that_fails(tmp_path: Path) -> None:
    """auto says what is missing and goes on; cpu does not go on."""
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    broken = {"CC": "no-such-compiler", "CXX": "no-such-compiler", "NVCC": "no-such-compiler"}
    auto = build(tmp_path, GRPO_KERNELS_BUILD="auto", **broken)
    assert auto.returncode == 0, auto.stderr
    assert "It needs a C++17 compiler" in auto.stderr
    must = build(tmp_path, GRPO_KERNELS_BUILD="cpu", **broken)
    assert must.returncode != 0
    assert "It needs a C++17 compiler" in must.stderr
    unknown = build(tmp_path, GRPO_KERNELS_BUILD="fast")
    assert "GRPO_KERNELS_BUILD must be auto, cpu, cuda or none, got 'fast'" in unknown.stderr
