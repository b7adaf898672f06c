"""Levels of DynamicStashing in a run: what raises them, on which ranks, and what a killed and resumed run does."""

import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks.precision_ranks import on_rank
from callbacks.precision_run import FLAT, IMPROVING, LEVELS, LevelOfSteps, Net, trainer
from callbacks.small_run import KillAfter, Killed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from lowbit_lightning.callbacks import DynamicStashing, ExactResume, SpikeGuard
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.stash.levels import Level


def levels_of(metric: Sequence[float], steps: int = 20, trains_with: Any = None, **arguments: Any) -> list[int]:
    stashing = DynamicStashing(**{"levels": LEVELS} | arguments)
    seen = LevelOfSteps(stashing)
    trainer(stashing, seen, steps=steps, **trains_with or {}).fit(Net(metric))
    return seen.seen


def test_the_level_rises_after_the_validation_that_did_not_improve() -> None:
    assert levels_of(IMPROVING) == [0] * 20  # the last value is repeated only by the validation after step 20
    assert levels_of(FLAT) == [0] * 8 + [1] * 4 + [2] * 8


def test_a_sanity_check_is_no_validation() -> None:
    assert levels_of(FLAT, trains_with={"num_sanity_val_steps": 1}) == levels_of(FLAT)


def test_a_sampled_gradient_error_beyond_its_bound_raises_at_once() -> None:
    assert levels_of(IMPROVING, steps=4, max_gradient_error=1e-3) == [0, 1, 2, 2]
    assert levels_of(IMPROVING, steps=4, max_gradient_error=1e3) == [0] * 4


def test_one_level_needs_no_metric() -> None:
    assert levels_of(FLAT, levels=[LEVELS[0]], monitor="nothing logs this") == [0] * 20


def test_a_run_without_validation_stays_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    assert levels_of(FLAT, steps=4, trains_with={"limit_val_batches": 0}) == [0] * 4
    assert "no validation to go by: the run stays at [2, 2, 2, 16]" in caplog.text


def test_a_new_fit_starts_at_the_lowest_level() -> None:
    stashing = DynamicStashing(levels=LEVELS)
    for _ in range(2):
        seen = LevelOfSteps(stashing)
        trainer(stashing, seen).fit(Net())
        assert seen.seen == [0] * 8 + [1] * 4 + [2] * 8


def test_a_metric_that_is_not_logged_is_named_with_those_that_are() -> None:
    with pytest.raises(
        InvalidArgumentError, match="monitor='val_loss' was not logged by the validation; logged so far"
    ):
        trainer(DynamicStashing(levels=LEVELS)).fit(Net(name="valid"))


@pytest.mark.parametrize(
    ("callbacks", "arguments", "message"),
    [
        ((), {"mode": "max"}, "mode='max' contradicts monitor='val_loss', of which less is better: set mode: min"),
        ((), {"monitor": "val/accuracy"}, "mode='min' contradicts monitor='val/accuracy'"),
        (
            (EarlyStopping("quality", mode="max"),),
            {"monitor": "quality"},
            "EarlyStopping monitors it with mode='max'",
        ),
        (
            (ModelCheckpoint(monitor="quality", mode="max"),),
            {"monitor": "quality"},
            "ModelCheckpoint monitors it with mode='max'",
        ),
    ],
)
def test_a_mode_that_contradicts_the_metric_is_refused(
    callbacks: tuple[Callback, ...], arguments: dict[str, Any], message: str
) -> None:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    with pytest.raises(InvalidArgumentError, match=message):
        trainer(DynamicStashing(**arguments), *callbacks, enable_checkpointing=saves).fit(Net())


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_on_the_gradient_error_is_above_zero(bound: float) -> None:
    with pytest.raises(InvalidArgumentError, match="max_gradient_error"):
        DynamicStashing(max_gradient_error=bound)


def test_the_loggers_get_the_level_and_the_modelled_ratios_over_the_run() -> None:
    class Ratios(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            metrics = trainer.callback_metrics
            self.seen.append({name: float(value) for name, value in metrics.items() if name.startswith("dsq/")})

    stashing, ratios = DynamicStashing(levels=LEVELS[1:]), Ratios()
    trainer(stashing, ratios, steps=12).fit(Net())
    first, last = ratios.seen[0], ratios.seen[-1]
    assert (first["dsq/level"], first["dsq/q0"], first["dsq/q1"]) == (0, 4, 4)
    assert (last["dsq/level"], last["dsq/q0"], last["dsq/q3"]) == (1, 16, 16)
    # The first layer's input needs no gradient, so a GEMM of (4, 4) is not there: 3 of the 5 that make up both layers.
    cost = {4: 16 + 16 + 16 + 16 + 16, 16: 256 + 16 + 256 + 16 + 16}
    assert first["dsq/arithmetic_ratio"] == pytest.approx(5 * 256 / cost[4])
    assert last["dsq/arithmetic_ratio"] == pytest.approx(12 * 5 * 256 / (8 * cost[4] + 4 * cost[16]))
    assert first["dsq/dram_ratio"] > last["dsq/dram_ratio"] > 1
    assert {"dsq/gradient_error"} <= first.keys()


def test_the_spike_guard_raises_for_good() -> None:
    class Trouble(Callback):
        """A loss that explodes at step 6 for a while, so that the guard goes down its ladder and back."""

        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            if 18 <= trainer.fit_loop.total_batch_idx < 22:
                loss.data.mul_(1e6)

    stashing = DynamicStashing(levels=LEVELS)
    guard = SpikeGuard(
        ladder=["raise_precision", "rollback", "skip"], snapshot={"every_n_steps": 4, "min_age": 1}, max_rollbacks=2
    )
    seen = LevelOfSteps(stashing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(Trouble(), guard, stashing, seen, steps=24).fit(Net(IMPROVING))
    assert seen.seen[0] == 0
    assert seen.seen[-1] == 1
    assert seen.seen == sorted(seen.seen)  # not even the rollback lowers it


def run(folder: Path, save_every: int, kill_after: int | None = None, resume: bool = False, **options: Any) -> Any:
    """A run's life; returns the level of each batch and the module."""
    torch.manual_seed(99 if resume else 1)
    stashing, net = DynamicStashing(levels=LEVELS), Net()
    seen = LevelOfSteps(stashing)
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=save_every, save_on_exception=False)
    callbacks: list[Callback] = [checkpoint, ExactResume(), stashing, seen]
    if kill_after is not None:
        callbacks.append(KillAfter(kill_after))
    try:
        trainer(*callbacks, enable_checkpointing=True, **options).fit(net, ckpt_path="last" if resume else None)
    except Killed:
        assert kill_after is not None
    return seen.seen, net.state_dict(), stashing.state_dict()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("save_every", "kill_after"),
    [
        (3, 11),  # between a change of level and the next checkpoint; saved long before
        (8, 10),  # the last checkpoint was saved just before the validation that changed the level
        (12, 13),  # the same at the level after, in the middle of an epoch
        (5, 17),
    ],
)
def test_a_killed_run_goes_on_at_the_same_levels_bit_for_bit(tmp_path: Path, save_every: int, kill_after: int) -> None:
    straight, weights, state = run(tmp_path / "straight", save_every)
    run(tmp_path / "killed", save_every, kill_after)
    resumed, resumed_weights, resumed_state = run(tmp_path / "killed", save_every, resume=True)
    assert 0 < len(resumed) < len(straight)
    assert resumed == straight[-len(resumed) :]
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert resumed_state == state


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_validation_at_an_epochs_end_is_made_up_for_too(tmp_path: Path) -> None:
    options = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "steps": 96, "max_epochs": -1}
    straight, weights, _ = run(tmp_path / "straight", 24, **options)
    assert straight[48] == 1  # two epochs of 24 batches
    run(tmp_path / "killed", 48, kill_after=50, **options)
    resumed, resumed_weights, _ = run(tmp_path / "killed", 48, resume=True, **options)
    assert resumed == straight[48:]
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.mark.long
def test_the_level_changes_at_the_same_step_on_all_ranks(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, args=(tmp_path, port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[0] == second[0] == [0] * 8 + [1] * 4 + [2] * 8
    assert first[1] == second[1]
    assert all(torch.equal(first[2][name], second[2][name]) for name in first[2])
    assert "monitor='val_loss' was not logged" in first[3]
    assert "monitor='val_loss' was not logged" in second[3]


def test_rank_zero_decides() -> None:
    """Without processes: a strategy that hands out what rank 0 has seen."""

    class Told:
        def __init__(self, of_rank_zero: float | None) -> None:
            self.of_rank_zero = of_rank_zero

        def broadcast(self, own: float | None) -> float | None:
            return self.of_rank_zero

    run = trainer()
    run.callback_metrics["val_loss"] = torch.tensor(1.0)
    schedule = DynamicStashing(levels=LEVELS, max_gradient_error=0.5).schedule
    for decides, level in ((3.0, 0), (2.0, 0), (2.5, 1)):
        run.strategy.broadcast = Told(decides).broadcast  # type: ignore[method-assign, assignment]
        schedule.after_validation(run)
        assert schedule.rule.index == level
    assert schedule.after_sample(run, 0.1) is not None  # rank 0 has told 2.5
    run.strategy.broadcast = Told(None).broadcast  # type: ignore[method-assign, assignment]
    with pytest.raises(InvalidArgumentError, match="'val_loss' was not logged"):
        DynamicStashing(levels=LEVELS).schedule.after_validation(run)


def test_describes_what_happens_when() -> None:
    (row,) = DynamicStashing(levels=LEVELS).describe_technique()
    assert "[2, 2, 2, 16], then [4, 4, 4, 16], then [16, 4, 4, 16] as val_loss stops improving" in row[2]
    assert DynamicStashing(stash_only=2).schedule.level == Level(32, 2, 32, 32)
