"""The scripts that make README's numbers run, and say what they measured."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_the_long_run_writes_table_plot_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("long_run.py", "--steps", "40", "--out", str(tmp_path), monkeypatch=monkeypatch)
    numbers = json.loads((tmp_path / "long_run.json").read_text())
    adamw, solo, micro_adam = (numbers[name] for name in ("fp32 AdamW", "SOLO 4/2", "MicroAdam"))
    assert solo["loss"] != adamw["loss"] != micro_adam["loss"]
    assert min(solo["state_error"]) > 0
    assert min(micro_adam["kept_error"]) > 0
    assert set(adamw["state_error"] + adamw["swamped"] + adamw["kept_error"]) == {None}
    assert len(solo["swamped"]) == 40
    shares = [share for share in solo["swamped"] if share is not None]
    assert shares
    assert all(0 <= share <= 1 for share in shares)
    assert "| SOLO 2/2 | 0.001 |" in (tmp_path / "long_run.md").read_text()
    assert (tmp_path / "long_run.png").stat().st_size > 1000


def test_the_long_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    arguments = ["--steps", "20", "--out", str(tmp_path), "--only"]
    run("long_run.py", *arguments, "SOLO 4/2", monkeypatch=monkeypatch)
    before = json.loads((tmp_path / "long_run.json").read_text())
    assert before.keys() == {"fp32 AdamW", "SOLO 4/2"}
    capsys.readouterr()
    tuned = "MicroAdam, window correction, tuned"
    run("long_run.py", *arguments, "SOLO 4/2", tuned, monkeypatch=monkeypatch)
    assert "SOLO 4/2: 20 steps" not in capsys.readouterr().out
    after = json.loads((tmp_path / "long_run.json").read_text())
    assert {name: after[name] for name in before} == before
    (tmp_path / "long_run.png").unlink()
    run("long_run.py", "--redraw", "--out", str(tmp_path), monkeypatch=monkeypatch)
    assert f"| {tuned} | {after[tuned]['lr'][0]:g} |" in (tmp_path / "long_run.md").read_text()
    assert (tmp_path / "long_run.png").stat().st_size > 1000


@pytest.fixture
def evidence() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "evidence.py"))


def results() -> dict[str, list[dict[str, Any]]]:
    common = {"lr": 1e-3, "val_bits_per_byte": 2.0, "state_bytes": 80, "parameters": 10, "cpu_seconds": 9.0}

    def made(loss: float, seed: int) -> dict[str, Any]:
        return common | {"seed": seed, "val_loss": loss + seed / 10, "curve": [(1, 3.0), (2, loss)]}

    return {name: [made(loss, seed) for seed in (0, 1)] for name, loss in (("baseline", 2.0), ("other", 1.0))}


def test_the_table_compares_seed_by_seed_with_the_baseline(evidence: dict[str, Any]) -> None:
    rows = evidence["table"](results(), "val_bits_per_byte").splitlines()
    assert "2.0500 ± 0.0707" in rows[2]
    # The mean of 1.0/2.0 and 1.1/2.1, less one.
    assert f"{(1.0 / 2.0 + 1.1 / 2.1) / 2 - 1:+.2%}" in rows[3]
    assert "8.000" in rows[3]


def test_the_sweep_goes_on_until_the_best_learning_rate_lies_between_others(evidence: dict[str, Any]) -> None:
    def after(**losses: float) -> float | None:
        runs = [{"lr": 1e-3 * int(name[1:]), "val_loss": loss} for name, loss in losses.items()]
        return evidence["next_learning_rate"](runs)

    assert after(x2=1.0, x4=2.0) == pytest.approx(1e-3)
    assert after(x2=1.0, x4=0.5) == pytest.approx(8e-3)
    assert after(x2=1.0, x4=0.5, x8=float("nan")) is None
    assert after(x2=6.0, x4=5.0, x8=4.0, x16=3.0, x32=2.0, x64=1.0) is None  # enough is enough


def test_the_plot_is_drawn(evidence: dict[str, Any], tmp_path: Path) -> None:
    evidence["plot"](results(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_readme_changes_between_its_marks_only(evidence: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    evidence["show_in_readme"](readme, "a", "new\n")
    assert readme.read_text() == "before\n<!-- a -->\nnew\n<!-- /a -->\nafter\n"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_study_trains_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--trainer.limit_val_batches", "1"]
    out = ["--seeds", "1", "--workers", "2", "--out", str(tmp_path)]
    run("evidence.py", "quickstart", *out, *short, monkeypatch=monkeypatch)
    assert len(json.loads((tmp_path / "quickstart.json").read_text())) == 3
