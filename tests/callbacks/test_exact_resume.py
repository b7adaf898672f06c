"""ExactResume: a run that is stopped after a checkpoint and started again ends with the same bits."""

import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from callbacks.small_run import (
    BATCH,
    SAMPLES,
    Case,
    KillAfter,
    Net,
    NoisyDataset,
    Stream,
    assert_exact,
    assert_same_end,
    dataset,
    exact_on_two_ranks,
    plain,
    quiet_trainer,
    run,
    run_until_killed,
)
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, WeightedRandomSampler
from two_processes import exit_code, launch

from lowbit_lightning.callbacks.exact_resume import ExactResume, collect_rng, restore_rng
from lowbit_lightning.data.resumable import ResumableDataLoader

# A resumed run writes where the killed one wrote.
pytestmark = pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty")


class DrawsAtTheStart(pl.Callback):
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.rand(7)


class Reversed(Sampler[int]):
    """A third party's sampler, which draws nothing."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Any:
        return reversed(range(SAMPLES))


class OwnDataLoader(DataLoader[Any]):
    """A subclass may do anything, so it is not rebuilt."""


MATRIX = {
    "mid_epoch": Case(plain()),
    "mid_epoch_workers": Case(plain(2)),
    "last_batch": Case(plain(), save_every=8, kill_after=11),
    "last_batch_workers": Case(plain(2), save_every=8, kill_after=11),
    "accumulate": Case(plain(), accumulate=2, save_every=3, kill_after=13),
    "within_accumulation": Case(
        plain(), accumulate=3, kill_after=13, checkpoint={"every_n_train_steps": 50, "save_on_exception": True}
    ),
    "accumulate_last_batch": Case(plain(), accumulate=2, save_every=4, kill_after=11),
    "validation_in_between": Case(plain(), validate_every=0.25, save_every=2, kill_after=12),
    "at_a_validation": Case(plain(), validate_every=0.5, save_every=12, kill_after=14),
    "at_an_exception": Case(plain(), checkpoint={"every_n_train_steps": 50, "save_on_exception": True}),
    "at_an_exception_transforms": Case(
        plain(data=NoisyDataset()), checkpoint={"every_n_train_steps": 50, "save_on_exception": True}
    ),
    "no_validation": Case(plain(), validate=False),
    "short_last_batch": Case(plain(data=dataset(30)), save_every=9, kill_after=11),
    "drop_last": Case(plain(data=dataset(30), drop_last=True), save_every=7, kill_after=9),
    "in_order": Case(plain(shuffle=False)),
    "random_transforms": Case(plain(data=NoisyDataset())),
    "weighted_sampler": Case(plain(shuffle=None, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES))),
    "sampler_with_generator": Case(
        lambda: plain(shuffle=None, sampler=RandomSampler(dataset(), True, generator=torch.Generator()))()
    ),
    "batch_sampler_twice": Case(
        lambda: DataLoader(dataset(), batch_sampler=BatchSampler(RandomSampler(dataset()), BATCH, False))
    ),
    "passed_loader": Case(plain(), pass_loader=True),
    "callback_behind_another": Case(plain(), callbacks=(DrawsAtTheStart, ExactResume)),
    "callback_before_another": Case(plain(), callbacks=(ExactResume, DrawsAtTheStart)),
    "own_loader": Case(lambda: ResumableDataLoader(dataset(), BATCH, shuffle=True, seed=5)),
    "two_loaders": Case(lambda: [plain()(), plain(data=dataset(20))()], save_every=7, kill_after=15),
    "end_of_epoch": Case(
        plain(),
        kill_after=18,
        checkpoint={"save_on_train_epoch_end": True},
    ),
    "end_of_validation": Case(
        plain(),
        kill_after=18,
        checkpoint={"save_on_train_epoch_end": False},
    ),
    "end_of_validation_mid_epoch": Case(
        plain(),
        kill_after=15,
        validate_every=0.5,
        checkpoint={"save_on_train_epoch_end": False},
    ),
}


@pytest.mark.parametrize("name", MATRIX)
def test_resume_is_bit_exact(name: str, tmp_path: Path) -> None:
    assert_exact(MATRIX[name], tmp_path)


def test_resume_after_two_kills_within_accumulation_is_bit_exact(tmp_path: Path) -> None:
    # The first batch after a resume writes a checkpoint in the middle of a window.
    case = Case(plain(), accumulate=2)
    straight = run(case, tmp_path / "straight")
    run(case, tmp_path / "killed", kill_after=13)
    run(case, tmp_path / "killed", kill_after=14, resume=True, seed=50)
    assert_same_end(straight, run(case, tmp_path / "killed", resume=True, seed=99))


def test_same_trainer_fits_again_bit_exactly_after_an_exception(tmp_path: Path) -> None:
    case = Case(plain())
    straight = run(case, tmp_path / "straight")
    net = run(case, tmp_path / "raised", kill_after=13)
    trainer = net.trainer
    next(callback for callback in trainer.callbacks if isinstance(callback, KillAfter)).batches = -1
    net.batches.clear()
    trainer.fit(net, val_dataloaders=plain(shuffle=False)(), ckpt_path="last")
    assert_same_end(straight, net)


def test_run_killed_by_sigkill_resumes_bit_exactly(tmp_path: Path) -> None:
    assert exit_code(run_until_killed, tmp_path / "killed") == -signal.SIGKILL
    case = Case(plain())
    assert_same_end(run(case, tmp_path / "straight"), run(case, tmp_path / "killed", resume=True, seed=99))


@pytest.mark.long
def test_two_ranks_resume_bit_exactly_on_their_own_data(tmp_path: Path) -> None:
    launch(exact_on_two_ranks, tmp_path)
    (batches0, weights0), (batches1, weights1) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert all(torch.equal(weights0[name], weights1[name]) for name in weights0)
    epoch = slice(-SAMPLES // BATCH // 2, None)
    seen = [sample for batch in batches0[epoch] + batches1[epoch] for sample in batch]
    assert sorted(seen) == (torch.arange(SAMPLES) / SAMPLES).tolist()


def test_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    run(Case(plain()), tmp_path, kill_after=13)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["callbacks"]["ExactResume"]["rng"][0]) == {"python", "numpy", "torch", "cuda"}


def test_every_generator_is_restored() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(), numpy.random.rand(), numpy.random.randn(), torch.rand(()).item()]

    draw()  # leaves the second half of a pair of normal numbers behind
    state = collect_rng()
    expected = draw()
    draw()
    restore_rng(state)
    assert draw() == expected


def test_validation_leaves_no_trace_in_training(tmp_path: Path) -> None:
    often = run(Case(plain(), validate_every=0.25), tmp_path / "often")
    never = run(Case(plain(), validate=False), tmp_path / "never")
    assert torch.equal(often.layers[0].weight, never.layers[0].weight)


def test_checkpoint_without_our_state_warns_and_trains_on(tmp_path: Path) -> None:
    run(Case(plain(), callbacks=()), tmp_path, kill_after=13)
    with pytest.warns(UserWarning, match="written without ExactResume"):
        net = run(Case(plain()), tmp_path, resume=True)
    assert net.batches


def test_changed_length_warns_and_trains_on(tmp_path: Path) -> None:
    run(Case(plain()), tmp_path, kill_after=13)
    with pytest.warns(UserWarning, match="length: 8 then, 10 now"):
        net = run(Case(plain(data=dataset(40))), tmp_path, resume=True)
    assert net.batches


def test_iterable_dataset_is_consumed_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Stream is an iterable dataset") as warned:
        assert_exact(Case(plain(shuffle=None, data=Stream())), tmp_path)
    assert sum("iterable dataset" in str(warning.message) for warning in warned) == 3  # one for each run


def test_iterable_dataset_resumes_at_an_epochs_end(tmp_path: Path) -> None:
    case = Case(plain(shuffle=None, data=Stream()), kill_after=18, checkpoint={"save_on_train_epoch_end": True})
    with pytest.warns(UserWarning, match="Stream is an iterable dataset"):
        assert_exact(case, tmp_path)


def test_foreign_sampler_is_replayed_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Reversed is not one of torch's samplers"):
        assert_exact(Case(plain(shuffle=None, sampler=Reversed())), tmp_path)


def test_subclass_of_dataloader_is_left_alone_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot take over OwnDataLoader"):
        run(Case(lambda: OwnDataLoader(dataset(), BATCH)), tmp_path)


def test_hooks_are_taken_back_after_fit(tmp_path: Path) -> None:
    trainer = quiet_trainer(
        tmp_path,
        max_steps=1,
        callbacks=[ExactResume()],
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    trainer.fit(Net(plain()), val_dataloaders=plain(shuffle=False)())
    assert isinstance(trainer.train_dataloader, ResumableDataLoader)
    assert "dataloader" not in vars(trainer.fit_loop._data_source)
    assert "run" not in vars(trainer.fit_loop.epoch_loop.val_loop)


def test_overfit_batches_still_works(tmp_path: Path) -> None:
    net = Net(lambda: ResumableDataLoader(dataset(), BATCH))
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=2,
        overfit_batches=2,
        callbacks=[ExactResume()],
        enable_checkpointing=False,
        limit_val_batches=0,
    )
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        trainer.fit(net, val_dataloaders=plain(shuffle=False)())
    assert net.batches[:2] == net.batches[2:]
