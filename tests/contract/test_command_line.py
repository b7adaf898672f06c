"""Every technique is switched on by YAML alone, under our command line and under somebody's own stock LightningCLI."""

import sys
from collections.abc import Callable

import pytest
import yaml
from contract.registry import Technique, each_technique
from contract.small_run import configuration, write
from contract.third_party import NextByte
from lightning.pytorch.cli import LightningCLI

from lowbit_lightning import configs
from lowbit_lightning.__main__ import main

StockCLI = Callable[..., LightningCLI]
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
USERS_CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_train_batches": 2,
        "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "train_loss"}}
        ],
        **QUIET,
    },
}


@pytest.fixture
def stock_cli(monkeypatch: pytest.MonkeyPatch) -> StockCLI:
    """Runs what a third party's main.py is: one line, and the files on its command line."""

    def main_py(*files: str) -> LightningCLI:
        monkeypatch.setattr(sys, "argv", ["main.py", "fit", *(word for file in files for word in ("--config", file))])
        return LightningCLI(NextByte)

    return main_py


def assert_on(cli: LightningCLI, class_paths: list[str]) -> None:
    names = {type(callback).__name__ for callback in cli.trainer.callbacks}
    assert {class_path.rpartition(".")[2] for class_path in class_paths} <= names


@each_technique
def test_printed_configuration_round_trips_and_trains(technique: Technique, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for name in (write(configuration(technique, max_steps=2)), "printed.yaml"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "--config", name, "--print_config"])
        assert stop.value.code == 0
        printed.append(capsys.readouterr().out)
        write(yaml.safe_load(printed[-1]), "printed.yaml")
    assert printed[0] == printed[1]
    assert main(["fit", "--config", "printed.yaml"]) == 0


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden by .LightningCLI")
@each_technique
def test_stock_cli_trains_with_the_same_configuration(technique: Technique, stock_cli: StockCLI) -> None:
    config = configuration(technique, max_steps=2)
    del config["model"]
    config.pop("scheduler_interval", None)  # the one key here that is LowBitCLI's own
    cli = stock_cli(write(config))
    assert cli.trainer.global_step == 2
    assert_on(cli, [callback["class_path"] for callback in technique.callbacks])
    if technique.optimizer is not None:
        assert type(cli.trainer.optimizers[0]).__name__ == technique.optimizer["class_path"].rpartition(".")[2]


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden by .LightningCLI")
@pytest.mark.parametrize("overlay", configs.shipped("techniques"))
def test_overlay_adds_to_a_stock_cli_and_takes_nothing_away(overlay: str, stock_cli: StockCLI) -> None:
    path = configs.shipped("techniques")[overlay]
    cli = stock_cli(write(USERS_CONFIG), str(path))
    assert cli.trainer.global_step == 2
    added = [entry["class_path"] for entry in yaml.safe_load(path.read_text())["trainer"].get("callbacks+", [])]
    assert_on(cli, [*added, "lightning.pytorch.callbacks.EarlyStopping"])


@pytest.mark.parametrize("activations", ["dsq", "dsq_levels", "four_bit"])
def test_all_overlays_stack_on_a_stock_cli(activations: str, stock_cli: StockCLI) -> None:
    # fzoo.yaml brings an optimizer without gradients, and there is nothing that solo.yaml could convert; of those that
    # pack activations there is one in a run.
    others = {"fzoo", "dsq", "dsq_levels", "four_bit"} - {activations}
    paths = [str(path) for name, path in configs.shipped("techniques").items() if name not in others]
    assert stock_cli(write(USERS_CONFIG), *paths).trainer.global_step == 2
