"""ExactResume: a run that is stopped after a checkpoint and started again ends with the same bits."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lowbit_lightning.callbacks.exact_resume import ExactResume
from lowbit_lightning.data.resumable import ResumableDataLoader

SAMPLES, BATCH, EPOCHS = 32, 4, 3  # 8 batches an epoch

# The data is made for two-core machines; Lightning advises more workers than the test wants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
]


class Killed(Exception):
    pass


class KillAfter(pl.Callback):
    """Stands for kill -9: nothing of the run survives but its checkpoints."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.batches:
            raise Killed


class Net(pl.LightningModule):
    def __init__(self, loader: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(16, 1)
        )
        self.loader = loader
        self.batches: list[list[float]] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        # Two loaders give a batch of each.
        inputs, target = batch if isinstance(batch[0], torch.Tensor) else map(torch.cat, zip(*batch, strict=True))
        self.batches.append(target.flatten().tolist())
        return torch.nn.functional.mse_loss(self.layers(inputs), target)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        torch.rand(3)  # a validation that samples must not disturb training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        assert self.loader is not None
        return self.loader()


def dataset(samples: int = SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(samples, 4, generator=generator), torch.arange(samples, dtype=torch.float32)[:, None] / samples
    )


class NoisyDataset(torch.utils.data.Dataset[Any]):
    """Augments from the global generators of the process that loads."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(4) + random.random() + float(numpy.random.rand())
        return noise, torch.tensor([index / SAMPLES])


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        inputs, target = dataset().tensors
        for index in order[info.id :: info.num_workers] if info else order:
            yield inputs[index], target[index]


@dataclass(frozen=True)
class Case:
    loader: Callable[[], Any]
    save_every: int = 3
    kill_after: int = 13
    accumulate: int = 1
    validate_every: float = 1.0
    validate: bool = True
    checkpoint: dict[str, Any] | None = None
    callback_first: bool = True


def run(case: Case, folder: Path, *, kill: bool = False, resume: bool = False, seed: int = 1, passed: bool = False):
    """One process's life. ``seed`` stands for whatever state the generators of a new process are in."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    net = Net(case.loader)
    if not resume:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    when = case.checkpoint or {"every_n_train_steps": case.save_every}
    # Saving on an exception is Lightning's default, and more than a killed process can do.
    checkpoint = ModelCheckpoint(folder, save_last=True, **{"save_on_exception": False} | when)
    callbacks: list[pl.Callback] = [checkpoint, ExactResume()]
    if case.callback_first:
        callbacks.reverse()
    if kill:
        callbacks.append(KillAfter(case.kill_after))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=case.accumulate,
        val_check_interval=case.validate_every,
        limit_val_batches=1.0 if case.validate else 0,
        default_root_dir=folder,
    )
    validation = DataLoader(dataset(8), batch_size=4)
    arguments: dict[str, Any] = {"train_dataloaders": case.loader()} if passed else {}
    arguments |= {"ckpt_path": "last"} if resume else {}
    if kill:
        with pytest.raises(Killed):
            trainer.fit(net, val_dataloaders=validation, **arguments)
    else:
        trainer.fit(net, val_dataloaders=validation, **arguments)
    return net


def assert_exact(case: Case, folder: Path, **options: Any) -> None:
    straight = run(case, folder / "straight", **options)
    run(case, folder / "killed", kill=True, **options)
    resumed = run(case, folder / "killed", resume=True, seed=99, **options)
    assert resumed.batches == straight.batches[-len(resumed.batches) :]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def plain(workers: int = 0, data: Any = None, **options: Any) -> Callable[[], DataLoader[Any]]:
    options = {"batch_size": BATCH, "shuffle": True} | options
    return lambda: DataLoader(data if data is not None else dataset(), num_workers=workers, **options)


MATRIX = {
    "mid_epoch": Case(plain()),
    "mid_epoch_workers": Case(plain(2)),
    "last_batch": Case(plain(), save_every=8, kill_after=11),
    "last_batch_workers": Case(plain(2), save_every=8, kill_after=11),
    "accumulate": Case(plain(), accumulate=2, save_every=3, kill_after=13),
    "accumulate_last_batch": Case(plain(), accumulate=2, save_every=4, kill_after=11),
    "validation_in_between": Case(plain(), validate_every=0.25, save_every=2, kill_after=12),
    "at_a_validation": Case(plain(), validate_every=0.5, save_every=12, kill_after=14),
    "at_an_exception": Case(plain(), checkpoint={"every_n_train_steps": 50, "save_on_exception": True}),
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
