"""A small run that goes wrong and is brought back, and what it is compared with: a run that never did."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning.pytorch as pl
import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lowbit_lightning.data import ResumableDataLoader
from lowbit_lightning.optim import MicroAdam, SoloAdamW
from lowbit_lightning.spikes.data_position import prepare_replay, skip_batches
from lowbit_lightning.spikes.snapshot_ring import SnapshotRing

SAMPLES, BATCH = 48, 4  # 12 batches an epoch


class Numbers(Dataset[Any]):
    """Sample i, with noise from the process's generators if asked for."""

    def __init__(self, noisy: bool = False) -> None:
        self.inputs = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))
        self.noisy = noisy

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        noise = torch.rand(8) + random.random() + float(numpy.random.rand()) if self.noisy else 0
        return index, self.inputs[index] + noise


class Stream(IterableDataset[Any]):
    def __init__(self, noisy: bool = False) -> None:
        self.numbers = Numbers(noisy)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        for index in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist():
            yield self.numbers[index]


class Net(pl.LightningModule):
    """Draws from every generator, keeps running statistics, and sums up what it logs."""

    def __init__(self, loader: Callable[[], Any], optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.BatchNorm1d(32), torch.nn.Dropout(0.3), torch.nn.Linear(32, 1)
        )
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.loader, self.optimizer = loader, optimizer
        self.seen: list[list[int]] = []
        self.epoch_losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        ids, inputs = batch
        self.seen.append(ids.tolist())
        self.steps += 1
        inputs = inputs.to(self.layers[0].weight.dtype) + 0.01 * float(numpy.random.rand()) + 0.01 * random.random()
        loss = (self.layers(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epoch_losses.append(float(self.trainer.callback_metrics["loss_epoch"]))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.named_parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return self.loader()


class Rollback(pl.Callback):
    """Stands for SpikeGuard: at each of ``spikes``, goes back to the snapshot of step ``to``."""

    def __init__(
        self,
        to: int,
        spikes: list[int],
        data: Literal["skip", "replay"],
        axis: Literal["rewind", "monotonic"] = "rewind",
        replay_mb: float = 100.0,
        skip_ahead: int = 0,
        where: Literal["cpu", "disk"] = "cpu",
    ) -> None:
        self.to, self.spikes, self.data, self.axis = to, list(spikes), data, axis
        self.replay_mb, self.skip_ahead = replay_mb, skip_ahead
        self.ring = SnapshotRing(every_n_steps=1, keep=40, where=where, min_age=0)
        self.due_at_spike: list[dict[str, Any]] = []
        self.done: list[str] = []
        self.dropped: list[int] = []
        self.restored: list[dict[str, Any]] = []
        self.captured: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.data == "replay":
            prepare_replay(trainer, self.replay_mb)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.ring.take_first(trainer, pl_module)
        if self.to == 0 and not self.captured:
            self.captured = digest(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.ring.before_optimizer_step()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.spikes and trainer.fit_loop.total_batch_idx + 1 == self.spikes[0]:
            self.spikes.pop(0)
            with torch.no_grad():  # what a spike does
                for parameter in pl_module.parameters():
                    parameter.fill_(float("nan"))
            snapshot = self.ring.choose(trainer.global_step, before_step=self.to + 1)
            assert snapshot.step == self.to
            self.done.append(snapshot.restore(trainer, pl_module, data=self.data, axis=self.axis))
            self.ring.discard_after(snapshot.step)
            self.restored.append(digest(trainer, pl_module))
            if self.skip_ahead:
                self.dropped.append(skip_batches(trainer, self.skip_ahead))
        elif not trainer.fit_loop._should_accumulate() and trainer.global_step <= self.to:
            self.ring.take(trainer, pl_module)
            if trainer.global_step == self.to:
                self.captured = digest(trainer, pl_module)


def digest(trainer: Any, net: Any) -> dict[str, Any]:
    """Everything that must be equal, as plain values and copies of tensors."""
    optimizer = trainer.optimizers[0]
    states = {
        f"{i}.{key}": value.clone() if isinstance(value, torch.Tensor) else value
        for i, parameter in enumerate(net.parameters())
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return {
        **{name: tensor.detach().clone() for name, tensor in tensors},
        **states,
        "lr": [float(group["lr"]) for group in optimizer.param_groups],
        "scheduler": trainer.lr_scheduler_configs[0].scheduler.last_epoch,
        "rng": [torch.rand(1).item(), random.random(), float(numpy.random.rand())] if trainer.state.finished else None,
        "global_step": trainer.global_step,
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def map_style(workers: int = 0, noisy: bool = False) -> Callable[[], Any]:
    return lambda: ResumableDataLoader(Numbers(noisy), BATCH, shuffle=True, seed=3, num_workers=workers)


def plain(workers: int = 0, noisy: bool = False, dataset: Any = None) -> Callable[[], Any]:
    shuffle = {} if dataset else {"shuffle": True}
    return lambda: DataLoader((dataset or Numbers)(noisy), BATCH, num_workers=workers, **shuffle)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda named: torch.optim.AdamW(named, lr=1e-2),
    "SGD": lambda named: torch.optim.SGD(named, lr=1e-3, momentum=0.9),
    "SoloAdamW": lambda named: SoloAdamW(named, lr=1e-2, min_numel=1),
    "MicroAdam": lambda named: MicroAdam(named, lr=1e-2, min_numel=1, window=3, density="auto"),
}


@dataclass(frozen=True)
class Case:
    loader: Callable[[], Any] = field(default_factory=map_style)
    optimizer: str = "AdamW"
    steps: int = 16
    to: int = 4
    spikes: tuple[int, ...] = (9,)
    data: Literal["skip", "replay"] = "replay"
    options: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[Callable[[], pl.Callback], ...] = ()


def run(case: Case, rollback: Rollback | None = None) -> tuple[Net, pl.Trainer, dict[str, Any]]:
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    net = Net(case.loader, OPTIMIZERS[case.optimizer])
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": case.steps,
    }
    callbacks = [*(make() for make in case.callbacks), *([rollback] if rollback else [])]
    trainer = pl.Trainer(**options | case.options, callbacks=callbacks)
    trainer.fit(net)
    return net, trainer, digest(trainer, net)


def assert_replay_is_exact(case: Case) -> tuple[Net, Net, Rollback]:
    """The restored state is the snapshot's, and the run ends as one that never spiked."""
    clean, clean_trainer, expected = run(case)
    rollback = Rollback(case.to, list(case.spikes), "replay", **case.guard)
    net, trainer, got = run(case, rollback)
    assert rollback.spikes == []
    assert rollback.done == ["replay"] * len(case.spikes)
    for restored in rollback.restored:
        assert_same(rollback.captured, restored)
    assert_same(expected, got)
    window = trainer.accumulate_grad_batches
    # From the last spike on, the batches are those that followed the snapshot.
    taken = clean.seen[case.to * window :]
    assert net.seen[-len(taken) :] == taken
    assert trainer.current_epoch == clean_trainer.current_epoch
    assert net.epoch_losses[-1:] == clean.epoch_losses[-1:]
    assert trainer.fit_loop.epoch_loop.total_batch_idx == clean_trainer.fit_loop.epoch_loop.total_batch_idx
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == clean_trainer.fit_loop.epoch_loop._batches_that_stepped
    return clean, net, rollback
