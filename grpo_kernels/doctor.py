"""`python -m grpo_kernels doctor`: what is installed here, and which backends can run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Any

import torch

from grpo_kernels import dispatch
from grpo_kernels._version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "trl", "matplotlib", "rich")


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Versions, devices and backends, ready for JSON."""
    devices = [f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        devices.append(f"cuda:{index}: {properties.name}, capability {capability}")
    order = [entry.name for entry in dispatch.BACKENDS]
    return {
        "grpo_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: _installed_version(package) for package in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": devices,
        "backends": {
            entry.name: {"summary": entry.summary, "not_usable_because": entry.not_usable_here()}
            for entry in dispatch.BACKENDS
        },
        "auto_order": order,
    }


def command(as_json: bool) -> int:
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"grpo_kernels {found['grpo_kernels']}, Python {found['python']}, {found['platform']}")
    print("packages: " + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items()))
    print(f"CUDA of torch: {found['cuda'] or 'none, a CPU build'}")
    for device in found["devices"]:
        print(f"device {device}")
    print(f"backends, in the order that backend='auto' tries them ({dispatch.ENVIRONMENT_VARIABLE} names another):")
    for name, entry in found["backends"].items():
        print(f"  {name:10} {'usable' if not entry['not_usable_because'] else 'not usable'}: {entry['summary']}")
        for reason in entry["not_usable_because"]:
            print(f"             - {reason}")
    return 0
