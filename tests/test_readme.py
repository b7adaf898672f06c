"""Every command in README runs, shortened by size flags where it trains; the example shown is the one that ships."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit_lightning.__main__ import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
SHORT = [
    "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "2",
    "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
]  # fmt: skip

# Advice on what is shortened here or was set up so on purpose; each command is a user's, not a test's.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*"),
    pytest.mark.filterwarnings("ignore:.*defined a `validation_step`.*"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*"),
    pytest.mark.filterwarnings("ignore:No seed found.*"),  # a stock LightningCLI says so
    pytest.mark.filterwarnings("ignore:.*but have no `validation_step`.*"),
]


@pytest.fixture(autouse=True)
def _a_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository's examples and some texts of the user's own."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "my_texts").mkdir()
    for number in range(40):
        (tmp_path / "my_texts" / f"{number}.md").write_text(f"Text {number}: " + README)
    (tmp_path / "solo.yaml").write_text((ROOT / "configs" / "techniques" / "solo.yaml").read_text())
    monkeypatch.chdir(tmp_path)


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 9


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_knows_the_target(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run", "--directory", ROOT], check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("make ")])
def test_the_command_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    while "=" in words[0]:
        name, value = words.pop(0).split("=")
        assert name == "PYTHONPATH"
        monkeypatch.syspath_prepend(str(Path(value).absolute()))
    if "--digest" in words:
        monkeypatch.setenv("TRITON_INTERPRET", "0")  # interpreting takes half a minute
    if "export" in words:
        main(["fit", "--config", "quickstart", *SHORT])  # what the reader has done by then
    trains = "fit" in words
    if words[0] == "lowbit-lightning":
        if words[1] == "cp":
            Path("solo.yaml").unlink()
        assert main([*words[1:], *(SHORT if trains else [])]) in (None, 0)
    else:
        assert words[0] == "python"
        monkeypatch.setattr(sys, "argv", [*words[1:], *(SHORT if trains else [])])
        runpy.run_path(words[1], run_name="__main__")


def test_the_example_is_the_file_that_ships() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert shown.strip() in (ROOT / "examples" / "own_module.py").read_text()
