"""A small run whose gradients go wrong in chosen batches, under a SpikeGuard: in one process or in two."""

import json
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from callbacks.small_run import SAMPLES, dataset
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import SpikeGuard, SpikeInjector, SpikeMonitor
from lowbit_lightning.data import ResumableDataLoader

BATCH = 2
EPOCH = SAMPLES // BATCH  # 16 batches
#: Old enough for the monitor's patience, and often enough for runs of a few dozen steps.
SNAPSHOT = {"every_n_steps": 4, "keep": 3, "min_age": 6}


class Net(pl.LightningModule):
    def __init__(self, make_optimizer: Callable[..., torch.optim.Optimizer] | None = None) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        self.make_optimizer = make_optimizer or (lambda named: torch.optim.AdamW([p for _, p in named], lr=0.05))
        self.batches: list[list[float]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, target = batch
        self.batches.append(target.flatten().tolist())
        return torch.nn.functional.mse_loss(self.layers(inputs), target)

    def train_dataloader(self) -> Any:
        # Not before the processes know each other.
        return ResumableDataLoader(dataset(), batch_size=BATCH, shuffle=True, seed=3)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.named_parameters()))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Sharded(Net):
    """The same under FSDP2; without the batch norm, whose buffers are not sharded."""

    def configure_model(self) -> None:
        if not hasattr(self, "done"):
            self.done = True
            self.layers[1] = torch.nn.Identity()
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.layers[0], self.layers[3]):
                fully_shard(layer, mesh=mesh)
            fully_shard(self.layers, mesh=mesh)


class BadBatches(SpikeInjector):
    """Makes a gradient NaN in some batches, counted over the run, each as many times as it is named."""

    def __init__(self, *batches: int, always: bool = False, only_rank: int | None = None) -> None:
        super().__init__(step=10**9)
        self.bad = list(batches)
        self.always = always
        self.only_rank = only_rank

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx
        if batch in self.bad:
            if not self.always:
                self.bad.remove(batch)
            if self.only_rank in (None, trainer.global_rank):
                next(param for param in pl_module.parameters() if param.grad is not None).grad.mul_(torch.nan)


class LeaveOut(pl.Callback):
    """What ``skip`` is to be equal to: a run whose author left out these batches' gradients."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.total_batch_idx in self.batches:
            optimizer.zero_grad(set_to_none=True)


class Watcher(pl.Callback):
    """Notes the learning rate that steps really use."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Made after the guard's own hook, so called after it.
        before = trainer.optimizers[0].register_step_pre_hook
        before(lambda optimizer, args, kwargs: self.rates.append(float(optimizer.param_groups[0]["lr"])))


def guard(*ladder: str, **options: Any) -> SpikeGuard:
    return SpikeGuard(ladder=list(ladder), **{"snapshot": SNAPSHOT} | options)


def monitor(**options: Any) -> SpikeMonitor:
    return SpikeMonitor(**{"patience": 6} | options)


def fit(
    *callbacks: pl.Callback,
    net: Net | None = None,
    data: Iterable[Any] | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> pl.Trainer:
    """Trains three epochs, or as ``options`` of the Trainer say."""
    net = net or Net()
    torch.manual_seed(1)
    # A callback that writes files belongs to the few tests that look at them.
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(one, pl.callbacks.Checkpoint) for one in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
        "callbacks": list(callbacks),
    }
    trainer = pl.Trainer(**defaults | options)
    trainer.fit(net, data, ckpt_path=ckpt_path)
    return trainer


def state(trainer: pl.Trainer) -> dict[str, Any]:
    """All that a spike must have no part in."""
    return {
        "module": trainer.lightning_module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "rng": torch.get_rng_state(),
    }


def long_epoch(without: Container[int] = ()) -> DataLoader[Any]:
    """Three epochs as one, so that batches can be left out of it; always in the same order."""
    inputs, target = dataset(3 * SAMPLES).tensors
    kept = [(inputs[i : i + BATCH], target[i : i + BATCH]) for i in range(0, len(inputs), BATCH)]
    return DataLoader([batch for i, batch in enumerate(kept) if i not in without], batch_size=None)  # type: ignore[arg-type]


def entries(folder: Path = Path()) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "spikes.jsonl").read_text().splitlines()]


def decisions(folder: Path = Path()) -> list[tuple[int, str]]:
    return [(entry["batch"], entry["decision"]) for entry in entries(folder)]


def whole(value: Any) -> Any:
    """Tensors as plain local ones, so that they can be saved and compared."""
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [whole(entry) for entry in value]
    if hasattr(value, "full_tensor"):
        return value.full_tensor().clone()
    return value.clone() if isinstance(value, Tensor) else value


def on_two_ranks(rank: int, folder: Path, cases: Sequence[str]) -> None:
    """What each of two processes does: every case with a fault on one rank only, beside a run without."""
    for case in cases:
        strategy, _, answer = case.partition("-")
        results = {}
        for run in ("guarded", "clean"):
            own = folder / case / run
            own.mkdir(parents=True, exist_ok=True)
            faults: list[pl.Callback] = []
            if run == "guarded":
                faults = [
                    monitor(),
                    guard("skip" if answer == "skip" else "rollback", data="replay"),
                    BadBatches(11, only_rank=1),
                ]
            elif answer == "skip":
                faults = [LeaveOut(11)]
            sharded = strategy == "fsdp2"
            trainer = fit(
                *faults,
                net=Sharded() if sharded else Net(),
                devices=2,
                strategy=ModelParallelStrategy(2, 1) if sharded else "ddp",
                default_root_dir=own,
            )
            results[run] = whole({key: value for key, value in state(trainer).items() if key != "optimizers"})
            results[run]["states"] = whole([list(one.state.values()) for one in trainer.optimizers])
        torch.save(results, folder / f"{case}.{rank}.pt")
