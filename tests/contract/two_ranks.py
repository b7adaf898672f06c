"""What each of two processes does in the test of distributed training: every technique, one after another.

One launch serves them all, because starting two processes takes longer than their training.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from contract.registry import Technique
from contract.small_run import Run


def train_on_rank(rank: int, techniques: Sequence[Technique], folder: Path, port: int) -> None:
    """Train a few steps with each technique and write what came of it to ``folder``, by technique and rank."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    own = folder / f"rank{rank}"
    own.mkdir()
    os.chdir(own)
    for technique in techniques:
        # A strategy of the technique's own, given by the registry, wins over Lightning's.
        run = Run(
            technique,
            **{"strategy": "ddp"} | technique.trainer | technique.two_processes | {"max_steps": 8, "devices": 2},
        ).fit()
        torch.save({"state": run.state(), "batches": run.record.batches}, folder / f"{technique.name}.{rank}.pt")
    torch.distributed.destroy_process_group()
