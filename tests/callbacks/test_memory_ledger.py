"""MemoryLedger: figures are those of the tensors, and what is only expected says so."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callbacks.small_run import Net, plain, quiet_trainer

from lowbit_lightning.callbacks.memory_ledger import (
    MemoryLedger,
    format_table,
    memory_rows,
    modelled_state_bytes,
    peak_bytes,
    technique_rows,
    tensor_bytes,
)
from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.optim import FZOO, SoloAdamW, state_bytes

WEIGHT_BYTES = 4 * (4 * 16 + 16 + 16 + 1)


class Technique(pl.Callback):
    def describe_technique(self) -> list[tuple[str, str, str]]:
        return [("stash", "8 layers", "4 bits")]


class TwoGroups(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        weights = [param for param in self.parameters() if param.ndim > 1]
        biases = [param for param in self.parameters() if param.ndim == 1]
        return torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}])


class LowBit(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SoloAdamW(self.parameters())


class OneLogger(pl.loggers.Logger):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[int | None, dict[str, float]]] = []

    name = property(lambda self: "one")
    version = property(lambda self: 0)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "memory/peak_mb" in metrics:
            self.entries.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def fit(folder: Path, net: pl.LightningModule, *callbacks: pl.Callback, steps: int = 4) -> pl.Trainer:
    trainer = quiet_trainer(
        folder, callbacks=list(callbacks), max_steps=steps, enable_checkpointing=False, limit_val_batches=0
    )
    trainer.fit(net, plain()(), plain(shuffle=False)())
    return trainer


def test_tied_weights_count_once() -> None:
    layer = torch.nn.Linear(3, 3, bias=False)
    tied = torch.nn.ModuleList([layer, torch.nn.Linear(3, 3, bias=False)])
    tied[1].weight = layer.weight
    assert tensor_bytes([layer.weight, tied[1].weight, None]) == 36


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (torch.optim.NAdam, {}),
        (torch.optim.RAdam, {}),
        (torch.optim.Adamax, {}),
        (torch.optim.Adadelta, {}),
    ],
)
def test_modelled_bytes_are_those_of_the_first_step(kind: Any, settings: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(40, 5, dtype=torch.bfloat16))
    optimizer = kind([param], lr=0.1, **settings)
    modelled = modelled_state_bytes(optimizer, optimizer.param_groups[0])
    param.grad = torch.ones_like(param)
    optimizer.step()
    scalars = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    scalar_bytes = sum(value.element_size() for value in scalars if value.ndim == 0)
    assert modelled == state_bytes(optimizer) - scalar_bytes


def test_unknown_optimizer_is_not_guessed() -> None:
    class Unknown(torch.optim.AdamW):
        pass

    net = Net()
    optimizer = Unknown(net.parameters())
    assert memory_rows(net, [optimizer])[-1] == ("optimizer", "", "", "known after the first step")


def test_frozen_weights_have_no_gradients_and_no_states() -> None:
    net = Net()
    net.layers[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters())
    _, gradients, states = memory_rows(net, [optimizer])
    assert gradients[:2] == ("gradients", f"{4 * 17 / 1e6:.3f}")
    assert states[1] == f"{8 * 17 / 1e6:.3f}"


def test_forward_only_optimizer_has_no_gradients_and_no_states() -> None:
    net = Net()
    weights, states = memory_rows(net, [FZOO(net.named_parameters())])
    assert weights[0] == "weights"
    assert states == ("optimizer", "0.000", "0.000", "measured")


def test_module_without_parameters_makes_a_table() -> None:
    assert memory_rows(torch.nn.ReLU(), [])[0] == ("weights", "0.000", "", "measured")


def test_table_is_aligned() -> None:
    lines = format_table(("memory", "MB"), [("weights", "1.5"), ("optimizer group 0", "12.25")]).splitlines()
    assert lines == [
        "memory                MB",
        "------------------------",
        "weights              1.5",
        "optimizer group 0  12.25",
    ]


def test_no_technique_is_said_to_be_none() -> None:
    assert technique_rows([object(), pl.Callback()]) == [("none", "", "")]


def test_peak_is_at_least_what_is_allocated_now() -> None:
    block = torch.ones(5_000_000)
    assert peak_bytes(torch.device("cpu")) > block.numel() * 4
    assert peak_bytes(torch.device("cpu")) < 1e12  # KiB taken for bytes, or twice, would be far off


def test_start_prints_bytes_and_techniques_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, Net(), MemoryLedger(), Technique(), MemoryLedger())
    printed = capsys.readouterr().out
    assert printed.count("active on") == 1
    assert printed.count("measured after the first step") == 1
    row = next(line for line in printed.splitlines() if line.startswith("optimizer "))
    assert row.split() == ["optimizer", f"{2 * WEIGHT_BYTES / 1e6:.3f}", "8.000", "modelled"]
    assert "stash" in printed
    assert "none" not in printed


def test_low_bit_states_are_measured_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(tmp_path, LowBit(), MemoryLedger(), steps=0)
    printed = capsys.readouterr().out
    states = state_bytes(trainer.optimizers[0])
    row = next(line for line in printed.splitlines() if line.startswith("optimizer "))
    assert states > 0
    assert row.split()[1::2] == [f"{states / 1e6:.3f}", "measured"]


def test_scalars_come_every_n_steps_without_a_logger_too(tmp_path: Path) -> None:
    trainer = fit(tmp_path, TwoGroups(), MemoryLedger(every_n_steps=2))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    groups = [metrics[f"memory/optimizer_group_{index}_mb"] for index in range(2)]
    assert metrics["memory/weights_mb"] == pytest.approx(WEIGHT_BYTES / 1e6)
    assert metrics["memory/gradients_mb"] == pytest.approx(WEIGHT_BYTES / 1e6)
    assert metrics["memory/optimizer_mb"] == pytest.approx(sum(groups))
    assert groups[0] > groups[1]
    assert metrics["memory/peak_mb"] > 1


def test_scalars_are_logged_once_for_each_due_step(tmp_path: Path) -> None:
    logger = OneLogger()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=5,
        logger=logger,
        accumulate_grad_batches=2,
        callbacks=[MemoryLedger(every_n_steps=2), MemoryLedger(every_n_steps=1)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(Net(), plain()(), plain(shuffle=False)())
    assert [step for step, _ in logger.entries] == [2, 4]


@pytest.mark.parametrize("steps", [0, -1])
def test_every_n_steps_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"every_n_steps={steps}"):
        MemoryLedger(every_n_steps=steps)
