from pathlib import Path

import pytest

from lowbit_lightning import configs
from lowbit_lightning.__main__ import main


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configs folder with two files, so that these tests do not depend on what ships."""
    for name, text in (
        ("recipes/tiny.yaml", "# A tiny run\ntrainer:\n  max_steps: 1\n"),
        ("techniques/fewer_bits.yaml", "# Fewer bits\nno_decay: []\n"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    return tmp_path


def test_list_shows_every_name_aligned_with_its_first_line(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  tiny        A tiny run" in lines
    assert "  fewer_bits  Fewer bits" in lines


def test_every_shipped_configuration_has_a_description() -> None:
    files = [path for kind in configs.KINDS for path in configs.shipped(kind).values()]
    assert [path.name for path in files if not configs.description(path)] == []


def test_cp_writes_to_a_file_or_into_a_folder(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert main(["cp", "tiny", str(tmp_path / "mine.yaml")]) == 0
    assert main(["cp", "tiny", str(tmp_path / "folder")]) == 0
    source = (shipped / "recipes/tiny.yaml").read_bytes()
    assert (tmp_path / "mine.yaml").read_bytes() == source
    assert (tmp_path / "folder/tiny.yaml").read_bytes() == source


def test_cp_replaces_a_file_only_with_force(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("my work")
    assert main(["cp", "tiny", str(target)]) == 2
    assert target.read_text() == "my work"
    assert "--force" in capsys.readouterr().err
    assert main(["cp", "tiny", str(target), "--force"]) == 0
    assert target.read_text().startswith("# A tiny run")


def test_cp_of_an_unknown_name_offers_the_closest(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cp", "tinny", str(tmp_path / "x.yaml")]) == 2
    message = capsys.readouterr().err
    assert "'tinny'" in message
    assert "Did you mean tiny?" in message
    assert "lowbit-lightning list" in message


def test_cp_into_a_missing_folder_names_the_folder(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cp", "tiny", str(tmp_path / "nowhere" / "x.yaml")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_cp_says_how_to_run_a_recipe_and_how_a_technique(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, expected in (("quickstart", "fit --config "), ("solo", "fit --config RUN --config ")):
        assert main(["cp", name, str(tmp_path)]) in (None, 0)
        assert f"{expected}{tmp_path / name}.yaml" in capsys.readouterr().out
