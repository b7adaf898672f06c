"""Levels that make sense, and when a run goes from one to the next."""

import math
from typing import Any

import pytest

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.stash.levels import Level, PlateauRule, parse_levels

THREE = [Level(2, 2, 2, 16), Level(4, 4, 4, 16), Level(16, 4, 4, 16)]


def test_the_default_is_the_stash_alone() -> None:
    assert parse_levels(None, None, None) == [(32, 4, 32, 32), (32, 8, 32, 32)]
    assert all(level.stash_only for level in parse_levels(None, None, None))
    assert parse_levels(None, None, 2) == [(32, 2, 32, 32)]


def test_the_papers_levels_go_from_its_first_to_its_last() -> None:
    levels = parse_levels(None, "paper", None)
    assert levels[0] == (2, 2, 2, 16)
    assert levels[-1] == (16, 4, 4, 16)
    assert parse_levels(levels, None, None) == levels  # which rise


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": [[4, 4, 4, 16], [2, 4, 4, 16]]}, r"\[4, 4, 4, 16\] is followed by \[2, 4, 4, 16\], where q0 falls"),
        ({"levels": [[4, 4, 4, 16], [4, 4, 4, 16]]}, "they are equal"),
        ({"levels": [[2, 9, 2, 16]]}, "levels: q1=9 is out of range: one of 2, 3, 4, 5, 6, 7, 8, 16, 32"),
        ({"levels": [[2, 2, 2]]}, r"\[2, 2, 2\] is out of range: four numbers"),
        ({"levels": [4]}, r"\[4\] is out of range: four numbers"),
        ({"levels": []}, "at least one level"),
        ({"stash_only": [8, 4]}, "stash_only: 8 is followed by 4, where q1 falls"),
        ({"stash_only": [1]}, "stash_only: q1=1 is out of range"),
        ({"stash_only": [True]}, "stash_only: q1=True is out of range"),
        ({"preset": "papers"}, "preset='papers' is out of range: one of paper"),
        ({"preset": "paper", "stash_only": [4]}, "give one of levels, preset and stash_only"),
    ],
)
def test_levels_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        parse_levels(**{"levels": None, "preset": None, "stash_only": None} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "up"}, "mode='up' is out of range: min or max"),
        ({"patience": 0}, "patience=0"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"min_delta": -1.0}, "min_delta=-1.0"),
        ({"min_delta": math.nan}, "min_delta=nan"),
        ({"max_degradation": 0.0}, "max_degradation=0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        PlateauRule(THREE, **arguments)


def indices(rule: PlateauRule, values: list[float]) -> list[int]:
    found = []
    for value in values:
        rule.update(value)
        found.append(rule.index)
    return found


def test_the_level_rises_when_the_metric_stops_improving_and_never_falls() -> None:
    assert indices(PlateauRule(THREE), [3.0, 2.0, 2.0, 1.5, 1.6, 9.0, 0.1]) == [0, 0, 1, 1, 2, 2, 2]


def test_patience_counts_values_in_a_row_anew_on_every_level() -> None:
    assert indices(PlateauRule(THREE, patience=2), [3, 3, 2, 2, 2, 2, 2]) == [0, 0, 0, 0, 1, 1, 2]


def test_min_delta_is_the_least_that_counts() -> None:
    assert indices(PlateauRule(THREE, min_delta=0.5), [3.0, 2.5, 2.25, 1.5]) == [0, 0, 1, 1]


def test_more_is_better_in_the_other_mode() -> None:
    assert indices(PlateauRule(THREE, mode="max"), [0.1, 0.2, 0.1, 0.3]) == [0, 0, 1, 1]


def test_much_worse_raises_at_once() -> None:
    def rule() -> PlateauRule:
        return PlateauRule(THREE, patience=5, max_degradation=0.1)

    assert indices(rule(), [2.0, 2.19]) == [0, 0]
    assert indices(rule(), [2.0, 2.21]) == [0, 1]
    assert indices(PlateauRule(THREE, mode="max", patience=5, max_degradation=0.1), [0.5, 0.44]) == [0, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_raises_at_once(value: float) -> None:
    rule = PlateauRule(THREE, patience=5)
    assert indices(rule, [2.0, value, 1.9]) == [0, 1, 1]
    assert rule.state_dict()["best"] == 1.9


def test_why_is_said_where_it_rose() -> None:
    rule = PlateauRule(THREE[:2])
    assert [rule.update(value) for value in (2.0, 2.0, 2.0)] == [None, "not better than 2 1 times", None]


def test_the_state_goes_on_value_by_value() -> None:
    values = [3.0, 2.9, 2.95, 2.8, 2.9, 2.9, 2.9]
    straight = indices(PlateauRule(THREE, patience=2), values)
    for cut in range(len(values)):
        first, second = PlateauRule(THREE, patience=2), PlateauRule(THREE, patience=2)
        before = indices(first, values[:cut])
        second.load_state_dict(first.state_dict())
        assert before + indices(second, values[cut:]) == straight


def test_what_was_raised_for_good_stays_when_an_earlier_state_is_loaded() -> None:
    rule = PlateauRule(THREE)
    early = rule.state_dict()
    rule.rise()
    rule.load_state_dict(early)
    assert rule.index == 0
    rule.rise(for_good=True)
    rule.load_state_dict(early)
    assert rule.index == 1
    resumed = PlateauRule(THREE)
    resumed.load_state_dict(rule.state_dict())
    resumed.load_state_dict(early)
    assert resumed.index == 1
    rule.reset()
    rule.load_state_dict(early)
    assert rule.index == 0


def test_the_state_of_other_levels_goes_on_at_the_next_higher_one() -> None:
    rule = PlateauRule(THREE)
    rule.rise()
    other = PlateauRule([Level(2, 2, 2, 16), Level(8, 4, 4, 16), Level(16, 8, 8, 16)])
    other.load_state_dict(rule.state_dict())
    assert other.level == (8, 4, 4, 16)
    lower = PlateauRule(THREE[:1])
    lower.load_state_dict(rule.state_dict())
    assert lower.level == THREE[0]


def test_a_best_value_of_the_other_mode_is_forgotten() -> None:
    rule = PlateauRule(THREE)
    rule.update(2.0)
    other = PlateauRule(THREE, mode="max")
    other.load_state_dict(rule.state_dict())
    assert other.state_dict()["best"] is None
