"""`python -m grpo_kernels doctor`: what is installed here, and which backends can run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from typing import Any

import torch

from grpo_kernels._version import __version__
from grpo_kernels.distributed.mesh import Mesh, cost_of_rank, mib, sizes_of
from grpo_kernels.kernels import devices, dispatch, linear_plan
from grpo_kernels.kernels.devices import Device
from grpo_kernels.pair_losses import PAIR_LOSSES

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "trl", "matplotlib", "rich")


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension() -> dict[str, Any] | None:
    """How grpo_kernels._C was built, and the instruction sets that this machine can run of it, best first."""
    if "cpp" not in [name for name, reasons in dispatch.backends().items() if not reasons]:
        return None
    from grpo_kernels import _C

    return {**_C.build_info(), "usable": _C.instruction_sets()}


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
        "rocm": torch.version.hip,
        "extension": _extension(),
        "devices": devices,
        "backends": {
            entry.name: {"summary": entry.summary, "not_usable_because": entry.not_usable_here()}
            for entry in dispatch.BACKENDS
        },
        "auto_order": order,
    }


def command(
    as_json: bool,
    kernels: bool = False,
    linear: str | None = None,
    dtype: str = "bfloat16",
    losses: bool = False,
    device: str | None = None,
    mesh: str | None = None,
) -> int:
    if losses:
        print(loss_table())
        return 0
    if kernels:
        return _kernels(as_json)
    if mesh and not linear:
        raise ValueError("mesh belongs to --linear, which says the batch and the head")
    if linear:
        return _rank(linear, mesh, dtype, device, as_json) if mesh else _linear(linear, dtype, device, as_json)
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"grpo_kernels {found['grpo_kernels']}, Python {found['python']}, {found['platform']}")
    print("packages: " + ", ".join(f"{name} {version or '-'}" for name, version in found["packages"].items()))
    if found["rocm"]:
        print(
            f"ROCm of torch: {found['rocm']}; the Triton kernels are compiled for AMD's GPUs, but were never run on one"
        )
    else:
        print(f"CUDA of torch: {found['cuda'] or 'none, a CPU build'}")
    extension = found["extension"]
    if extension is None:
        print("extension: not built")
    else:
        print(f"extension: {extension['compiler']}, {extension['flags']}")
        print(f"           instruction sets {', '.join(extension['compiled'])}; here {extension['usable'][0]} is used")
        print(f"           CUDA kernels: {extension['cuda'] or 'none in this build'}")
    for device in found["devices"]:
        print(f"device {device}")
    print(f"backends, in the order that backend='auto' tries them ({dispatch.ENVIRONMENT_VARIABLE} names another):")
    for name, entry in found["backends"].items():
        print(f"  {name:10} {'usable' if not entry['not_usable_because'] else 'not usable'}: {entry['summary']}")
        for reason in entry["not_usable_because"]:
            print(f"             - {reason}")
    return 0


def loss_table() -> str:
    """The table of pair losses in Markdown, a row for each loss_type."""
    lines = ["| loss_type | loss of a pair | score x | what moves alpha | source |", "| --- | --- | --- | --- | --- |"]
    for name, entry in PAIR_LOSSES.items():
        cells = (f"`{name}`", f"`{entry.formula}`", entry.score, entry.moves_alpha, entry.source)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def linear_plans(sizes: str, dtype: str, device: Device) -> list[linear_plan.LinearPlan]:
    """What LinearGroupRobustLoss can do with padded hidden states and a head of these sizes, the fastest first.

    Args:
        sizes: "SxTxDxV": sequences, positions, hidden size, vocabulary; every position counts. "SxTx8B": a model's.

    Raises:
        ValueError: sizes are not four positive whole numbers.
    """
    sequences, length, hidden_size, vocab_size = sizes_of(sizes)
    shape = linear_plan.LinearShape(
        sequences * length,
        hidden_size,
        vocab_size,
        getattr(torch, dtype).itemsize,
        (True, True, False),
        device,
        longest_pair=2 * length,
        accumulators=2,
    )
    plans = linear_plan.best_plans(shape, linear_plan.Budget().bytes_on(device))
    chosen = linear_plan.plan_of(shape, linear_plan.Budget().bytes_on(device))
    return [chosen, *sorted((plan for plan in plans if plan != chosen), key=lambda plan: plan.seconds)]


def three_products(sizes: str, dtype: str, device: Device) -> float:
    """Seconds of logits, dhidden and dweight at the device's rate, and nothing else."""
    sequences, length, hidden_size, vocab_size = sizes_of(sizes)
    return 6 * sequences * length * hidden_size * vocab_size / device.flops[getattr(torch, dtype).itemsize]


def _device(name: str | None) -> Device:
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return devices.of(here) if name is None else devices.named(name)


def _rank(sizes: str, of_mesh: str, dtype: str, device_name: str | None, as_json: bool) -> int:
    """What a rank of a mesh pays for the loss."""
    mesh, device = Mesh.of(of_mesh), _device(device_name)
    cost = cost_of_rank(sizes_of(sizes), mesh, getattr(torch, dtype), device)
    if as_json:
        print(json.dumps({"gpus": mesh.gpus, **dataclasses.asdict(cost)}, indent=2, default=str))
        return 0
    plan = cost.plan
    print(f"a rank of {mesh}, {mesh.gpus:,} x {device.name}, {dtype}; predicted, not measured ({device.source}):")
    print(f"  has {cost.tokens:,} tokens and {cost.vocab_columns:,} columns of the vocabulary")
    print(f"  logits path  {mib(cost.logits_bytes)} of logits")
    print(
        f"  linear path  {mib(plan.extra_bytes)} beside the gradients: {plan.name}, {plan.chunk_rows} tokens at a time"
    )
    print(f"               {1e3 * plan.seconds:,.1f} ms forward and backward, {plan.products:g} products")
    print(f"  gradients    {mib(cost.dweight_bytes)} of the head, {mib(cost.dhidden_bytes)} of the hidden states")
    print(f"  sends        {mib(cost.gathered_bytes)} in all-gathers, {mib(cost.summed_bytes)} in all-reduces")
    if mesh.pp > 1:
        print(f"  on the last of {mesh.pp} pipeline stages; the others pay nothing")
    return 0


def _linear(sizes: str, dtype: str, device_name: str | None, as_json: bool) -> int:
    device = _device(device_name)
    plans = linear_plans(sizes, dtype, device)
    least = three_products(sizes, dtype, device)
    if as_json:
        rows = [{**dataclasses.asdict(plan), "of_three_products": plan.seconds / least} for plan in plans]
        print(json.dumps(rows, indent=2, default=str))
        return 0
    memory = linear_plan.Budget().bytes_on(device) >> 20
    print(f"plans of LinearGroupRobustLoss for {sizes}, {dtype}, on {device.name}, within {memory} MiB;")
    print(f"predicted, not measured ({device.source}); the first is what plan='auto' takes:")
    for plan in plans:
        print(
            f"  {plan.name:10} {1e3 * plan.seconds:9.1f} ms, {plan.seconds / least:.2f} x three products, "
            f"{plan.extra_bytes / 2**20:.0f} MiB beside the gradients, chunks of {plan.chunk_rows} tokens"
        )
    return 0


def _kernels(as_json: bool) -> int:
    """Compile the kernels for several GPUs, none of which need be here; 1 if kernels/gate.py finds a problem."""
    from grpo_kernels.kernels import gate
    from grpo_kernels.kernels.triton import compile_report

    missing = gate.nvcc_missing()
    found = compile_report.report() + ([] if missing else gate.nvcc_reports())
    problems = gate.problems(found)
    if as_json:
        reports = [dataclasses.asdict(one) for one in found]
        print(json.dumps({"kernels": reports, "problems": problems, "cuda_not_compiled": missing}, indent=2))
        return bool(problems)
    for one in found:
        print(f"{one.where}: {one.summary}")
    if missing:
        print(f"CUDA kernels not compiled: {missing}")
    print("\n".join(f"PROBLEM: {problem}" for problem in problems) or "no problems")
    print("fractions of bandwidth are predictions of a model (docs/kernels.md), not measured")
    return bool(problems)
