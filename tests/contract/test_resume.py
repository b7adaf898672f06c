"""A run stopped in mid-epoch, or rolled back, goes on as if nothing had happened: shuffling, dropout, every bit."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract.conftest import Trained
from contract.registry import Technique, each_technique, every_technique
from contract.small_run import SAVED_AT, STEPS, Run, differences, resumable
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lowbit_lightning.callbacks.exact_resume import collect_rng, restore_rng

# A resumed run writes where the first one wrote.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

Trains = Callable[[Technique], Trained]
WINDOW = 2  # steps between a snapshot and its restoration


class RollsBackTwice(Callback):
    """Takes a snapshot after three steps, trains three more and restores it, two times, with the same batch always.

    Attributes:
        ends: The state before each restoration, and after the same three steps once more.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.ends: list[dict[str, Any]] = []
        self.snapshot: tuple[dict[str, Any], dict[str, Any]] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        batch.copy_(torch.arange(batch.numel()).view(batch.shape) % 128)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        assert self.run is not None
        if trainer.global_step == WINDOW:
            self.snapshot = copy.deepcopy(self.run.state()), collect_rng()
        elif trainer.global_step % WINDOW == 0:
            assert self.snapshot is not None
            self.ends.append(copy.deepcopy(self.run.state()))
            state, generators = self.snapshot
            self.run.load_state(state)
            restore_rng(generators)


@every_technique
def test_resume_in_mid_epoch_is_bit_exact(technique: Technique, trained: Trains) -> None:
    straight = trained(technique)
    # Another seed stands for a new process, whose weights and generators start anywhere.
    resumed = Run(technique, seed=99, **resumable(straight.checkpoint.parent)).fit(straight.checkpoint)
    assert resumed.record.rates == straight.run.record.rates[SAVED_AT:]
    assert list(differences(straight.run.record.batches[SAVED_AT:], resumed.record.batches)) == []
    assert list(differences(straight.run.state(), resumed.state())) == []


@each_technique
def test_refitting_one_trainer_from_a_checkpoint_is_bit_exact(technique: Technique, trained: Trains) -> None:
    checkpoint = trained(technique).checkpoint
    run = Run(technique, max_steps=SAVED_AT + 5, **resumable(checkpoint.parent)).fit(checkpoint)
    first = copy.deepcopy(run.state())
    assert list(differences(first, run.fit(checkpoint).state())) == []


@every_technique
def test_rolling_back_twice_to_one_snapshot_is_bit_exact(technique: Technique) -> None:
    run = Run(technique, max_steps=4 * WINDOW)
    rolls = RollsBackTwice()
    rolls.run = run
    run.trainer.callbacks.append(rolls)
    run.fit()
    first, second, third = rolls.ends
    assert list(differences(first, second)) == []
    assert list(differences(first, third)) == []
    assert rolls.snapshot is not None
    assert list(differences(first, rolls.snapshot[0])) != []


@every_technique
def test_checkpoint_loads_without_running_code(technique: Technique, trained: Trains) -> None:
    checkpoint = torch.load(trained(technique).checkpoint, weights_only=True)
    assert checkpoint["global_step"] == SAVED_AT < STEPS
