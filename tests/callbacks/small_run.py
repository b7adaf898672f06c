"""A small run that can be killed and resumed: what tests of ExactResume do, in one process, in two, in a killed one."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lowbit_lightning.callbacks import ExactResume

SAMPLES, BATCH, EPOCHS = 32, 4, 3  # 8 batches an epoch


class Killed(Exception):
    pass


class KillAfter(pl.Callback):
    """Stands for kill -9: nothing of the run survives but its checkpoints."""

    def __init__(self, batches: int, really: bool = False) -> None:
        self.batches = batches
        self.really = really

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.batches:
            if self.really:
                os.kill(os.getpid(), signal.SIGKILL)
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
    callbacks: tuple[Callable[[], pl.Callback], ...] = (ExactResume,)
    pass_loader: bool = False
    really_kill: bool = False
    devices: int = 1


def quiet_trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def run(case: Case, folder: Path, *, kill_after: int | None = None, resume: bool = False, seed: int = 1) -> Net:
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
    callbacks: list[pl.Callback] = [checkpoint, *(make() for make in case.callbacks)]
    if kill_after is not None:
        callbacks.append(KillAfter(kill_after, case.really_kill))
    trainer = quiet_trainer(
        folder,
        devices=case.devices,
        strategy="ddp" if case.devices > 1 else "auto",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        accumulate_grad_batches=case.accumulate,
        val_check_interval=case.validate_every,
        limit_val_batches=1.0 if case.validate else 0,
    )
    arguments: dict[str, Any] = {"ckpt_path": "last"} if resume else {}
    if case.pass_loader:
        arguments["train_dataloaders"] = case.loader()
    try:
        trainer.fit(net, val_dataloaders=DataLoader(dataset(8), batch_size=4), **arguments)
    except Killed:
        assert kill_after is not None
    return net


def assert_exact(case: Case, folder: Path) -> Net:
    """Runs straight through, then killed and resumed, and compares every batch and every bit of every weight."""
    straight = run(case, folder / "straight")
    run(case, folder / "killed", kill_after=case.kill_after)
    resumed = run(case, folder / "killed", resume=True, seed=99)
    assert_same_end(straight, resumed)
    return resumed


def assert_same_end(straight: Net, resumed: Net) -> None:
    assert 0 < len(resumed.batches) < len(straight.batches)
    assert resumed.batches == straight.batches[-len(resumed.batches) :]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def plain(workers: int = 0, data: Any = None, **options: Any) -> Callable[[], DataLoader[Any]]:
    options = {"batch_size": BATCH, "shuffle": True} | options
    return lambda: DataLoader(data if data is not None else dataset(), num_workers=workers, **options)


def exact_on_two_ranks(rank: int, folder: Path) -> None:
    """What each of two processes does in the test of distributed data parallel training."""
    net = assert_exact(Case(plain(), devices=2, save_every=3, kill_after=5), folder)
    torch.save([net.batches, net.state_dict()], folder / f"rank{rank}.pt")


def run_until_killed(folder: Path) -> None:
    """A run that ends by SIGKILL."""
    run(Case(plain(), really_kill=True), folder, kill_after=13)
