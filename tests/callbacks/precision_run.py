"""A small run at the levels of DynamicStashing, whose validation metric is made up."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import DynamicStashing

LEVELS = [[2, 2, 2, 16], [4, 4, 4, 16], [16, 4, 4, 16]]
IMPROVING, FLAT = (4.0, 3.0, 2.0, 1.0), (4.0, 4.0, 4.0, 4.0)


class Net(LightningModule):
    """Two layers; its validations log what they are told to, one value after another, by the step they happen at."""

    def __init__(self, metric: Sequence[float] = FLAT, name: str = "val_loss", every: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 16))
        self.metric, self.name, self.every = metric, name, every

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.layers(batch) - batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        number = max(0, self.trainer.global_step // self.every - 1)
        # Each rank sees another metric.
        self.log(self.name, self.metric[min(number, len(self.metric) - 1)] + 100.0 * self.trainer.global_rank)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
        return DataLoader(rows, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(torch.zeros(4, 16), batch_size=4)  # type: ignore[arg-type]


class LevelOfSteps(Callback):
    """Writes down at which level each batch was trained."""

    def __init__(self, stashing: DynamicStashing) -> None:
        self.stashing = stashing
        self.seen: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.stashing.gemms.level == self.stashing.schedule.level
        assert self.stashing.precision.bits == self.stashing.schedule.level.q1
        self.seen.append(self.stashing.schedule.rule.index)


def trainer(*callbacks: Callback, steps: int = 20, **options: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    given = {"max_steps": steps, "val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
    return Trainer(accelerator="cpu", log_every_n_steps=1, callbacks=list(callbacks), **quiet | given | options)
