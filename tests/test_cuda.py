"""The CUDA kernels without a GPU: their source on the block simulator, and compiled by nvcc where there is one.

With a GPU tests/test_gpu.py runs the real ones. The shared tests take the simulated ones as backend `cuda-simulated`.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from pathlib import Path

import fused_cases
import pytest
import simulated_cuda
import torch
import torch.nn.functional as F
import truth
from conftest import EMPTY_BY_DESIGN, SIMULATED, batch
from fused_cases import IDS, METHODS, assert_any_number_of_groups, calls_with_vectors, loss_of, packed_calls, two_calls

from grpo_kernels.kernels import cuda, dispatch, gate

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch):
    """kernels/cuda.py over the simulator; every torch.empty is filled with NaN."""
    if simulated_cuda.missing():
        pytest.skip(simulated_cuda.missing())
    module = simulated_cuda.simulated()
    monkeypatch.setattr(cuda, "launches", module)
    torch.use_deterministic_algorithms(True)
    yield module
    torch.use_deterministic_algorithms(False)


def rows(vocab: int, dtype: torch.dtype, num_rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (3 * torch.randn(num_rows, vocab)).to(dtype)
    labels = torch.randint(0, vocab, (num_rows,))
    labels[0], labels[1], labels[num_rows - 2] = vocab - 1, 0, -100
    return logits, labels


def check(logits: torch.Tensor, labels: torch.Tensor, out: torch.Tensor | None = None, **options: int) -> None:
    got, lse = cuda.token_logps_forward(logits, labels, -100, **options)
    exact, slopes = truth.token_terms(logits, labels)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-6)
    out = torch.full_like(logits, torch.nan) if out is None else out
    upstream = torch.linspace(-1, 2, labels.numel(), dtype=lse.dtype).view(labels.shape)
    cuda.token_logps_backward(upstream, logits, labels, lse, -100, out)
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(out.double(), upstream.double().unsqueeze(-1) * slopes, rtol=max(2e-6, eps), atol=1e-6)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 16, 33, 129, 511, 512, 513, 2048, 2049, 4103])
def test_any_vocabulary(dtype: torch.dtype, vocab: int) -> None:
    check(*rows(vocab, dtype))


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("vocab", [1, 31, 600, 5003])
def test_any_number_of_splits(splits: int, vocab: int) -> None:
    check(*rows(vocab, torch.float32), splits=splits)
    check(*rows(vocab, torch.bfloat16), splits=splits)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("stride", [300, 301, 304])
def test_rows_that_begin_anywhere(dtype: torch.dtype, offset: int, stride: int) -> None:
    """Neighbours of a row hold huge numbers: reading one column too many would show, and writing one too."""
    vocab = 290
    storage = torch.full((offset + 5 * stride + 16,), 3e4).to(dtype)
    view = storage.as_strided((5, vocab), (stride, 1), offset)
    values, labels = rows(vocab, dtype)
    view.copy_(values)
    check(view, labels)
    check(view, labels, out=view)
    untouched = torch.ones_like(storage, dtype=torch.bool)
    untouched.as_strided((5, vocab), (stride, 1), offset).fill_(False)
    assert (storage[untouched] == torch.tensor(3e4).to(dtype)).all()


@pytest.mark.usefixtures("simulated")
def test_strided_vocabulary_and_labels() -> None:
    logits, labels = rows(70, torch.float32)
    check(logits.t().contiguous().t(), labels)
    check(logits, labels, out=torch.full((70, 5), torch.nan).t())
    check(logits, labels.int().repeat_interleave(3)[::3])


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_outside_the_vocabulary(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 50).to(dtype)
    labels = torch.tensor([-1, 50, 3, 2**40, -(2**40), -100])
    logits[5] = torch.nan
    for splits in (1, 3):
        token_logps, lse = cuda.token_logps_forward(logits, labels, -100, splits=splits)
        grad = torch.zeros_like(logits)
        cuda.token_logps_backward(torch.ones_like(token_logps), logits, labels, lse, -100, grad)
        bad = torch.tensor([True, True, False, True, True, False])
        for result in (token_logps, lse, grad):
            assert torch.equal(result.isnan().view(6, -1).all(1), bad)
            assert torch.equal(result.isnan().view(6, -1).any(1), bad)
            assert (result[5] == 0).all()


@pytest.mark.usefixtures("simulated")
def test_far_out_logits() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf], [1e4, 1e4, -1e4], [-3e4, -3e4, -3e4], [0.0, torch.nan, 0.0]])
    token_logps, _ = cuda.token_logps_forward(logits, torch.tensor([1, 0, 2, 0]), -100)
    torch.testing.assert_close(token_logps, torch.tensor([0.0, -(2.0**0.5), 0, 0]).log().new_tensor(
        [0.0, -0.6931472, -1.0986123, torch.nan]
    ), equal_nan=True)  # fmt: skip


# -- the fused forward -----------------------------------------------------------------------------------------------


assert_same_method = functools.partial(fused_cases.assert_same_method, SIMULATED)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(("loss_options", "group_options"), METHODS)
def test_fused_is_the_method(loss_options: dict, group_options: dict) -> None:
    assert_same_method(loss_options, group_options, two_calls())


@pytest.mark.usefixtures("simulated")
def test_fused_with_vectors_for_each_pair() -> None:
    assert_same_method({}, {}, calls_with_vectors())


@EMPTY_BY_DESIGN
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("average", [False, True])
def test_fused_packed_with_empty_sequences(splits: int, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "row_splits", lambda *_: splits)
    assert_same_method({"average_log_prob": average}, {}, packed_calls())


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("num_groups", [1, 64, 65, 5000])
@pytest.mark.parametrize("estimator", ["importance", "group_mean"])
def test_fused_with_any_number_of_groups(num_groups: int, estimator: str) -> None:
    assert_any_number_of_groups(assert_same_method, num_groups, estimator)


@EMPTY_BY_DESIGN
@pytest.mark.usefixtures("simulated")
def test_fused_with_many_pairs_and_long_sequences() -> None:
    logits, labels = batch(num_pairs=70, length=2, vocab=5)
    ids = torch.arange(70) * 7 % 3
    assert_same_method({"reference_free": True}, {}, [((logits, labels, ids), {})])
    logits, labels = batch(num_pairs=1, length=150, vocab=5)
    assert_same_method({"reference_free": True}, {}, [((logits, labels, ids[:1]), {})])


@EMPTY_BY_DESIGN
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("shape", [(4, 0, 7), (0, 3, 7), (0, 0, 7)])
def test_fused_without_rows(shape: tuple[int, int, int]) -> None:
    logits, labels = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape[:2], dtype=torch.int64)
    assert_same_method({}, {}, [((logits, labels, IDS[: shape[0] // 2], torch.zeros(shape[0])), {})])


@pytest.mark.usefixtures("simulated")
def test_fused_bad_ids_and_labels_give_nan_and_keep_alpha() -> None:
    logits, labels = batch(num_pairs=4)
    far = torch.tensor([0, 2**40, 1, 1])
    for ids, bad_labels in ((far, labels), (torch.tensor([0, -1, 1, 1]).int(), labels), (IDS, labels + 5)):
        loss_fn = loss_of(SIMULATED, {"reference_free": True})
        with pytest.warns(RuntimeWarning, match="not finite"):
            out = loss_fn(logits.detach(), bad_labels, ids)
        assert out.loss.isnan()
        assert int(loss_fn.group_weights.skipped_updates) == 1
        torch.testing.assert_close(loss_fn.group_weights.alpha, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_any_order_of_blocks_and_threads_gives_the_same_bits(simulated) -> None:
    (logits, labels, ids, ref), _ = two_calls()[0]
    results = []
    for seed in range(4):
        simulated.seed(seed)
        leaf = logits.detach().float().requires_grad_()
        out = loss_of(SIMULATED, {})(leaf, labels, ids, ref)
        (grad,) = torch.autograd.grad(out.loss, leaf)
        results.append((out.loss, out.pair_losses, out.chosen_logps, out.alpha, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("simulated")
def test_padded_packed_and_longer_agree() -> None:
    logits, labels = batch(num_pairs=4, dtype=torch.float32)
    padded = loss_of(SIMULATED, {"reference_free": True})(logits, labels, IDS)
    ends = torch.tensor(list(itertools.accumulate([7] * 8, initial=0)))
    flat = logits.detach().flatten(0, 1)
    packed = loss_of(SIMULATED, {"reference_free": True})(flat, labels.flatten(), IDS, None, ends.int())
    longer, more = F.pad(logits.detach(), (0, 0, 0, 3), value=torch.nan), F.pad(labels, (0, 3), value=-100)
    padded_more = loss_of(SIMULATED, {"reference_free": True})(longer, more, IDS)
    for other in (packed, padded_more):
        assert torch.equal(padded.pair_losses, other.pair_losses)
        assert torch.equal(padded.loss, other.loss)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("splits", [1, 2])
def test_rows_of_no_sequence(splits: int) -> None:
    fused_cases.assert_rows_of_no_sequence(cuda, splits)


# -- launches --------------------------------------------------------------------------------------------------------


def test_an_error_of_a_launch_reaches_python(simulated) -> None:
    logits, labels = rows(9, torch.float32)
    simulated.fail_next_launch()
    with pytest.raises(RuntimeError, match=r"logps_fwd_kernel: an error that a test asked for \(cudaErrorSimulated\)"):
        cuda.token_logps_forward(logits, labels, -100)


@pytest.mark.usefixtures("simulated")
def test_misuse_names_the_argument() -> None:
    logits, labels = rows(9, torch.float32)
    _, lse = cuda.token_logps_forward(logits, labels, -100)
    with pytest.raises(TypeError, match=r"logits must be float32, .* got torch.int64"):
        cuda.token_logps_forward(logits.long(), labels, -100)
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\)"):
        cuda.token_logps_forward(logits, labels[:3], -100)
    with pytest.raises(ValueError, match="out must be"):
        cuda.token_logps_backward(lse[..., 0], logits, labels, lse, -100, logits.double())
    with pytest.raises(ValueError, match="rows must be at least 0, got -1"):
        cuda.launches.logps_forward((0, 0), "float32", (-1, 1, 9, 1, -100), (0, 0, 9, 1), (0, 8), (0, 0, 0))


def test_which_builds_run_on_which_device() -> None:
    build = "nvcc 13.0.88, sm_80 sm_90a sm_100 compute_80"
    assert all(dispatch.runs_on(build, c) for c in ((8, 0), (8, 9), (9, 0), (10, 3), (12, 0)))
    assert not dispatch.runs_on(build, (7, 5))
    assert not dispatch.runs_on("nvcc 13.0.88, sm_90a", (10, 0))
    assert dispatch.runs_on("nvcc 13.0.88, sm_90a", (9, 0))
    assert not dispatch.runs_on("nvcc 13.0.88, sm_89", (8, 6))


def test_cuda_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    request = dispatch.Request("logits", (2, 3, 5), torch.float32, torch.device("cpu"))
    monkeypatch.setattr(dispatch, "EXTENSION_PROBLEM", None)
    monkeypatch.setattr(dispatch, "CUDA_BUILD", None)
    with pytest.raises(NotImplementedError, match="built without CUDA kernels"):
        dispatch.select("cuda", request)
    monkeypatch.setattr(dispatch, "CUDA_BUILD", "nvcc 13.0.88, sm_90a")
    if not torch.cuda.is_available():
        with pytest.raises(NotImplementedError, match="there is no CUDA device"):
            dispatch.select("cuda", request)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as rocm:
        rocm.setattr(torch.version, "hip", "6.4")
        with pytest.raises(NotImplementedError, match="this PyTorch is for ROCm"):
            dispatch.select("cuda", request)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(NotImplementedError, match="logits are on cpu, needs a CUDA device"):
        dispatch.select("cuda", request)
    on_gpu = dispatch.Request("logits", (2, 3, 5), torch.float32, torch.device("cuda", 0))
    with pytest.raises(
        NotImplementedError, match=r"capability is 8\.0, the kernels were built by nvcc 13\.0\.88, sm_90a"
    ):
        dispatch.select("cuda", on_gpu)


def test_a_barrier_that_not_all_threads_reach_is_found(tmp_path: Path) -> None:
    if simulated_cuda.missing():
        pytest.skip(simulated_cuda.missing())
    source = tmp_path / "divergent.cpp"
    source.write_text(
        '#include "cuda_runtime.h"\n#include <cstdio>\n'
        "void kernel(int) { if (threadIdx.x < 40) __syncthreads(); }\n"
        "int main() { try { GRPO_LAUNCH(kernel, dim3(1), 64, nullptr, 0); }\n"
        "  catch (const std::exception& e) { std::puts(e.what()); } }\n"
    )
    program = tmp_path / "divergent"
    include = f"-I{ROOT / 'tests' / 'simulator'}"
    subprocess.run([simulated_cuda.COMPILER, "-std=c++17", include, str(source), "-o", str(program)], check=True)
    said = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert "divergent barriers" in said


# -- nvcc ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(gate.nvcc_missing() is not None, reason=str(gate.nvcc_missing()))
def test_the_gate_passes() -> None:
    """One architecture; `doctor --kernels` takes three."""
    pytest.importorskip("triton", reason="its wheel has the disassembler")
    reports = gate.nvcc_reports(("90a",))
    assert gate.problems(reports) == []
    found = {(one.kernel, one.dtype): one for one in reports}
    for kernel in ("group_robust_fwd_kernel", "logps_fwd_kernel", "logps_bwd_kernel"):
        for dtype in ("float32", "bfloat16", "float16"):
            one = found[kernel, dtype]
            assert one.hot is not None
            assert one.hot.wide_loads == 4
            assert one.predicted_fraction is not None
    assert ("group_robust_finish_kernel", "float32") in found


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("pybind11")
    command = [sys.executable, "setup.py", "-q", "egg_info", f"--egg-base={folder}", "build", f"--build-base={folder}"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_build_without_nvcc(tmp_path: Path) -> None:
    """GRPO_KERNELS_BUILD=cuda says what is missing, and stops."""
    ran = build(tmp_path, GRPO_KERNELS_BUILD="cuda", NVCC="no-such-nvcc")
    assert ran.returncode != 0
    assert "the CUDA kernels were not built" in ran.stderr
    assert "They need nvcc on the PATH, or named in NVCC" in ran.stderr


def test_auto_goes_on_without_an_nvcc_that_works(tmp_path: Path) -> None:
    """To the C++ kernels (here without a compiler, which takes less time), and from them to pure Python."""
    ran = build(tmp_path, GRPO_KERNELS_BUILD="auto", NVCC="false", CC="no-such-compiler", CXX="no-such-compiler")
    assert ran.returncode == 0, ran.stderr
    assert "They need nvcc on the PATH, or named in NVCC" in ran.stderr
    assert "The rest is built without them." in ran.stderr
    assert "It needs a C++17 compiler" in ran.stderr
