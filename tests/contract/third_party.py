"""A language model as somebody else wrote it: the contract tests train it and must not have to change a line of it.

It imports nothing of this project. It brings its own optimizer and learning rate, its own shuffled DataLoader and
dropout. Its matrices are wide enough for low-bit states; its other parameters are those that optimizers trip over.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, softplus
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

CONTEXT, BATCH, SAMPLES = 32, 8, 96  # 12 batches an epoch
LEARNING_RATE, STEPS_TO_ZERO = 1e-2, 30


class NextByte(LightningModule):
    """Predicts the next byte of Python source from the present one and the running mean of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.hidden = nn.Linear(128, 64)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(64, 128)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next byte, (batch, context, 128), for ``tokens`` of (batch, context)."""
        present = self.embedding(tokens)
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=present.dtype)
        past = present.cumsum(dim=1) / counts[:, None]
        hidden = self.dropout(gelu(self.hidden(torch.cat([present, past], dim=-1))))
        return self.head(hidden) / softplus(self.temperature)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps_seen += 1
        loss = cross_entropy(self(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        schedule = LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=STEPS_TO_ZERO)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return DataLoader(windows(), batch_size=BATCH, shuffle=True)  # type: ignore[arg-type]


def windows() -> Tensor:
    """Real text: the first bytes of a module of the standard library, cut into (SAMPLES, CONTEXT + 1)."""
    text = Path(argparse.__file__).read_bytes()[: SAMPLES * (CONTEXT + 1)]
    return torch.tensor(list(text)).clamp(max=127).view(SAMPLES, CONTEXT + 1)


class Awkward(NextByte):
    """With parameters that get a zero gradient, an empty one, or none at all (``temperature`` above is 0-d)."""

    def __init__(self) -> None:
        super().__init__()
        self.unmoved = nn.Parameter(torch.ones(64, 64))
        self.empty = nn.Parameter(torch.ones(0, 64))
        self.unused = nn.Parameter(torch.ones(64, 64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.0 * self.unmoved.sum() + self.empty.sum()


class Overflowing(NextByte):
    """Its third batch has a loss that is not finite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if batch_idx == 2 else loss
