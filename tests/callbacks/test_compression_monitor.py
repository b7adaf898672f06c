"""CompressionMonitor: its scalars are those of the last step, as the optimizer saw it."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import CompressionMonitor
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import MicroAdam


class Module(LightningModule):
    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.zeros(64, 64))
        self.small = nn.Parameter(torch.randn(3))
        self.direction = torch.randn(64, 64)
        self.optimizer = optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * self.direction).sum() + self.small.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self)


def micro_adam(**settings: Any) -> Any:
    return lambda module: MicroAdam(module.named_parameters(), lr=1e-4, **settings)


def metrics(optimizer: Any, steps: int = 1, **trainer: Any) -> dict[str, float]:
    made = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[CompressionMonitor(every_n_steps=steps)], **trainer,
    )  # fmt: skip
    made.fit(Module(optimizer), DataLoader(torch.zeros(100)))  # type: ignore[arg-type]
    return {name: float(value) for name, value in made.callback_metrics.items()}


def test_scalars_of_a_first_step_are_those_of_its_gradient() -> None:
    found = metrics(micro_adam(density=0.1))
    squares = Module(None).direction.flatten().square().sort(descending=True).values
    assert found["micro_adam/density"] == pytest.approx(0.1, rel=0.01)
    assert found["micro_adam/caught"] == pytest.approx(float(squares[:410].sum() / squares.sum()), rel=0.03)
    assert found["micro_adam/error_norm"] == pytest.approx(
        float((squares[410:].sum() / squares.sum()).sqrt()), rel=0.03
    )


def test_the_error_of_a_steady_gradient_grows_until_it_is_caught() -> None:
    norms = [metrics(micro_adam(density=0.05), steps)["micro_adam/error_norm"] for steps in (1, 4, 40, 80)]
    assert norms[0] < norms[1] < norms[2]
    assert norms[3] < 1.2 * norms[2]


def test_feedback_is_not_taken_for_caught_energy() -> None:
    without, with_feedback = (metrics(micro_adam(feedback=share))["micro_adam/caught"] for share in (0.0, 0.5))
    assert with_feedback == pytest.approx(without, rel=0.01)


def test_clipped_and_accumulated_gradients_are_seen_as_the_optimizer_saw_them() -> None:
    expected = metrics(micro_adam())
    for option in ({"gradient_clip_val": 0.01}, {"accumulate_grad_batches": 2}):
        assert metrics(micro_adam(), **option) == pytest.approx(expected, rel=0.02)


def test_a_skipped_step_and_other_optimizers_log_nothing() -> None:
    assert metrics(lambda module: torch.optim.AdamW(module.parameters())) == {}
    assert metrics(micro_adam(min_numel=5000)) == {}

    def with_nan(module: Any) -> MicroAdam:
        module.direction[0, 0] = float("nan")
        optimizer: MicroAdam = micro_adam()(module)
        return optimizer

    assert metrics(with_nan) == {}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InvalidArgumentError, match="every_n_steps=0"):
        CompressionMonitor(every_n_steps=0)
