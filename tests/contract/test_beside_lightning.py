"""Lightning's own machinery works beside every technique: asynchronous checkpoints, averaged weights, copies."""

import pickle
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.conftest import Trained
from contract.registry import Technique, each_technique
from contract.small_run import SAVED_AT, STEPS, Run, differences, resumable
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

Trains = Callable[[Technique], Trained]
EPOCHS = 3
STEPS_AN_EPOCH = STEPS // EPOCHS


class Release(Callback):
    """Says that training is over."""

    def __init__(self) -> None:
        self.training_is_over = threading.Event()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training_is_over.set()


class GoesOnFromCopies(Callback):
    """In the middle of a run, puts a copy's state in the place of the optimizer's own, then a pickled one's."""

    def __init__(self) -> None:
        self.differences: list[list[str]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        (optimizer,) = trainer.optimizers
        copies = {SAVED_AT: deepcopy, SAVED_AT + 3: lambda original: pickle.loads(pickle.dumps(original))}
        if trainer.global_step in copies:
            state = copies[trainer.global_step](optimizer).state_dict()
            self.differences.append(list(differences(optimizer.state_dict(), state)))
            optimizer.load_state_dict(state)


def with_callback(folder: Path, name: str, **init_args: Any) -> dict[str, Any]:
    """Trainer settings of the run that ``trained`` gives, with one of Lightning's callbacks in front."""
    options = resumable(folder / "saved")
    callback = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": init_args}
    return options | {"max_epochs": EPOCHS, "callbacks": [callback, *options["callbacks"]]}


@each_technique
def test_asynchronous_checkpoint_holds_the_state_at_the_time_of_saving(
    technique: Technique, trained: Trains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, write = Release(), TorchCheckpointIO.save_checkpoint

    def write_when_training_is_over(*arguments: Any, **options: Any) -> None:
        assert release.training_is_over.wait(timeout=120)
        write(*arguments, **options)

    # Lightning gives AsyncCheckpointIO no other writer than this one.
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", write_when_training_is_over)
    plugins = [*technique.trainer.get("plugins", []), {"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}]
    run = Run(technique, plugins=plugins, **resumable(tmp_path / "saved"))
    run.trainer.callbacks.append(release)
    assert isinstance(run.trainer.strategy.checkpoint_io, AsyncCheckpointIO)
    run.fit()
    written = torch.load(next((tmp_path / "saved").glob(f"*step={SAVED_AT}.ckpt")), weights_only=True)
    expected = torch.load(trained(technique).checkpoint, weights_only=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert list(differences(expected[part], written[part])) == []


@each_technique
def test_moving_average_follows_the_weights_and_leaves_training_alone(
    technique: Technique, trained: Trains, tmp_path: Path
) -> None:
    run = Run(technique, **with_callback(tmp_path, "EMAWeightAveraging", decay=0.5)).fit()
    weights = trained(technique).run.record.weights
    assert list(differences(weights, run.record.weights)) == []
    average = weights[0]
    for step in weights[1:]:
        average = {name: value.lerp(step[name], 0.5) for name, value in average.items()}
    for name, value in run.module.named_parameters():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@each_technique
def test_run_with_moving_average_resumes_bit_exactly(technique: Technique, tmp_path: Path) -> None:
    options = with_callback(tmp_path, "EMAWeightAveraging", decay=0.5)
    straight = Run(technique, **options).fit()
    resumed = Run(technique, seed=99, **options).fit(next((tmp_path / "saved").glob(f"*step={SAVED_AT}.ckpt")))
    assert list(differences(straight.record.weights[SAVED_AT:], resumed.record.weights)) == []
    assert list(differences(straight.module.state_dict(), resumed.module.state_dict())) == []


# The module's own schedule moves every step, Lightning's goes on every epoch and replaces it.
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@each_technique
def test_stochastic_weight_averaging_averages_the_epochs(technique: Technique, trained: Trains, tmp_path: Path) -> None:
    settings = {"swa_lrs": 1e-3, "swa_epoch_start": 2, "device": "cpu"}
    run = Run(technique, **with_callback(tmp_path, "StochasticWeightAveraging", **settings)).fit()
    weights = run.record.weights
    alike = trained(technique).run.record.weights[:STEPS_AN_EPOCH]
    assert list(differences(alike, weights[:STEPS_AN_EPOCH])) == []
    first, second = weights[STEPS_AN_EPOCH - 1], weights[2 * STEPS_AN_EPOCH - 1]
    for name, value in run.module.named_parameters():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)


@each_technique
def test_run_goes_on_from_copies_of_its_optimizer(technique: Technique, trained: Trains, tmp_path: Path) -> None:
    run, change = Run(technique, **resumable(tmp_path / "saved")), GoesOnFromCopies()
    run.trainer.callbacks.append(change)
    run.fit()
    assert change.differences == [[], []]
    straight = trained(technique).run
    assert list(differences(straight.record.weights, run.record.weights)) == []
    assert list(differences(straight.state(), run.state())) == []
