"""Watch: limits of a metric, absolute and relative, and every way to state them wrongly."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.watch import Watch


def breaches(settings: dict[str, Any], values: list[float]) -> list[int]:
    watch = Watch("metric", settings)
    return [step for step, value in enumerate(values) if watch.update(value, step) is not None]


def test_absolute_limits() -> None:
    assert breaches({"above": 0.5}, [0.1, 0.5, 0.6]) == [2]
    assert breaches({"below": 0.5}, [0.6, 0.5, 0.4]) == [2]
    assert breaches({"above": 0.5, "below": 0.1}, [0.3, 0.6, 0.0]) == [1, 2]


def test_rise_is_relative_to_the_best_so_far() -> None:
    assert breaches({"max_rise": "10%"}, [3.0, 2.0, 2.15, 2.25]) == [3]
    assert breaches({"max_rise": 0.1}, [3.0, 2.0, 2.05, 2.15]) == [3]


def test_fall_of_a_metric_that_should_be_high() -> None:
    assert breaches({"mode": "max", "max_rise": "10%"}, [0.5, 0.8, 0.75, 0.7]) == [3]


def test_rise_of_a_negative_metric_is_a_share_of_its_size() -> None:
    assert breaches({"max_rise": "10%"}, [-10.0, -9.5, -8.9]) == [2]


def test_patience_counts_looks_in_a_row() -> None:
    assert breaches({"above": 1, "patience": 2}, [2, 0, 2, 2, 2, 2]) == [3, 5]


def test_a_value_that_is_not_finite_is_a_breach_at_once_and_never_the_best() -> None:
    watch = Watch("metric", {"max_rise": "3%", "patience": 5, "action": "rollback"})
    breach = watch.update(math.nan, 0)
    assert breach is not None
    assert breach.distance == math.inf
    assert breach.action == "rollback"
    assert math.isnan(watch.best)


def test_a_breach_tells_the_best_and_its_step() -> None:
    watch = Watch("metric", {"max_rise": 1})
    for step, value in ((10, 3.0), (20, 2.0)):
        watch.update(value, step)
    breach = watch.update(5.0, 30)
    assert breach is not None
    assert (breach.best, breach.best_step, breach.limit, breach.distance) == (2.0, 20, 3.0, 2.0)


def test_a_baseline_takes_the_place_of_the_best() -> None:
    Path("adamw.json").write_text(json.dumps({"metric": 2.0, "other": 9}))
    assert breaches({"baseline": "adamw.json", "max_rise": "10%"}, [1.0, 2.1, 2.3]) == [2]


def test_state_goes_on_where_it_was() -> None:
    watch, other = (Watch("metric", {"max_rise": "3%", "patience": 2}) for _ in range(2))
    for step, value in enumerate((2.0, 3.0)):
        watch.update(value, step)
    other.load_state_dict(watch.state_dict())
    assert other.update(3.0, 2) == watch.update(3.0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has no limit"),
        ({"max": 3}, "settings are mode, max_rise"),
        ({"above": 1, "mode": "low"}, "mode='low'"),
        ({"above": 1, "patience": 0}, "patience=0"),
        ({"above": 1, "patience": True}, "patience=True"),
        ({"above": 1, "action": "stop"}, "action='stop'.*alert, raise_precision, rollback"),
        ({"above": "much"}, "above='much'"),
        ({"below": math.nan}, "below=nan"),
        ({"max_rise": "many%"}, "max_rise='many%'.*3%"),
        ({"max_rise": -1}, "max_rise=-1"),
        ({"max_rise": "-3%"}, "max_rise='-3%'"),
        ({"baseline": "x.json"}, "cannot be read"),
        (3, "watch.*=3"),
    ],
)
def test_bad_settings_are_named(settings: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Watch("metric", settings)


def test_a_baseline_must_hold_the_metric() -> None:
    Path("other.json").write_text(json.dumps({"val_acc": 1.0}))
    with pytest.raises(InvalidArgumentError, match=r"other.json.*does not hold a number 'metric'"):
        Watch("metric", {"baseline": "other.json", "max_rise": 1})
    Path("good.json").write_text(json.dumps({"metric": 1.0}))
    with pytest.raises(InvalidArgumentError, match="baseline needs max_rise"):
        Watch("metric", {"baseline": "good.json", "above": 1})
