"""A GPU that is not there: code written for one runs on the CPU, its lines all executed and its figures meaningless.

Tensors asked for on "cuda" are made on the CPU, the Triton kernels run in the interpreter, the CUDA kernels on the
block simulator, and those functions of torch.cuda that our code calls do nothing, or tell a story.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIMULATED
from torch.overrides import TorchFunctionMode

from grpo_kernels.kernels import dispatch


class OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.to and str(args[1]).startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.seconds - self.seconds)


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        return super().__new__(cls)


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class Profile:
    """Of torch.profiler: it saw one kernel."""

    def __init__(self, activities: list) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None: ...

    def events(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(key="a_kernel", device_type=torch.autograd.DeviceType.CUDA)]


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of those functions of torch.cuda that were called."""
    called: list[str] = []

    def fake(name: str, answer: Any = None) -> None:
        def function(*arguments: Any, **options: Any) -> Any:
            called.append(name)
            return answer

        where, name_there = (torch.cuda.profiler, name[9:]) if name.startswith("profiler.") else (torch.cuda, name)
        monkeypatch.setattr(where, name_there, function)

    for name in ("_sleep", "synchronize", "reset_peak_memory_stats", "set_sync_debug_mode"):
        fake(name)
    for name in ("profiler.start", "profiler.stop"):
        fake(name)
    properties = SimpleNamespace(name="Fake GPU", major=9, minor=0, multi_processor_count=132)
    for name, answer in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_name", properties.name),
        ("get_device_properties", properties),
        ("memory_allocated", 0),
        ("max_memory_allocated", 2**20),
        ("current_stream", Stream()),
        ("stream", nullcontext()),
    ):
        fake(name, answer)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch, "Generator", Generator)
    simulated = dispatch.entry_of(SIMULATED)
    table = [replace(simulated, name="cuda") if one.name == "cuda" else one for one in dispatch.BACKENDS]
    table = [replace(one, cannot_run=lambda request: []) if one.fuses_loss else one for one in table]
    monkeypatch.setattr(dispatch, "BACKENDS", table)
    with OnTheCpu():
        yield called
