"""Which backend runs an input, and why the others do not: an ordered table that can explain itself."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch

from grpo_kernels.kernels.contract import FusedKernelBackend, KernelBackend

ENVIRONMENT_VARIABLE = "GRPO_KERNELS_BACKEND"


@dataclass(frozen=True)
class Request:
    """The facts about an input that a backend may have reasons to refuse."""

    argument: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.argument} {self.shape} {self.dtype} on {self.device}"


def _no_reasons(*_: object) -> list[str]:
    return []


@dataclass(frozen=True)
class BackendEntry:
    """A backend: its kernels' module (None: plain autograd over reference.py), and reasons why it cannot run."""

    name: str
    summary: str
    module: str | None
    not_usable_here: Callable[[], list[str]] = field(default=_no_reasons)
    cannot_run: Callable[[Request], list[str]] = field(default=_no_reasons)
    auto_devices: tuple[str, ...] | None = None
    """Device types on which `auto` considers it; None: all. (Triton's interpreter runs only when asked for.)"""
    fuses_loss: bool = False
    """Whether its module is also a FusedKernelBackend."""


# These are found out once, and not while torch.compile traces.
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def _triton_not_usable_here() -> list[str]:
    if not TRITON_IS_INSTALLED:
        return ["triton is not installed (a build of PyTorch for CUDA or ROCm brings it)"]
    if not torch.cuda.is_available() and not _triton_interprets():
        return [
            "there is no CUDA device, as PyTorch calls ROCm's, too "
            "(tests run it on the CPU with TRITON_INTERPRET=1, set before triton is imported)"
        ]
    return []


def _triton_cannot_run(request: Request) -> list[str]:
    if request.device.type == "cuda" or (request.device.type == "cpu" and _triton_interprets()):
        return []
    return [f"{request.argument} are on {request.device}, needs a CUDA device"]


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _extension_problem() -> str | None:
    """Why grpo_kernels._C cannot be imported; None: it can."""
    try:
        importlib.import_module("grpo_kernels._C")
    except ModuleNotFoundError:
        return "the extension is not built: pip install -e . with a C++ compiler (python -m grpo_kernels doctor)"
    except ImportError as error:
        return f"the extension does not load, build it again: {error}"
    return None


EXTENSION_PROBLEM = _extension_problem()


def _cpp_not_usable_here() -> list[str]:
    return [EXTENSION_PROBLEM] if EXTENSION_PROBLEM else []


def _cpp_cannot_run(request: Request) -> list[str]:
    return [] if request.device.type == "cpu" else [f"{request.argument} are on {request.device}, needs the CPU"]


def _cuda_build() -> str | None:
    """How the CUDA kernels were built, "nvcc 13.0.88, sm_80 sm_90a compute_80"; None: this build has none."""
    if EXTENSION_PROBLEM:
        return None
    build: str | None = importlib.import_module("grpo_kernels._C").build_info()["cuda"]
    return build


CUDA_BUILD = _cuda_build()


def runs_on(build: str, capability: tuple[int, int]) -> bool:
    """Whether code for one of the architectures in ``build`` runs on a GPU of this compute capability.

    Machine code (sm_80) runs on its own generation, of the same or a later minor version; code that ends in a letter
    (sm_90a) on that very version only; PTX (compute_80) on everything later.
    """
    for kind, major, minor, suffix in re.findall(r"\b(sm|compute)_(\d+)(\d)([a-z]?)\b", build):
        built = (int(major), int(minor))
        if suffix:
            fits = built == capability
        elif kind == "sm":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def _cuda_not_usable_here() -> list[str]:
    if EXTENSION_PROBLEM:
        return [EXTENSION_PROBLEM]
    if CUDA_BUILD is None:
        return ["the extension was built without CUDA kernels: pip install -e . with nvcc on the PATH"]
    if torch.version.hip is not None:
        return ["this PyTorch is for ROCm, whose GPUs do not run CUDA kernels"]
    if not torch.cuda.is_available():
        return ["there is no CUDA device"]
    return []


def _unfit_capability(device_index: int | None) -> str | None:
    """The device's compute capability where the build has no code for it."""
    capability = torch.cuda.get_device_capability(device_index)
    return None if runs_on(CUDA_BUILD or "", capability) else "{}.{}".format(*capability)


# torch.compile cannot trace it. This is what torch.compiler.assume_constant_result does, which takes seconds to import.
_unfit_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _cuda_cannot_run(request: Request) -> list[str]:
    if request.device.type != "cuda":
        return [f"{request.argument} are on {request.device}, needs a CUDA device"]
    unfit = _unfit_capability(request.device.index)
    return [f"the device's capability is {unfit}, the kernels were built by {CUDA_BUILD}"] if unfit else []


# The order is that of preference: `auto` takes the first entry that can run the input.
BACKENDS: list[BackendEntry] = [
    BackendEntry(
        "triton",
        "Triton kernels, NVIDIA GPUs; AMD GPUs under ROCm (compiled, never run)",
        "grpo_kernels.kernels.triton",
        _triton_not_usable_here,
        _triton_cannot_run,
        auto_devices=("cuda",),
        fuses_loss=True,
    ),
    # After triton until both have been measured on a GPU: PyTorch for CUDA brings Triton, and it is tested more widely.
    BackendEntry(
        "cuda",
        "CUDA kernels, NVIDIA GPUs of capability 8.0 and up",
        "grpo_kernels.kernels.cuda",
        _cuda_not_usable_here,
        _cuda_cannot_run,
        auto_devices=("cuda",),
        fuses_loss=True,
    ),
    BackendEntry(
        "cpp",
        "C++ kernels, vectorised and threaded, CPU",
        "grpo_kernels.kernels.native",
        _cpp_not_usable_here,
        _cpp_cannot_run,
    ),
    BackendEntry("torch", "chunked plain PyTorch, any device", "grpo_kernels.kernels.torch_chunked"),
    BackendEntry("reference", "unfused textbook in eager PyTorch, any device", None),
]


OF_KERNELS = ("token_logps_forward", "token_logps_backward")  # of KernelBackend


def _missing_functions(entry: BackendEntry) -> list[str]:
    """Of a backend that somebody has added: what its module lacks of the contract. Dynamo cannot trace an import."""
    if entry.module is None or entry.module.startswith("grpo_kernels.") or torch.compiler.is_compiling():
        return []
    try:
        module = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        return [f"its module {entry.module!r} is not found: {error}"]
    wanted = (*OF_KERNELS, *(("group_robust_forward",) if entry.fuses_loss else ()))
    lacking = [name for name in wanted if not hasattr(module, name)]
    return [f"its module {entry.module!r} lacks {', '.join(lacking)}"] if lacking else []


def entry_of(name: str) -> BackendEntry:
    for entry in BACKENDS:
        if entry.name == name:
            return entry
    names = ", ".join(repr(known) for known in ("auto", *(entry.name for entry in BACKENDS)))
    raise ValueError(f"backend must be one of {names}, got {name!r}")


def kernels_of(name: str) -> KernelBackend:
    """The module that implements the contract."""
    module = entry_of(name).module
    if module is None:
        raise NotImplementedError(f"backend={name!r} is plain PyTorch on whole rows: it cannot run with vocab_shard")
    return cast(KernelBackend, importlib.import_module(module))


def fused_kernels_of(name: str) -> FusedKernelBackend:
    """The module of a backend whose entry says ``fuses_loss``."""
    return cast(FusedKernelBackend, kernels_of(name))


def reasons_against(entry: BackendEntry, request: Request) -> list[str]:
    return entry.not_usable_here() or _missing_functions(entry) or entry.cannot_run(request)


def select(backend: str, request: Request) -> BackendEntry:
    """The entry to run ``request`` with. A backend asked for by name runs it or raises; there is no fallback.

    With ``backend="auto"`` the environment variable GRPO_KERNELS_BACKEND may name one instead.
    """
    name = backend
    if backend == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name != "auto":
        entry = entry_of(name)
        reasons = reasons_against(entry, request)
        if reasons:
            raise NotImplementedError(_refusal(f"backend={name!r}", request, reasons))
        return entry
    refusals = []
    for entry in BACKENDS:
        if entry.auto_devices is not None and request.device.type not in entry.auto_devices:
            continue
        reasons = reasons_against(entry, request)
        if not reasons:
            return entry
        refusals += [f"{entry.name}: {reason}" for reason in reasons]
    raise NotImplementedError(_refusal("backend='auto'", request, refusals))


def _refusal(subject: str, request: Request, reasons: list[str]) -> str:
    lines = "".join(f"\n  - {reason}" for reason in reasons)
    return f"{subject} cannot run {request}:{lines}\n`python -m grpo_kernels doctor` shows what is usable here."


def backends() -> dict[str, list[str]]:
    """Each backend's name, in order of preference, with the reasons why it is not usable here (none: usable).

    Example:
        >>> backends()["torch"]
        []
    """
    return {entry.name: list(entry.not_usable_here() or _missing_functions(entry)) for entry in BACKENDS}
