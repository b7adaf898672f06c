"""The script behind what README says of forward-only fine-tuning: what is run, and how it is summed up."""

import json
import math
import runpy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowbit_lightning.cli import LowBitCLI

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "forward_only.py"))


def made(method: str, seed: int, accuracy: float, loss: float = 1.0, lr: float = 1e-3) -> dict[str, Any]:
    curve = [[0, 0.0, 0.5, 1.5], [180, 10.0 + seed, accuracy, loss]]
    return {"method": method, "setting": "all", "lr": lr, "seed": seed, "trained": 1000, "curve": curve}


RESULTS = [made("AdamW", 0, 0.7), made("AdamW", 1, 0.8), made("FZOO, rank-1 signs", 0, 0.4)]


def test_every_method_gets_the_same_number_of_forward_passes(example: dict[str, Any]) -> None:
    for setting in example["SETTINGS"].values():
        validations = setting.forwards // example["VALIDATIONS"]
        for name, method in example["METHODS"].items():
            assert validations % method.forwards == 0
            arguments = setting.arguments(method, setting.learning_rates[name][0], 1, setting.forwards)
            assert f"--trainer.max_steps={setting.forwards // method.forwards}" in arguments
            assert f"--trainer.val_check_interval={validations // method.forwards}" in arguments


def test_forward_passes_of_a_step_are_what_the_optimizer_makes(example: dict[str, Any]) -> None:
    from torch import nn

    from lowbit_lightning.optim import FZOO, MeZO

    params = list(nn.Linear(2, 2).named_parameters())
    assert example["METHODS"]["MeZO"].forwards == len(MeZO(params).evaluations())
    assert example["METHODS"]["FZOO, rank-1 signs"].forwards == len(FZOO(params, num_perturbations=8).evaluations())


def test_the_command_lines_are_valid(example: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Their settings reach the configuration; nothing is built, since that would need the pretrained weights."""
    monkeypatch.setattr(LowBitCLI, "instantiate_classes", lambda self: None)
    settings, trained = example["SETTINGS"], {"head": "trainable", "lora": "lora", "all": "head"}
    for (setting, argument), (name, method) in product(trained.items(), example["METHODS"].items()):
        config = LowBitCLI(settings[setting].arguments(method, 2e-3, 7, 360), run=False).config
        assert config.model.init_args[argument]
        assert config.data.init_args.seed == config.seed_everything == 7
        assert config.optimizer.init_args.lr == 2e-3
        assert ("rank1" in str(config.optimizer)) == ("rank-1" in name)


def test_the_stopwatch_counts_training_and_not_validation(
    example: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr("time.process_time", lambda: next(clock))
    stopwatch = example["Stopwatch"](forwards=9)
    metrics = {"val_accuracy": 0.5, "val_loss": 1.0}
    for step in (0, 1, 2):
        stopwatch.on_validation_end(SimpleNamespace(global_step=step, callback_metrics=metrics), None)
        if step < 2:
            stopwatch.on_train_batch_start()
            stopwatch.on_train_batch_end()
    assert stopwatch.curve == [(0, 0.0, 0.5, 1.0), (9, 1.0, 0.5, 1.0), (18, 3.0, 0.5, 1.0)]


def test_the_learning_rate_with_the_least_last_loss_is_chosen_and_nan_never(example: dict[str, Any]) -> None:
    runs = [made("AdamW", 0, 0.5, loss, lr) for lr, loss in ((1e-4, math.nan), (1e-3, 0.9), (1e-2, 1.1))]
    assert example["best_learning_rate"](runs) == 1e-3


def test_the_table_shows_what_no_training_gives_and_the_gain_over_it(example: dict[str, Any]) -> None:
    rows = example["table"](RESULTS).splitlines()
    assert rows[2].startswith("| all weights, from class centroids (1,000) | none | – | 0 | 0.500 | 1.500 |")
    assert "| 180 | 0.750 ± 0.071 | 1.000 ± 0.000 | +0.250 | 10 |" in rows[3]
    assert "| 0.400 | 1.000 | -0.100 | 10 |" in rows[4]  # a method that loses is shown like one that wins


def test_the_sweep_is_shown_with_every_rate(example: dict[str, Any]) -> None:
    runs = [made("AdamW", 0, 0.5, loss, lr) for lr, loss in ((1e-4, 1.25), (1e-3, 0.9))]
    assert "| all weights, from class centroids | AdamW | 0.0001: 1.250, 0.001: 0.900 |" in example["lr_table"](runs)


def test_the_plot_is_drawn(example: dict[str, Any], tmp_path: Path) -> None:
    example["plot"](RESULTS, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_finished_run_is_read_and_not_repeated(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example["run"]
    monkeypatch.setitem(run.__globals__, "RUNS", tmp_path)

    def build(arguments: list[str], run: bool) -> Any:
        trainer = SimpleNamespace(callbacks=[], global_step=0, callback_metrics={"val_accuracy": 0.5, "val_loss": 1.0})

        def validate(*_: Any, **__: Any) -> None:
            trainer.callbacks[0].on_validation_end(trainer, None)

        trainer.validate = trainer.fit = validate
        return SimpleNamespace(trainer=trainer, model=torch.nn.Linear(2, 2), datamodule=None)

    monkeypatch.setitem(run.__globals__, "LowBitCLI", build)
    first = run("AdamW", "head", 1e-3, 0, 180, [], 1)
    monkeypatch.setitem(run.__globals__, "LowBitCLI", None)
    assert run("AdamW", "head", 1e-3, 0, 180, [], 1) == json.loads(json.dumps(first))
