"""Every shipped YAML file runs, says in its first line what it is, and adds to a run without taking anything away."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract.third_party import NextByte
from stand_in import write_package

from lowbit_lightning import configs
from lowbit_lightning.__main__ import main
from lowbit_lightning.cli import LowBitCLI

RECIPES, TECHNIQUES = configs.shipped("recipes"), configs.shipped("techniques")
FILES = RECIPES | TECHNIQUES
FEW_STEPS = {"trainer.max_steps": 3, "trainer.limit_val_batches": 1, "trainer.val_check_interval": 3}
USERS_CONFIG = {
    "model": {"class_path": f"{NextByte.__module__}.{NextByte.__qualname__}"},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 3,
        "limit_train_batches": 3,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
    },
}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with a tiny encoder under the name of each that a recipe takes its weights from."""
    folder = tmp_path_factory.mktemp("site")
    for name in sorted(set(re.findall(r"package:(\w+)", "".join(path.read_text() for path in RECIPES.values())))):
        write_package(folder, name)
    return folder


@pytest.fixture
def packages(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put them before those that may be installed: a test is neither slow nor in need of 90 MB."""
    monkeypatch.syspath_prepend(site)


def entries(node: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(node, dict):
        yield from node.items()
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from entries(child)


def test_no_configuration_lies_outside_the_two_folders() -> None:
    assert sorted(Path(configs.__file__).parent.rglob("*.y*ml")) == sorted(FILES.values())


def test_names_are_unique() -> None:
    assert len(FILES) == len(RECIPES) + len(TECHNIQUES)


@pytest.mark.parametrize("name", FILES)
def test_first_line_describes_it(name: str) -> None:
    assert 20 <= len(configs.description(FILES[name])) <= 100


@pytest.mark.parametrize("name", FILES)
def test_classes_are_named_in_full(name: str) -> None:
    """A stock LightningCLI knows no short names."""
    class_paths = [value for key, value in entries(yaml.safe_load(FILES[name].read_text())) if key == "class_path"]
    assert class_paths
    for class_path in class_paths:
        module, _, cls = class_path.rpartition(".")
        assert isinstance(getattr(__import__(module, fromlist=[cls]), cls), type), class_path


@pytest.mark.parametrize("name", TECHNIQUES)
def test_overlay_replaces_no_list(name: str) -> None:
    """``callbacks:`` in a second file would delete the callbacks of the first."""
    lists = [key for key, value in entries(yaml.safe_load(TECHNIQUES[name].read_text())) if key == "callbacks"]
    assert lists == []


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_and_validates(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--{key}={value}" for key, value in FEW_STEPS.items()]
    assert main(["fit", "--config", name, *options, "--trainer.enable_progress_bar=false"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("validation ")


@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.parametrize("name", TECHNIQUES)
def test_overlay_trains_on_a_users_module(name: str) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(USERS_CONFIG))
    assert main(["fit", "--config", "run.yaml", "--config", name]) == 0


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("overlay", TECHNIQUES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_overlay_stacks_on_a_recipe(recipe: str, overlay: str) -> None:
    """Also where the recipe already has what the overlay adds: a newcomer does not know what is in it."""
    LowBitCLI(["--config", recipe, "--config", overlay], run=False)
