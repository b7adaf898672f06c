"""QuantizeOptimizerStates: everything a module set up for its own Adam goes on working with low-bit states."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader

from lowbit_lightning.callbacks import QuantizeOptimizerStates
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import MicroAdam, SoloAdamW

SOLO = {"class_path": "lowbit_lightning.optim.SoloAdamW", "init_args": {"bits": [4, 2], "min_numel": 0}}


class Module(LightningModule):
    """A regression on 64 random samples that leaves its optimizers to the test."""

    def __init__(self, configure: Callable[[LightningModule], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 64)
        self.head = nn.Linear(64, 64)
        self.configure = configure
        self.rates: list[float] = []

    def configure_optimizers(self) -> Any:
        return self.configure(self)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.head(self.embed(batch)).square().mean()
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[-1]["lr"])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.arange(64), batch_size=16)  # type: ignore[arg-type]


def groups(module: LightningModule) -> list[dict[str, Any]]:
    return [
        {"params": module.embed.parameters(), "weight_decay": 0.0},  # type: ignore[union-attr]
        {"params": module.head.parameters(), "lr": 0.02},  # type: ignore[union-attr]
    ]


def adamw(module: LightningModule) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(module), lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)


def warm_up(optimizer: torch.optim.Optimizer) -> SequentialLR:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 3), CosineAnnealingLR(optimizer, 5)], [3])


def fit(module: Module, *callbacks: Any, **trainer: Any) -> Trainer:
    made = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **trainer,
    )  # fmt: skip
    made.fit(module)
    return made


def with_schedule(schedule: Callable[[Any], Any]) -> Callable[[LightningModule], Any]:
    def configure(module: LightningModule) -> Any:
        optimizer = adamw(module)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    return configure


def test_groups_keep_their_settings_and_get_low_bit_states() -> None:
    module = Module(adamw)
    optimizer = fit(module, QuantizeOptimizerStates(SOLO)).optimizers[0]
    assert isinstance(optimizer, SoloAdamW)
    embed, head = optimizer.param_groups
    assert (embed["lr"], embed["weight_decay"], embed["betas"]) == (0.01, 0.0, (0.8, 0.95))
    assert (head["lr"], head["weight_decay"]) == (0.02, 0.1)
    assert head["param_names"] == ["head.weight", "head.bias"]
    assert "exp_avg_codes" in optimizer.state[module.head.weight]


def test_micro_adam_takes_over_groups_names_and_schedule() -> None:
    micro_adam = {"class_path": "lowbit_lightning.optim.MicroAdam", "init_args": {"density": 0.1, "min_numel": 0}}
    plain, module = Module(with_schedule(warm_up)), Module(with_schedule(warm_up))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter in `scheduler.step")  # torch's SequentialLR
        fit(plain)
        optimizer = fit(module, QuantizeOptimizerStates(micro_adam)).optimizers[0]
    assert isinstance(optimizer, MicroAdam)
    embed, head = optimizer.param_groups
    assert (embed["weight_decay"], head["weight_decay"], head["betas"]) == (0.0, 0.1, (0.8, 0.95))
    assert (embed["density"], head["param_names"]) == (0.1, ["head.weight", "head.bias"])
    assert module.rates == plain.rates
    assert optimizer.state[module.head.weight]["step"] == 8
    assert {"error_codes", "values"} <= optimizer.state[module.embed.weight].keys()
    assert "exp_avg" in optimizer.state[module.head.bias]


@pytest.mark.parametrize(
    "schedule",
    [
        warm_up,
        lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
        lambda optimizer: ChainedScheduler([LinearLR(optimizer, 0.1), LambdaLR(optimizer, lambda step: 0.9**step)]),
        lambda optimizer: ChainedScheduler([warm_up(optimizer), LambdaLR(optimizer, lambda step: 0.9**step)]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step.*")  # torch's SequentialLR warns of itself
def test_schedules_of_every_nesting_are_followed(schedule: Callable[[Any], Any]) -> None:
    plain, quantized = Module(with_schedule(schedule)), Module(with_schedule(schedule))
    fit(plain)
    trainer = fit(quantized, QuantizeOptimizerStates(SOLO))
    assert isinstance(trainer.optimizers[0], SoloAdamW)
    assert quantized.rates == plain.rates
    assert len(set(plain.rates)) > 2


def test_plateau_schedulers_and_tuples_of_lists_are_handled() -> None:
    def configure(module: LightningModule) -> Any:
        optimizer = adamw(module)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, factor=0.5)
        return [optimizer], [{"scheduler": plateau, "monitor": "train_loss"}]

    module = Module(configure)
    fit(module, QuantizeOptimizerStates(SOLO))
    assert module.rates[-1] < module.rates[0] or module.trainer.optimizers[0].param_groups[-1]["lr"] < 0.02


def test_an_unnamed_optimizer_of_ours_gets_names_and_overrides() -> None:
    """What a stock LightningCLI's `optimizer:` hands over."""
    init_args = SOLO["init_args"] | {"overrides": {"embed*": {"bits": [8, 8]}}}  # type: ignore[operator]
    module = Module(lambda module: SoloAdamW(module.parameters(), lr=0.05, betas=(0.7, 0.9)))
    optimizer = fit(module, QuantizeOptimizerStates(SOLO | {"init_args": init_args})).optimizers[0]
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.state[module.embed.weight]["exp_avg_codes"].shape == (64, 64)
    assert optimizer.state[module.head.weight]["exp_avg_codes"].shape == (64, 32)


def test_a_checkpoint_of_the_unquantized_run_is_taken_over(tmp_path: Path) -> None:
    trainer = fit(Module(adamw))
    trainer.save_checkpoint(tmp_path / "fp32.ckpt")
    module = Module(adamw)
    resumed = Trainer(
        accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[QuantizeOptimizerStates(SOLO)],
    )  # fmt: skip
    resumed.fit(module, ckpt_path=tmp_path / "fp32.ckpt")
    optimizer = resumed.optimizers[0]
    assert optimizer.state[module.head.weight]["step"] == 16
    assert "exp_avg_codes" in optimizer.state[module.head.weight]


def test_the_module_is_left_as_it_came() -> None:
    module = Module(adamw)
    fit(module, QuantizeOptimizerStates(SOLO))
    assert "configure_optimizers" not in vars(module)
    own = lambda: adamw(module)  # noqa: E731
    module.configure_optimizers = own  # type: ignore[method-assign]
    fit(module, QuantizeOptimizerStates(SOLO))
    assert module.configure_optimizers is own


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "torch.optim.sgd.SGD"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "weight_decay=0.1"),
    ],
)
def test_optimizers_that_cannot_be_converted_are_named(optimizer: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        fit(Module(lambda module: optimizer(module.parameters())), QuantizeOptimizerStates())


def test_adam_without_decay_is_converted() -> None:
    trainer = fit(Module(lambda module: torch.optim.Adam(module.parameters())), QuantizeOptimizerStates())
    assert isinstance(trainer.optimizers[0], SoloAdamW)
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0


def test_settings_of_the_module_are_not_contradicted() -> None:
    with pytest.raises(InvalidArgumentError, match="lr"):
        QuantizeOptimizerStates({"init_args": {"lr": 1.0}})
    with pytest.raises(InvalidArgumentError, match="bits"):
        QuantizeOptimizerStates({"bits": [4, 2]})
    with pytest.raises(InvalidArgumentError, match="no low-bit states"):
        fit(Module(adamw), QuantizeOptimizerStates({"class_path": "torch.optim.AdamW"}))
