"""What each of two processes does in the test of a stash on a sharded model, and the same work for a single process."""

from pathlib import Path
from typing import Any

import torch
from sharded import WAYS, fit

from lowbit_lightning.callbacks import DynamicStashing


def train(way: str, folder: Path, sharded: bool) -> dict[str, Any]:
    """Three steps with a stash; returns whole weights and what was kept."""
    # Without noise, which is each rank's own.
    # What is recomputed depends on the way, so the second one is compared at 16 bits, where that makes no difference.
    bits = 4 if way == "layers" else 16
    by_kind = dict.fromkeys(("norm", "loss", "other"), max(8, bits))
    stashing = DynamicStashing(stash_only=bits, by_kind=by_kind, rounding="nearest")
    return fit(way, folder, sharded, callbacks=[stashing])


def work(rank: int, folder: Path) -> None:
    """Train in every way, and write what came of it to ``folder``."""
    torch.save({way: train(way, folder, sharded=True) for way in WAYS}, folder / f"{rank}.pt")
