"""The curves of examples/spike_detection.py: made ones, and two recorded runs, with faults put into them."""

import json
import math
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from long_run import batch, corpus, network
from torch import nn

from lowbit_lightning.cli import LowBitCLI

RECORDED = Path(__file__).parent / "results" / "spike_curves.json"
STEPS, FIRST, EVERY = 4000, 400, 150  # of a made curve; the first fault; the distance of faults


@dataclass
class Curve:
    """Loss and gradient norm per step.

    ``faults`` are the ranges of steps in each of which one alarm is wanted; an alarm outside all of them is false.
    """

    loss: np.ndarray
    norm: np.ndarray
    faults: list[range] = field(default_factory=list)


def made(seed: int, tails: float | None = None, drop: bool = False) -> Curve:
    """A loss that falls as those of language models do, with noise of 2 %.

    Args:
        seed: of the noise.
        tails: degrees of freedom of Student's t for the noise; None for normal noise.
        drop: whether the learning rate drops half-way: loss and noise fall at once.
    """
    random = np.random.default_rng(seed)
    step = np.arange(STEPS)
    trend = 1.5 + 4 * (1 + step / 20) ** -0.5
    noise = random.standard_normal(STEPS) if tails is None else random.standard_t(tails, STEPS)
    width = np.full(STEPS, 0.02)
    if drop:
        trend = np.where(step < STEPS // 2, trend, 0.9 * trend)
        width[STEPS // 2 :] = 0.01
    norm = 0.5 * (1 + step / 20) ** -0.1 * np.exp(0.15 * random.standard_normal(STEPS))
    return Curve(trend * (1 + width * noise), norm)


def with_spikes(curve: Curve, loss: float = 1.0, norm: float = 1.0, length: int = 1) -> Curve:
    """Multiply loss and norm at regular steps; with ``length`` for so many steps in a row, each of them a fault."""
    changed = Curve(curve.loss.copy(), curve.norm.copy())
    for start in range(FIRST, len(curve.loss) - length, EVERY):
        for step in range(start, start + length):
            changed.loss[step] *= loss
            changed.norm[step] *= norm
            changed.faults.append(range(step, step + 1))
    return changed


def diverging(curve: Curve, doubles_in: int) -> Curve:
    """Let the loss rise from half-way on, twice every ``doubles_in`` steps up to four times; one alarm is wanted."""
    onset = len(curve.loss) // 2
    step = np.arange(len(curve.loss))
    factor = np.clip(2.0 ** ((step - onset) / doubles_in), 1, 4)
    faults = [range(onset, min(len(step), onset + 2 * doubles_in))]
    # What comes after is trouble too: the curve ends with its fault.
    return Curve((curve.loss * factor)[: faults[0].stop], (curve.norm * factor)[: faults[0].stop], faults)


Make = Callable[[int], Curve]

FAULTY: dict[str, Make] = {
    **{
        f"loss × {size:g}": lambda seed, size=size: with_spikes(made(seed), size, size)
        for size in (1.1, 1.2, 1.5, 2, 5)
    },
    "loss × 1.5, heavy-tailed noise": lambda seed: with_spikes(made(seed, tails=3), 1.5, 1.5),
    "loss × 2, five steps in a row": lambda seed: with_spikes(made(seed), 2, 2, length=5),
    "gradient norm × 10, loss unmoved": lambda seed: with_spikes(made(seed), norm=10),
    "loss NaN": lambda seed: with_spikes(made(seed), math.nan, math.nan),
    "divergence, doubling in 50 steps": lambda seed: diverging(made(seed), 50),
    "divergence, doubling in 150 steps": lambda seed: diverging(made(seed), 150),
    "divergence, doubling in 400 steps": lambda seed: diverging(made(seed), 400),
}
HEALTHY: dict[str, Make] = {
    "normal noise": made,
    "heavy-tailed noise (t, 3 degrees)": lambda seed: made(seed, tails=3),
    "learning rate drops": lambda seed: made(seed, drop=True),
}


def recorded() -> dict[str, Curve]:
    """The two real runs: the quickstart, and long_run's network, whose corpus changes half-way."""
    curves = json.loads(RECORDED.read_text())
    return {name: Curve(np.array(curve["loss"]), np.array(curve["norm"])) for name, curve in curves.items()}


class Record(Callback):
    """Loss and norm of the whole gradient of every step."""

    def __init__(self) -> None:
        self.loss: list[float] = []
        self.norm: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.norm.append(float(nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loss.append(float(outputs["loss"]))


def record(steps: int) -> dict[str, dict[str, list[float]]]:
    """Train the quickstart for ``steps`` steps of short sequences, and long_run's network for four times as many."""
    cli = LowBitCLI(
        [
            "--config", "quickstart", "--trainer.max_steps", str(steps), "--data.init_args.seq_len", "65",
            "--trainer.limit_val_batches", "0",
            "--trainer.logger", "false", "--trainer.callbacks", "[]", "--trainer.enable_checkpointing", "false",
        ],
        run=False,
    )  # fmt: skip
    real = Record()
    cli.trainer.callbacks.insert(0, real)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    shift = Record()
    paths = sysconfig.get_paths()
    corpora = corpus(paths["stdlib"], "*.py"), corpus(paths["include"], "*.h")
    for step in range(4 * steps):
        inputs, targets = batch(corpora[0] if step < 2 * steps else corpora[1], step)
        loss = nn.functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shift.loss.append(loss.item())
        shift.norm.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
    return {
        name: {"loss": _rounded(run.loss), "norm": _rounded(run.norm)}
        for name, run in (("quickstart", real), ("a new corpus half-way", shift))
    }


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]
