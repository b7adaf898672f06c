"""A small run that misbehaves where a test wants it to, for the tests of SpikeMonitor in one process and in two."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowbit_lightning.callbacks import SpikeMonitor
from lowbit_lightning.spikes import step_meter

QUIET = {"window": 16, "min_samples": 4}


class Numbered(Dataset[dict[str, Any]]):
    """Random inputs that know their number."""

    def __init__(self, samples: int = 80) -> None:
        self.inputs = torch.randn(samples, 33, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.inputs[index], "id": index}


class Net(LightningModule):
    """``change(loss, batch, rank)`` makes of a healthy loss what a test wants."""

    def __init__(self, change: Callable[[Tensor, int, int], Tensor | None] = lambda loss, batch, rank: loss) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 4))
        self.change = change
        self.losses: list[float] = []
        self.samples: list[list[int]] = []

    def loss(self, batch: dict[str, Any]) -> Tensor:
        return (self.layers(batch["x"]).float() - 1).square().mean()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        loss = self.change(self.loss(batch), self.trainer.fit_loop.total_batch_idx, self.trainer.global_rank)
        self.samples.append(batch["id"].tolist())
        if loss is not None:
            self.log("train_loss", loss)
            self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-4)


class Sharded(Net):
    """The same with FSDP2; rows do not divide evenly by two."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        assert self.device_mesh is not None
        for layer in (self.layers[0], self.layers[2], self.layers):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def spiking(*batches: int, times: float = 1000.0, rank: int | None = None) -> Callable[[Tensor, int, int], Tensor]:
    """Multiply the loss of these batches, on one rank or on all."""
    return lambda loss, batch, here: loss * times if batch in batches and rank in (None, here) else loss


class Witness(Callback):
    """Stands after the monitor, as the guard does: what has it found before each step?"""

    def __init__(self, monitor: SpikeMonitor) -> None:
        self.monitor = monitor
        self.events: list[Any] = []
        self.norms: list[float] = []
        self.measured: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.events.append(self.monitor.event)
        gradients = [param.grad for param in pl_module.parameters() if param.grad is not None]
        whole = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in gradients]
        self.norms.append(math.hypot(*(float(one.float().norm()) for one in whole)))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("spike/")]
        self.measured.append({name: float(trainer.callback_metrics[name]) for name in names})

    @property
    def found(self) -> list[tuple[int, str, str]]:
        return [(event.batch, event.kind, event.signal) for event in self.events if event is not None]


def fit(
    module: LightningModule,
    monitor: SpikeMonitor,
    *,
    callbacks: Sequence[Callback] = (),
    samples: int = 80,
    **options: Any,
) -> Witness:
    """Train for an epoch of batches of 2 samples."""
    witness = Witness(monitor)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_epochs": 1, "logger": False, "log_every_n_steps": 1, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
    }  # fmt: skip
    trainer = Trainer(**settings | options, callbacks=[monitor, witness, *callbacks])
    data = Numbered(samples)
    trainer.fit(module, DataLoader(data, 2), DataLoader(data, 40))
    return witness


def on_rank(rank: int, folder: Path) -> None:
    """What each of two processes does: one run with DDP and one with FSDP2; one rank spikes."""
    reductions: list[int] = []
    gather_rows = step_meter.gather_rows

    def counted(row: Tensor) -> list[list[float]]:
        reductions.append(len(row))
        return gather_rows(row)

    step_meter.gather_rows = counted
    result: dict[str, Any] = {}
    runs: Iterable[tuple[str, Any, Any]] = (
        ("ddp", Net, "ddp"),
        ("fsdp2", Sharded, ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)),
    )
    for name, module, strategy in runs:
        reductions.clear()
        monitor = SpikeMonitor(**QUIET)  # type: ignore[arg-type]
        net = module(spiking(12, rank=1))
        witness = fit(net, monitor, devices=2, strategy=strategy)
        result[name] = {
            "events": [event.as_json() for event in witness.events if event is not None],
            "state": monitor.state_dict(),
            "norms": witness.norms,
            "measured": [values["spike/grad_norm"] for values in witness.measured],
            "losses": net.losses,
            "samples": net.samples,
            "loss": [values["spike/loss"] for values in witness.measured],
            "reductions": len(reductions),
        }
    (folder / f"{rank}.json").write_text(json.dumps(result))
