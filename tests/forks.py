"""Processes as forks of this one: importing PyTorch and TRL is what a process costs most."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

# With a GPU backward passes have threads of their own, which a fork would lack.
METHOD = "spawn" if torch.cuda.is_available() else "fork"


def start(function: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context(METHOD).Process(target=_on_one_thread, args=(function, arguments))
    process.start()
    return process


def run_on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> None:
    """``function(*arguments)`` on each of ``count`` ranks, with torchrun's variables in its environment.

    Raises:
        torch.multiprocessing.ProcessRaisedException: One of them raised; it has the traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (count, port, function, arguments)
    torch.multiprocessing.start_processes(_rank, given, nprocs=count, start_method=METHOD)


def _rank(rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in numbers.items()}}
    _on_one_thread(function, arguments)


def _on_one_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    function(*arguments)
