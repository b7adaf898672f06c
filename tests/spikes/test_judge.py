"""Judge: what several signals add up to, and that trouble never enters what it is compared with."""

import json
import math

import pytest

from lowbit_lightning.spikes.judge import Judge

SIGNALS = ("loss", "grad_norm", "nonfinite")


def made(signals: tuple[str, ...] = SIGNALS, patience: int = 5, steps: int = 40) -> Judge:
    judge = Judge(signals, 64, 6.0, 8, 1.5, 0.9, 0.99, patience)
    for step in range(steps):
        assert judge.judge({"loss": 2.0 + 0.01 * (step % 5), "grad_norm": 1.0, "nonfinite": 0.0}).kind is None
    return judge


def test_the_signal_furthest_out_of_line_is_named() -> None:
    judge = made()
    assert judge.judge({"loss": 3.0, "grad_norm": 1e9, "nonfinite": 0.0}).signal == "grad_norm"
    assert judge.judge({"loss": 300.0, "grad_norm": 2.0, "nonfinite": 0.0}).signal == "loss"


@pytest.mark.parametrize(("loss", "grad_norm", "signal"), [(math.nan, math.nan, "loss"), (2.0, math.nan, "nonfinite")])
def test_of_nonfinite_signals_the_cause_is_named(loss: float, grad_norm: float, signal: str) -> None:
    found = made().judge({"loss": loss, "grad_norm": grad_norm, "nonfinite": 2.0})
    assert (found.kind, found.signal, found.score) == ("spike", signal, math.inf)


def test_no_value_of_a_spiked_step_is_remembered() -> None:
    judge = made()
    before = judge.state_dict()
    judge.judge({"loss": 2.01, "grad_norm": 1e9, "nonfinite": 0.0})
    assert judge.state_dict() == before | {"events_in_a_row": 1}


def test_weights_that_are_not_finite_come_first() -> None:
    assert made().judge({"loss": math.nan}, weights_finite=False).kind == "nonfinite_weights"


def test_a_signal_that_was_not_measured_is_not_judged() -> None:
    found = made().judge({"nonfinite": 0.0})
    assert found.kind is None
    assert set(found.verdicts) == {"nonfinite"}
    assert made().judge({}).kind is None


def test_a_lasting_new_level_is_one_divergence_and_then_learned() -> None:
    judge = made(patience=5)
    kinds = [judge.judge({"loss": 9.0, "grad_norm": 1.0, "nonfinite": 0.0}).kind for _ in range(30)]
    assert kinds == ["spike"] * 4 + ["divergence"] + [None] * 25


def test_lasting_nan_is_never_learned() -> None:
    judge = made(patience=5)
    kinds = [judge.judge({"loss": math.nan, "grad_norm": math.nan, "nonfinite": 1.0}).kind for _ in range(10)]
    assert kinds == (["spike"] * 4 + ["divergence"]) * 2
    assert judge.judge({"loss": 9.0}).kind == "spike"


def test_a_slow_rise_of_accepted_losses_diverges() -> None:
    judge = Judge(("loss",), 64, 6.0, 8, 1.5, 0.9, 0.99, 10)
    kinds = [judge.judge({"loss": 2.0 + 0.3 * (step % 7)}).kind for step in range(100)]
    kinds += [judge.judge({"loss": (2.0 + 0.3 * (step % 7)) * 1.02**step}).kind for step in range(150)]
    assert kinds[:100] == [None] * 100
    assert "divergence" in kinds
    assert "spike" not in kinds


def test_a_repeated_value_of_a_logged_metric_is_no_news() -> None:
    judge = Judge(("stash/error",), 64, 6.0, 8, 1.5, 0.9, 0.99, 10)
    for step in range(60):
        judge.judge({"stash/error": 0.1 + 0.01 * (step // 10)})
    assert len(judge.state_dict()["detectors"]["stash/error"]["accepted"]) == 6


def test_state_goes_on_where_it_was() -> None:
    judge, other = made(), made(steps=0)
    judge.judge({"loss": 9.0})
    other.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    for values in ({"loss": 9.0}, {"loss": 2.0, "grad_norm": 1.0}, {"grad_norm": 7.0}):
        assert judge.judge(values) == other.judge(values)


def test_a_signal_that_is_new_at_resume_starts_anew() -> None:
    other = made((*SIGNALS, "update_ratio"), steps=0)
    other.load_state_dict(made().state_dict())
    assert other.judge({"loss": 9.0, "update_ratio": 9.0, "grad_norm": 1.0}).signal == "loss"
