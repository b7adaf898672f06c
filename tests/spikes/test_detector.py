"""The detectors: what is called a spike or a divergence, what is not, and what can never happen to them."""

import json
import math
import random
from typing import Any

import pytest

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.detector import DivergenceDetector, RobustDetector


def noise(count: int, level: float = 3.0, width: float = 0.1, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(level, width) for _ in range(count)]


def warm(values: list[float], **settings: Any) -> RobustDetector:
    detector = RobustDetector(**settings)
    for value in values:
        detector.accept(value)
    return detector


def test_score_is_in_robust_standard_deviations() -> None:
    detector = warm([3.0, 3.1, 2.9, 3.2, 2.8] * 10)  # median 3, median absolute deviation 0.1
    verdict = detector.judge(4.0)
    assert verdict.score == pytest.approx(1 / 0.14826)
    assert verdict.median == 3.0
    assert verdict.limit == pytest.approx(3 + 6 * 0.14826)
    assert verdict.spike


def test_only_upwards_counts() -> None:
    verdict = warm(noise(64)).judge(-100.0)
    assert not verdict.spike
    assert verdict.score < 0


def test_judging_remembers_nothing() -> None:
    detector = warm(noise(64))
    before = detector.state_dict()
    detector.judge(1e9)
    detector.judge(3.0)
    assert detector.state_dict() == before


def test_few_samples_judge_nothing_finite() -> None:
    detector = warm(noise(31))
    assert not detector.judge(1e9).spike
    detector.accept(3.0)
    assert detector.judge(1e9).spike


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("seen", [0, 64])
def test_nonfinite_is_a_spike_from_the_first_step_and_never_enters(value: float, seen: int) -> None:
    detector = warm(noise(seen))
    before = detector.state_dict()
    verdict = detector.judge(value)
    detector.accept(value)
    assert verdict.spike
    assert verdict.score == math.inf
    assert detector.state_dict() == before


def test_spikes_in_a_row_do_not_hide_each_other() -> None:
    detector = warm(noise(64))
    assert all(detector.judge(value).spike for value in (5.9, 6.0, 6.5, 6.5))


def test_constant_signal_has_room_for_rounding_but_not_for_a_spike() -> None:
    detector = warm([2.0] * 64)
    assert not detector.judge(2.0 + 1e-6).spike
    assert detector.judge(2.5).spike


def test_log_space_compares_factors() -> None:
    detector = warm([math.exp(value) for value in noise(64, level=-5.0, width=0.3)], log_space=True)
    assert not detector.judge(math.exp(-5.0 + 1.0)).spike
    verdict = detector.judge(math.exp(-5.0 + 3.0))
    assert verdict.spike
    assert math.exp(-5.0) * math.exp(1.0) < verdict.limit < math.exp(-5.0 + 3.0)


def test_log_space_has_nothing_to_say_of_zero() -> None:
    detector = warm([1.0] * 64, log_space=True)
    before = detector.state_dict()
    assert not detector.judge(0.0).spike
    detector.accept(0.0)
    assert detector.state_dict() == before


def test_false_alarms_on_normal_noise_are_rare() -> None:
    detector = warm(noise(128))
    alarms = 0
    for value in noise(3000, seed=1):
        alarms += detector.judge(value).spike
        detector.accept(value)
    assert alarms == 0


def test_falling_loss_is_no_spike() -> None:
    detector = RobustDetector()
    for step, wobble in enumerate(noise(600, level=0.0, width=0.05)):
        value = 8 / (1 + step / 20) + 2 + wobble
        assert not detector.judge(value).spike
        detector.accept(value)


def test_state_goes_on_without_a_blind_step() -> None:
    detector = warm(noise(64))
    other = RobustDetector()
    other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    for value in [*noise(10, seed=2), 9.0]:
        assert other.judge(value) == detector.judge(value)


def test_a_shorter_window_keeps_the_latest_values() -> None:
    other = RobustDetector(window=4, min_samples=2)
    other.load_state_dict(warm([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).state_dict())
    assert other.state_dict() == {"accepted": [3.0, 4.0, 5.0, 6.0]}


def rising(start: float, slope: float, count: int) -> list[float]:
    return [start + slope * step for step in range(count)]


@pytest.mark.parametrize("level", [3.0, -3.0, 0.0, 1e-6, 1000.0])
def test_noise_never_diverges_at_any_level(level: float) -> None:
    detector = DivergenceDetector()
    assert not any(detector.update(value) for value in noise(3000, level))


@pytest.mark.parametrize("level", [3.0, -3.0, 0.0])
def test_a_lasting_rise_diverges_at_any_level(level: float) -> None:
    detector = DivergenceDetector()
    assert not any(detector.update(value) for value in noise(200, level))
    assert any(detector.update(level + rise) for rise in rising(0, 0.1, 100))


def test_divergence_needs_patience_in_a_row() -> None:
    detector = DivergenceDetector(fast=0.0, patience=5)
    for value in [1.0] * 200 + [2.0] * 4 + [1.0] + [2.0] * 4:
        assert not detector.update(value)
    assert detector.update(2.0)
    assert not detector.update(2.0)


def test_score_of_a_positive_loss_is_the_ratio_of_its_averages() -> None:
    detector = DivergenceDetector(fast=0.0, slow=0.5)
    for value in (1.0, 3.0):
        detector.update(value)
    slow = (0.5 * 0.5 * 1.0 + 0.5 * 3.0) / 0.75
    assert detector.score == pytest.approx(3.0 / slow)
    assert detector.limit == pytest.approx(1.5 * slow)


def test_nan_changes_no_average() -> None:
    detector = DivergenceDetector()
    detector.update(1.0)
    before = detector.state_dict()
    assert not detector.update(math.nan)
    assert detector.state_dict() == before


def test_divergence_state_goes_on_where_it_was() -> None:
    values = noise(100) + rising(3.0, 0.1, 100)
    detector, other = DivergenceDetector(), DivergenceDetector()
    for value in values[:130]:
        detector.update(value)
    other.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert [other.update(value) for value in values[130:]] == [detector.update(value) for value in values[130:]]


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: RobustDetector(window=1), "window=1"),
        (lambda: RobustDetector(threshold=0), "threshold=0"),
        (lambda: RobustDetector(window=16, min_samples=17), "min_samples=17"),
        (lambda: DivergenceDetector(ratio=1.0), "divergence_ratio=1.0"),
        (lambda: DivergenceDetector(fast=1.0), "fast=1.0"),
        (lambda: DivergenceDetector(slow=0.5), "slow=0.5"),
        (lambda: DivergenceDetector(patience=0), "patience=0"),
    ],
)
def test_bad_arguments_are_named(build: Any, argument: str) -> None:
    with pytest.raises(InvalidArgumentError, match=argument):
        build()
