"""What each of two processes does in the test of data-parallel forward-only training; one launch for all of it."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lowbit_lightning.optim import FZOO
from lowbit_lightning.strategies import ForwardOnlyDDPStrategy, ForwardOnlyStrategy

STEPS, SAVED_AT, SAMPLES = 200, 15, 32


class Routed(LightningModule):
    """Batch statistics, dropout, and experts of which each process may use another one."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(0.1))
        self.experts = nn.ModuleList(nn.Linear(12, 3) for _ in range(3))
        self.never = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(()))
        self.batches: list[Tensor] = []
        self.routes: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        self.batches.append(inputs)
        self.mean.copy_(inputs.mean())
        if self.plain:
            return cross_entropy(self.experts[0](self.body[0](inputs)), targets)
        route = int(inputs.sum() > 0)
        self.routes.add(route)
        return cross_entropy(self.experts[route](self.body(inputs)), targets)

    def configure_optimizers(self) -> Any:
        return FZOO(self.named_parameters(), lr=1e-2, eps=1e-2, num_perturbations=4, perturbation="rank1")

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(SAMPLES, 6, generator=generator)
        targets = (inputs @ torch.randn(6, 3, generator=generator)).argmax(1)
        # The plain one's batches are all of the data, in whatever order each process has its share.
        size = (SAMPLES if self.plain else 8) // self.trainer.world_size
        return DataLoader(TensorDataset(inputs, targets), batch_size=size)


class Drift(Callback):
    """Flips one bit on one process."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            with torch.no_grad():
                pl_module.experts[1].weight.view(torch.int32)[0, 0] ^= 1


def fit(net: Routed, *callbacks: Callback, strategy: Any = None, ckpt_path: Any = None, **options: Any) -> Routed:
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy or ForwardOnlyDDPStrategy(),
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"devices": 2, "max_steps": STEPS, "enable_checkpointing": bool(callbacks)} | options),
    )
    trainer.fit(net, ckpt_path=ckpt_path)
    return net


def train_on_rank(rank: int, folder: Path) -> None:
    """Train in all the ways that the tests ask about, and write what came of it."""
    os.chdir(folder)
    torch.manual_seed(rank)  # processes that start from other weights, and draw other dropout masks
    long = fit(Routed())
    torch.manual_seed(0)
    start = Routed().state_dict()

    saves = ModelCheckpoint(folder, every_n_train_steps=SAVED_AT, save_top_k=-1)
    straight = fit(Routed(plain=True), saves, max_steps=2 * SAVED_AT)
    checkpoint = next(folder.glob(f"*step={SAVED_AT}.ckpt"))
    resumed = fit(Routed(plain=True), ckpt_path=checkpoint, max_steps=2 * SAVED_AT)

    torch.manual_seed(0)
    together = fit(Routed(plain=True), max_steps=10)
    torch.manual_seed(0)
    alone = fit(Routed(plain=True), strategy=ForwardOnlyStrategy(), devices=1, max_steps=10)

    message = ""
    try:
        fit(Routed(), Drift(), strategy=ForwardOnlyDDPStrategy(digest_every_n_steps=1), max_steps=5)
    except RuntimeError as error:
        message = str(error)
    found = {
        "long": long.state_dict(), "batches": long.batches[:8], "routes": sorted(long.routes),
        "start": start,
        "straight": straight.state_dict(), "resumed": resumed.state_dict(),
        "together": together.state_dict(), "alone": alone.state_dict(), "message": message,
    }  # fmt: skip
    torch.save(found, folder / f"{rank}.pt")
