"""Fire drills with the real guard: what is broken on purpose ends as if nothing had happened."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning.callbacks import SpikeGuard, SpikeInjector

STEPS, WIDTH = 260, 32
DRILL: dict[str, Any] = {"step": [60, 90, 120, 180, 220], "kind": ["nan_grad", "loss", "batch", "rank", "weights"]}


class Regression(LightningModule):
    """A linear teacher with noise; from weights ten times too large there is no way back within the run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(WIDTH, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        return (self.layer(inputs) - target).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-2, weight_decay=0.0)
        # To zero, so that what a run ends with does not hang on its last few batches.
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def samples(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.linspace(-1, 1, WIDTH)[:, None]
    inputs = torch.randn(count, WIDTH, generator=generator)
    return inputs, inputs @ teacher + 0.3 * torch.randn(count, 1, generator=generator)


def train(*callbacks: Callback, **options: Any) -> float:
    """The loss on held-out data after a run."""
    module = Regression()
    trainer = Trainer(
        accelerator="cpu", max_steps=STEPS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*samples(1, 40_000)), batch_size=64))
    with torch.no_grad():
        return float(module.training_step([*samples(2, 4096)], 0))


def guard(**settings: Any) -> SpikeGuard:
    return SpikeGuard(snapshot={"every_n_steps": 20, "keep": 3, "where": "cpu", "min_age": 20}, **settings)


def decisions() -> list[tuple[int, str]]:
    entries = [json.loads(line) for line in Path("spikes.jsonl").read_text().splitlines()]
    return [(entry["step"], entry["decision"]) for entry in entries]


@pytest.fixture(scope="module")
def clean() -> float:
    return train()


def test_the_guard_takes_a_quiet_run_for_what_it_is(clean: float) -> None:
    assert train(guard()) == clean
    assert not Path("spikes.jsonl").exists() or decisions() == []


@pytest.mark.parametrize("kind", ["nan_grad", "weights"])
def test_without_a_guard_the_run_ends_diverged(kind: Any, clean: float) -> None:
    ended = train(SpikeInjector(220, kind))
    assert math.isnan(ended) or ended > 10 * clean


@pytest.mark.parametrize("kind", ["nan_grad", "loss", "batch", "rank"])
def test_a_fault_of_one_step_costs_that_step_only(kind: Any, clean: float) -> None:
    assert train(SpikeInjector(150, kind), guard()) == pytest.approx(clean, rel=0.02)
    assert decisions() == [(150, "skip")]


def test_blown_up_weights_are_rolled_back(clean: float) -> None:
    assert train(SpikeInjector(220, "weights"), guard()) == pytest.approx(clean, rel=0.02)
    assert [decision for _, decision in decisions()][-1] == "rollback"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_survives_all_faults(accumulate: int) -> None:
    clean = train(accumulate_grad_batches=accumulate)
    assert train(guard(), SpikeInjector(**DRILL), accumulate_grad_batches=accumulate) == pytest.approx(clean, rel=0.02)


def test_a_fault_that_is_gone_in_the_replay_is_called_not_reproducible(clean: float) -> None:
    ended = train(SpikeInjector(150, "loss"), guard(ladder=["rollback"], data="replay"))
    assert ended == clean
    assert [decision for _, decision in decisions()] == ["rollback", "not reproducible"]


def test_a_fault_that_comes_again_takes_the_next_rung(clean: float) -> None:
    ended = train(SpikeInjector(150, "loss", persistent=True), guard(ladder=["rollback", "skip"], data="replay"))
    assert ended == pytest.approx(clean, rel=0.02)
    assert [decision for _, decision in decisions()] == ["rollback", "skip"]
