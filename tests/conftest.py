from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers of pytest-xdist share the cores: with more threads than cores a training run takes ten times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# Inductor's pool of compiling processes costs more to start than the few kernels here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Scalar code does for them: to learn which vector instructions work, it would compile six programs.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import torch

# Without a GPU the Triton kernels run in its interpreter, which has to be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import quick_interpreter
import simulated_cuda

import grpo_kernels as gk
from grpo_kernels.kernels import dispatch

quick_interpreter.install()

# `make test-cpus`: the extension, too, takes no newer instructions than PyTorch is told to take.
if not gk.backends()["cpp"] and (capability := os.environ.get("ATEN_CPU_CAPABILITY")):
    from grpo_kernels.kernels import native

    native.INSTRUCTION_SET = {"default": "baseline"}.get(capability, capability)

SIMULATED = "cuda-simulated"  # the CUDA kernels on the CPU, for every test that takes the backend fixture
if simulated_cuda.missing() is None:
    dispatch.BACKENDS.append(
        dispatch.BackendEntry(
            SIMULATED,
            "CUDA kernels on the block simulator",
            "simulated_cuda",
            cannot_run=lambda request: [] if request.device.type == "cpu" else ["needs the CPU"],
            auto_devices=(),
            fuses_loss=True,
        )
    )

# Run by test_zero3.py under torchrun; importing it needs DeepSpeed, and collecting doctests would import it.
collect_ignore = ["distributed/zero3.py"]
collect_ignore_glob = ["ptx/*"]  # for a process of its own, in which Triton compiles (test_ptx.py)


def _backends_and_devices() -> list[tuple[str, str]]:
    """Every backend that can run here, on the device that it is for; plain PyTorch's on both."""
    usable = [name for name, reasons in gk.backends().items() if not reasons]
    if not torch.cuda.is_available():
        return [(name, "cpu") for name in usable]
    on_cpu = [name for name in usable if name not in ("triton", "cuda")]
    return [(name, "cuda") for name in usable if name not in ("cpp", SIMULATED)] + [(name, "cpu") for name in on_cpu]


@pytest.fixture(params=_backends_and_devices(), ids=lambda pair: pair[0] if pair[1] == "cpu" else "-".join(pair))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; tensors that the test makes are on the device where it runs."""
    name, device = request.param
    torch.set_default_device(device)
    yield name
    torch.set_default_device("cpu")


# For tests with sequences whose labels are all ignored, which the losses warn of.
EMPTY_BY_DESIGN = pytest.mark.filterwarnings("ignore:.* sequences have no counted token")


def _in_interpreter(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("backend") == ("triton", "cpu")


def _is_taken(item: pytest.Item) -> bool:
    mark = item.get_closest_marker("interpreted")
    if mark is None or not _in_interpreter(item):
        return True
    allowed = {name: kept if isinstance(kept, list) else [kept] for name, kept in mark.kwargs.items()}
    return all(item.callspec.params[name] in kept for name, kept in allowed.items())


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(name: str) -> Iterator[None]:
    """Of a test marked ``interpreted(option=values, ...)`` Triton's interpreter gets the cases with these values only.

    A launch takes it a tenth of a second. Such a test varies what happens between launches; the interpreted kernels
    are seen by one case of each kind, and Triton on a GPU and all other backends get every case.
    """
    made = yield
    if not isinstance(made, list):
        return made
    taken = [item for item in made if _is_taken(item)]
    assert any(map(_in_interpreter, taken)) == any(map(_in_interpreter, made)), f"{name}: no case is left for Triton"
    return taken


def one_rounding(dtype: torch.dtype, backend: str) -> float:
    """Relative error of storing a number: half an ulp; a whole one where Triton's interpreter truncates to bfloat16."""
    truncates = backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available()
    return torch.finfo(dtype).eps / (1 if truncates else 2)


def pytest_collection_finish() -> None:
    """What is imported by now stays: Python need not look for garbage among it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def batch(
    num_pairs: int = 3, length: int = 7, vocab: int = 13, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (2B, T, V) that require grad, labels (2B, T) with prompts and padding ignored."""
    generator = torch.Generator().manual_seed(seed)
    shape, device = (2 * num_pairs, length), torch.get_default_device()
    logits = 3 * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64, device="cpu")
    labels = torch.randint(0, vocab, shape, generator=generator, device="cpu")
    for s in range(2 * num_pairs):
        labels[s, : s % 3] = -100
        labels[s, length - (s + 1) % 3 :] = -100 if (s + 1) % 3 else labels[s, length:]
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


@pytest.fixture
def my_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model and its tokenizer, where the blocks of README and docs look for one: "my-model"."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'grpo-kernels[train]'")
    from grpo_kernels.integrations import transformers as hf

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    hf.small_llama(300, hidden_size=32, num_layers=1, max_length=64, pad_id=0).save_pretrained("my-model")
    hf.byte_level_tokenizer([], 300).save_pretrained("my-model")
