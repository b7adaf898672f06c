"""The study of 4-bit training: its runs are what it says, it goes on where it was stopped, and its tables are right."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    sys.modules.pop("evidence_four_bit", None)
    import evidence_four_bit  # type: ignore[import-not-found]

    monkeypatch.setattr(evidence_four_bit, "RUNS", tmp_path / "runs")
    return evidence_four_bit


def result(
    study: Any, variant: str, lr: float, val_loss: float, *, seed: int = 0, spikes: bool = False
) -> dict[str, Any]:
    train = [5.0] * 20 + [2.0] * 20 + [val_loss] * 20
    return {"variant": variant, "lr": lr, "seed": seed, "spikes": spikes, "val_loss": val_loss, "train": train}


def test_every_variant_at_every_rate_three_seeds_at_two_and_spikes_at_one(study: Any) -> None:
    jobs = study.jobs(3)
    assert len(jobs) == len(set(jobs)) == 8 * (4 + 1 + 2 * 2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*log_every_n_steps.*")
def test_a_finished_run_is_not_repeated(study: Any, tmp_path: Path) -> None:
    job = study.Job("INT4 Stable-SPAM", 1e-2, 0, spikes=True)
    first = study.run(job, 4)
    assert len(first["train"]) == 4
    assert math.isfinite(first["val_loss"])
    (file,) = (tmp_path / "runs").glob("*.json")
    file.write_text(json.dumps({**first, "val_loss": 7.0}))
    assert study.run(job, 4)["val_loss"] == 7.0
    assert len(study.run(job, 8)["train"]) == 8


def test_who_diverged(study: Any) -> None:
    assert not study.diverged(result(study, "FP4 Adam", 1e-2, 2.4))
    assert study.diverged(result(study, "FP4 Adam", 1e-2, 2.6))
    assert study.diverged(result(study, "FP4 Adam", 1e-2, math.nan))


def test_tables_and_plot(study: Any, tmp_path: Path) -> None:
    results = [result(study, "FP4 Adam", 3e-3, 2.0 + seed / 10, seed=seed) for seed in range(3)]
    results += [result(study, "FP4 Adam", 3e-3, 3.0, spikes=True), result(study, "BF16 Adam", 1e-3, 1.5)]
    text = study.write(results, 60, tmp_path)
    assert "| FP4 Adam | – | 2.100 ± 0.100 |" in text
    assert "| FP4 Adam | 2.000 | 3.000 (1 of 1 diverged) | +1.000 |" in text
    assert "| BF16 Adam | 1.500 | – |" in text
    assert (tmp_path / "four_bit.png").stat().st_size > 10_000
