"""SwampingMonitor: it tells a state that follows its average from one that is stuck."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import SwampingMonitor
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import SoloAdamW


class Module(LightningModule):
    """Gradients that shrink by a tenth every step, so every second moment must fall."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 200))
        self.small = nn.Parameter(torch.randn(3))
        self.direction = torch.randn(8, 200)
        self.optimizer = optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * self.direction).sum() * 0.9**batch_idx + self.small.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self)


def solo(**settings: Any) -> Any:
    return lambda module: SoloAdamW(module.named_parameters(), betas=(0.9, 0.95), lr=1e-4, min_numel=0, **settings)


def metrics(optimizer: Any, every_n_steps: int = 40, **trainer: Any) -> dict[str, float]:
    made = Trainer(
        accelerator="cpu", max_steps=40, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[SwampingMonitor(every_n_steps)], **trainer,
    )  # fmt: skip
    made.fit(Module(optimizer), DataLoader(torch.zeros(100)))  # type: ignore[arg-type]
    return {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("solo/")}


def test_eight_bits_follow_their_average_closely() -> None:
    found = metrics(solo(bits=(8, 8)))
    assert found["solo/state_error"] < 0.1


def test_error_grows_as_bits_fall() -> None:
    assert metrics(solo(bits=(8, 8)))["solo/state_error"] < metrics(solo(bits=(4, 2)))["solo/state_error"] < 0.6


def test_a_state_that_never_moves_is_called_swamped() -> None:
    class Stuck(SoloAdamW):
        """Puts the second moment back after every step from the second on, as a swamped state would be."""

        def step(self, closure: Any = None) -> Any:
            keys = [key for key in self.state[self.param_groups[0]["params"][0]] if key.startswith("exp_avg_sq")]
            state = self.state[self.param_groups[0]["params"][0]]
            before = {key: state[key].clone() for key in keys}
            loss = super().step(closure)
            if state["step"] > 20:
                for key in keys:
                    state[key].copy_(before[key])
            return loss

    def stuck(module: LightningModule) -> SoloAdamW:
        return Stuck(module.named_parameters(), betas=(0.9, 0.9), lr=1e-4, min_numel=0, bits=(8, 8))

    assert metrics(stuck, every_n_steps=20)["solo/swamped"] > 0.9
    assert metrics(solo(bits=(8, 8)), every_n_steps=20)["solo/swamped"] < 0.05


def test_clipped_and_accumulated_gradients_are_seen_as_the_optimizer_saw_them() -> None:
    assert metrics(solo(bits=(8, 8)), gradient_clip_val=0.01)["solo/state_error"] < 0.1
    assert metrics(solo(bits=(8, 8)), accumulate_grad_batches=2)["solo/state_error"] < 0.1


def test_other_optimizers_log_nothing() -> None:
    assert metrics(lambda module: torch.optim.AdamW(module.parameters())) == {}


@pytest.mark.parametrize("argument", ["every_n_steps", "sample"])
def test_bad_arguments_are_named(argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{argument}=0"):
        SwampingMonitor(**{argument: 0})
