"""What each of two processes does in the test of distributed training: every technique, one after another.

One launch serves them all, because starting two processes takes longer than their training.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from contract.registry import Technique
from contract.small_run import Run


def train_on_rank(rank: int, techniques: Sequence[Technique], folder: Path) -> None:
    """Train a few steps with each technique and write what came of it to ``folder``, by technique and rank."""
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
