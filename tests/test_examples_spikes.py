"""The scripts behind what README says of spikes: the rules that are compared, the curves, the drills."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a script as ``python examples/SCRIPT`` does, up to its main()."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda script: runpy.run_path(str(EXAMPLES / script))


def noise(steps: int) -> list[tuple[float, float]]:
    random = np.random.default_rng(0)
    return [(2 + 0.02 * x, 0.5 * math.exp(0.1 * y)) for x, y in random.standard_normal((steps, 2))]


def raised(rule: Any, values: list[tuple[float, float]]) -> list[int]:
    return [step for step, value in enumerate(values) if rule(*value)]


ALL = ["ours", "ours, loss only", "Lightning SpikeDetection", "llm-foundry KillLossSpike", "OLMo-core 6σ"]


@pytest.mark.parametrize("name", ALL)
def test_no_rule_minds_quiet_noise(name: str, example: Any) -> None:
    rules = example("spike_rules.py")["RULES"]
    assert list(rules) == ALL
    assert raised(rules[name](500), noise(500)) == []


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("ours", [200]),
        ("ours, loss only", [200]),
        ("Lightning SpikeDetection", []),  # below three times the mean
        ("llm-foundry KillLossSpike", []),  # one step is not more than four
        ("OLMo-core 6σ", [200]),
    ],
)
def test_one_step_at_twice_the_loss(name: str, seen: list[int], example: Any) -> None:
    values = noise(400)
    values[200] = (4.0, 1.0)
    assert raised(example("spike_rules.py")["RULES"][name](400), values) == seen


def test_nan_switches_the_six_sigma_rule_off_and_ours_not(example: Any) -> None:
    """As in the original: NaN stays in its window, and each comparison with it is false, which skips the step."""
    rules = example("spike_rules.py")["RULES"]
    values = noise(400)
    values[200] = (math.nan, math.nan)
    assert raised(rules["OLMo-core 6σ"](400), values) == list(range(200, 329))
    assert raised(rules["ours"](400), values) == [200]
    assert raised(rules["Lightning SpikeDetection"](400), values) == [200]
    assert raised(rules["llm-foundry KillLossSpike"](400), values) == []


def test_kill_loss_spike_ends_a_run_that_stays_high(example: Any) -> None:
    values = noise(400)
    values[200:] = [(5.0, 1.0)] * 200
    assert raised(example("spike_rules.py")["RULES"]["llm-foundry KillLossSpike"](400), values)[0] == 204


def test_faults_are_put_where_they_are_counted(example: Any) -> None:
    curves = example("spike_curves.py")
    clean = curves["made"](0)
    changed = curves["with_spikes"](clean, loss=3, length=2)
    hit = np.flatnonzero(changed.loss != clean.loss).tolist()
    assert hit == [step for fault in changed.faults for step in fault]
    assert changed.loss[hit] == pytest.approx(3 * clean.loss[hit])
    rising = curves["diverging"](clean, 50)
    (fault,) = rising.faults
    assert (fault.start, fault.stop, len(rising.loss)) == (2000, 2100, 2100)
    assert rising.loss[-1] > 3 * clean.loss[2099]


def test_score_counts_hits_misses_and_false_alarms(example: Any) -> None:
    study, curves = example("spike_detection.py"), example("spike_curves.py")
    loss = np.array([value for value, _ in noise(500)])
    norm = np.array([value for _, value in noise(500)])
    loss[[100, 200, 300]] = [8.0, 2.05, 8.0]  # seen, too small to be seen, seen but nobody's fault
    curve = curves["Curve"](loss, norm, [range(100, 101), range(200, 201)])
    found = study["score"]("ours", [curve])
    assert found["recall"] == 0.5
    assert found["delay"] == 0
    assert found["false_alarms_per_10k"] == pytest.approx(1e4 / 498)


@pytest.mark.long
def test_the_detection_study_writes_tables_plot_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["spike_detection.py", "--seeds", "1", "--out", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "spike_detection.py"), run_name="__main__")
    scores = json.loads((tmp_path / "spike_detection.json").read_text())
    assert scores["loss NaN"]["ours"]["recall"] == 1
    assert "| recorded: quickstart |" in (tmp_path / "spike_detection.md").read_text()
    assert (tmp_path / "spike_detection.png").stat().st_size > 1000


def drills() -> list[dict[str, Any]]:
    def made(fault: str, guarded: bool, seed: int) -> dict[str, Any]:
        broken = fault in ("nan_grad", "all") and not guarded
        loss = math.nan if broken else 2.0 + 0.02 * (fault != "none")
        return {
            "fault": fault, "guarded": guarded, "seed": seed, "val_loss": loss, "train_loss": [3.0, loss],
            "decisions": ["skip", "skip", "rollback"] if guarded and fault != "none" else [],
        }  # fmt: skip

    faults = ("none", "nan_grad", "loss", "batch", "weights", "all")
    return [made(fault, guarded, seed) for fault in faults for guarded in (False, True) for seed in (0, 1)]


def test_the_drills_table_says_what_became_of_each_run(example: Any) -> None:
    rows = example("spike_drill.py")["table"](drills(), 300).splitlines()
    assert rows[2] == "| no fault | 2.000 (+0.0%) | 2.000 (+0.0%) | nothing |"
    assert rows[3] == "| a NaN gradient | NaN | 2.020 (+1.0%) | 2 × skip, 1 × rollback |"
    assert "2 seeds" in rows[-1]


def test_the_drills_plot_is_drawn(example: Any, tmp_path: Path) -> None:
    example("spike_drill.py")["plot"](drills(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_drill_adds_what_the_overlays_hold(example: Any) -> None:
    callbacks = example("spike_drill.py")["callbacks"]

    def names(*arguments: Any) -> list[str]:
        return [one["class_path"].rpartition(".")[2] for one in callbacks(*arguments)]

    assert names("none", False, 300) == []
    assert names("all", True, 300) == ["SpikeGuard", "SpikeInjector"]
    assert callbacks("loss", False, 300)[0]["init_args"] == {"step": 150, "kind": "loss"}


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_study_of_drills_runs_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [
        "--seeds",
        "1",
        "--workers",
        "2",
        "--steps",
        "4",
        "--data.init_args.val_fraction",
        "0.001",
        "--data.init_args.seq_len",
        "65",
    ]
    monkeypatch.setattr(sys, "argv", ["spike_drill.py", "--out", str(tmp_path), *short])
    runpy.run_path(str(EXAMPLES / "spike_drill.py"), run_name="__main__")
    runs = json.loads((tmp_path / "spike_drill.json").read_text())
    assert len(runs) == 12
    assert len(list(Path("runs/evidence/spike_drill").glob("*.json"))) == 12
