"""Which backend runs, and what is said when one cannot."""

from __future__ import annotations

import dataclasses
import importlib
import re
from types import ModuleType

import pytest
import torch
from conftest import SIMULATED, batch

import grpo_kernels as gk
from grpo_kernels.kernels import dispatch

REQUEST = dispatch.Request("logits", (2, 3, 5), torch.float32, torch.device("cpu"))


def default() -> str:
    """What `auto` takes on the CPU."""
    return "torch" if gk.backends()["cpp"] else "cpp"


@pytest.fixture
def fussy(monkeypatch: pytest.MonkeyPatch) -> dispatch.BackendEntry:
    """A preferred backend that has reasons to refuse."""
    entry = dispatch.BackendEntry(
        "fussy",
        "refuses the CPU",
        "grpo_kernels.kernels.torch_chunked",
        cannot_run=lambda request: ["logits are on cpu, needs a CUDA device"] if request.device.type == "cpu" else [],
    )
    monkeypatch.setattr(dispatch, "BACKENDS", [entry, *dispatch.BACKENDS])
    return entry


def test_backends_lists_all_in_order() -> None:
    assert [name for name in gk.backends() if name != SIMULATED] == ["triton", "cuda", "cpp", "torch", "reference"]
    assert gk.backends()["torch"] == gk.backends()["reference"] == []


def test_triton_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "there is no CUDA device" in gk.backends()["triton"][0]
    with pytest.raises(NotImplementedError, match="there is no CUDA device"):
        dispatch.select("triton", REQUEST)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gk.backends()["triton"] == []
    assert dispatch.select("auto", REQUEST).name == default(), "the interpreter is never chosen by auto"
    elsewhere = dataclasses.replace(REQUEST, device=torch.device("meta"))
    with pytest.raises(NotImplementedError, match="logits are on meta, needs a CUDA device"):
        dispatch.select("triton", elsewhere)


def test_cpp_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = dataclasses.replace(REQUEST, device=torch.device("cuda"))
    monkeypatch.setattr(dispatch, "EXTENSION_PROBLEM", None)
    with pytest.raises(NotImplementedError, match="logits are on cuda, needs the CPU"):
        dispatch.select("cpp", on_gpu)
    assert dispatch.select("cpp", REQUEST) is dispatch.select("auto", REQUEST)
    monkeypatch.undo()
    original = importlib.import_module
    for error, reason in (
        (ModuleNotFoundError("No module named 'grpo_kernels._C'"), "the extension is not built: pip install -e ."),
        (ImportError("undefined symbol: x"), "the extension does not load, build it again: undefined symbol: x"),
    ):

        def absent(name: str, error: ImportError = error) -> ModuleType:
            if name == "grpo_kernels._C":
                raise error
            return original(name)

        monkeypatch.setattr(importlib, "import_module", absent)
        problem = dispatch._extension_problem()
        monkeypatch.undo()
        monkeypatch.setattr(dispatch, "EXTENSION_PROBLEM", problem)
        with pytest.raises(NotImplementedError, match=re.escape(reason)):
            dispatch.select("cpp", REQUEST)
        assert dispatch.select("auto", REQUEST).name == "torch"
        monkeypatch.undo()


def test_auto_takes_the_first_that_can(fussy: dispatch.BackendEntry) -> None:
    assert dispatch.select("auto", REQUEST).name == default()
    on_gpu = dataclasses.replace(REQUEST, device=torch.device("cuda"))
    assert dispatch.select("auto", on_gpu).name == "fussy"


def test_a_named_backend_does_not_fall_back(fussy: dispatch.BackendEntry) -> None:
    logits, labels = batch()
    with pytest.raises(NotImplementedError) as caught:
        gk.sequence_logps(logits, labels, backend="fussy")
    text = str(caught.value)
    assert "backend='fussy' cannot run logits (6, 7, 13) torch.float64 on cpu" in text
    assert "  - logits are on cpu, needs a CUDA device" in text
    assert "python -m grpo_kernels doctor" in text


def test_nothing_can_run(monkeypatch: pytest.MonkeyPatch, fussy: dispatch.BackendEntry) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", [fussy])
    with pytest.raises(NotImplementedError, match="backend='auto' cannot run logits"):
        dispatch.select("auto", REQUEST)


def test_unknown_name() -> None:
    with pytest.raises(
        ValueError, match=r"backend must be one of 'auto', 'triton', 'cuda', 'cpp', 'torch', 'reference'.*, got 'tritn'"
    ):
        dispatch.select("tritn", REQUEST)


def test_environment_variable_names_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "reference")
    assert dispatch.select("auto", REQUEST).name == "reference"
    assert dispatch.select("torch", REQUEST).name == "torch"
    monkeypatch.setenv("GRPO_KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="got 'nonsense'"):
        dispatch.select("auto", REQUEST)


def test_reasons_about_a_gpu_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces what each backend says of a GPU's input: no test that lacks one does it otherwise."""
    monkeypatch.setattr(dispatch, "TRITON_IS_INSTALLED", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "CUDA_BUILD", "nvcc 13.0.88, sm_80 sm_90a compute_80")

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def triton_and_cuda(logits: torch.Tensor) -> torch.Tensor:
        request = dispatch.Request("logits", tuple(logits.shape), logits.dtype, torch.device("cuda", 0))
        taken = [dispatch.select(name, request).name for name in ("auto", "triton")]
        return logits + len(taken[0] + taken[1]) + 100 * len(dispatch._cuda_cannot_run(request))

    for capability, refusals in (((9, 0), 0), ((7, 5), 1)):
        torch.compiler.reset()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        for length in (3, 4):
            got = int(triton_and_cuda(torch.zeros(2, length))[0, 0])
            assert got == len("tritontriton") + 100 * refusals


def test_unusable_here_wins_over_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dispatch.BackendEntry("absent", "-", "no.such.module", not_usable_here=lambda: ["not built"])
    monkeypatch.setattr(dispatch, "BACKENDS", [absent, *dispatch.BACKENDS])
    assert gk.backends()["absent"] == ["not built"]
    with pytest.raises(NotImplementedError, match="  - not built"):
        dispatch.select("absent", REQUEST)
    assert dispatch.select("auto", REQUEST).name == default()
