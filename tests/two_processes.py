"""Processes of their own for tests: two that train together, or one that is killed.

They are forked from a server that has imported torch and Lightning once, which takes longer than what they compute.
"""

import multiprocessing
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

multiprocessing.set_forkserver_preload(
    [
        "lowbit_lightning.cli",
        "lowbit_lightning.callbacks",
        "lowbit_lightning.strategies",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
    ]
)


def launch(work: Callable[..., None], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in two processes that find each other by environment variables.

    Raises:
        ProcessRaisedException: One of them raised; its traceback is in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start_processes(_on_rank, args=(port, work, arguments), nprocs=2, start_method="forkserver")


def launched_once(work: Callable[[int, Path], None]) -> Any:
    """A fixture for all tests of a file: the folder in which two processes left what ``work(rank, folder)`` did."""

    @pytest.fixture(scope="module")
    def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("ranks")
        launch(work, folder)
        return folder

    return launched


def exit_code(work: Callable[..., None], *arguments: Any) -> int | None:
    """Call ``work(*arguments)`` in a process of its own; what that ended with, the negative signal if one killed it."""
    process = multiprocessing.get_context("forkserver").Process(target=work, args=arguments)
    process.start()
    process.join(timeout=120)
    return process.exitcode


def _on_rank(rank: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    work(rank, *arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
