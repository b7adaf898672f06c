"""What each of two processes does in the test of 4-bit layers in a sharded model, and the same for a single process."""

from pathlib import Path
from typing import Any

import torch
from sharded import WAYS, fit

from lowbit_lightning.precision import FourBitPrecision

#: Settings of FourBitPrecision beside the way of sharding; none with noise, which is each rank's own.
SETTINGS: dict[str, dict[str, Any]] = {
    "fp4": {"compute": "32-true", "group_size": 32},
    "int4, bf16-mixed": {"weight": "int4", "compute": "bf16-mixed", "group_size": 32},
    "fp4, not packed": {"compute": "32-true", "group_size": 32, "save_packed": False},
}


def train(way: str, setting: str, folder: Path, sharded: bool) -> dict[str, torch.Tensor]:
    """Three steps in 4 bits; returns whole weights."""
    plugin = FourBitPrecision(**SETTINGS[setting])
    weights: dict[str, torch.Tensor] = fit(way, folder, sharded, plugins=[plugin])["weights"]
    return weights


def work(rank: int, folder: Path) -> None:
    """Train in every way, and write what came of it to ``folder``."""
    found = {(way, setting): train(way, setting, folder, sharded=True) for way in WAYS for setting in SETTINGS}
    torch.save(found, folder / f"{rank}.pt")
