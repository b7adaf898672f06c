"""``watch``: any logged metric, and the limits between which it must stay. No torch, no Lightning.

A limit is absolute (``above``, ``below``), or relative (``max_rise``) to the best value so far or to the value that a
baseline run ended with.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.arguments import check
from lowbit_lightning.spikes.events import WatchAction

_SETTINGS = ("mode", "max_rise", "above", "below", "baseline", "patience", "action")


@dataclass(frozen=True)
class Breach:
    """A watched metric beyond its limit for as many looks as its patience allows.

    Attributes:
        value: the metric.
        limit: what it should have stayed within.
        distance: how far it is beyond, in the metric's units; infinite for a value that is not finite.
        action: what is asked for.
        best: the best value so far; NaN if there is none.
        best_step: the step at which it was seen; -1 if there is none.
    """

    value: float
    limit: float
    distance: float
    action: WatchAction
    best: float
    best_step: int


class Watch:
    """One watched metric.

    Args:
        key: name of the metric, as it is logged.
        settings: any of ``mode`` (``min`` or ``max``: which way is better; default min), ``max_rise`` (how much worse
            than the best value or the baseline it may get: a number in the metric's units, or a text such as ``3%``),
            ``above`` and ``below`` (limits), ``baseline`` (JSON file of an object that holds the metric's value by
            name, which takes the place of the best value so far), ``patience`` (looks in a row beyond a limit; default
            1) and ``action`` (``alert``, ``raise_precision`` or ``rollback``; default alert).

    Raises:
        InvalidArgumentError: a setting is unknown or out of range, there is no limit, or the baseline does not hold the
            metric.
    """

    def __init__(self, key: str, settings: Mapping[str, Any]) -> None:
        where = f"watch[{key!r}]"
        if not isinstance(settings, Mapping):
            raise InvalidArgumentError(f"{where}={settings!r} is out of range: settings among {', '.join(_SETTINGS)}")
        for name in settings:
            check(name in _SETTINGS, where, name, f"settings are {', '.join(_SETTINGS)}")
        self.key = key
        self.mode = settings.get("mode", "min")
        check(self.mode in ("min", "max"), f"{where}.mode", self.mode, "min or max")
        self.patience = settings.get("patience", 1)
        check(_is_integer(self.patience) and self.patience >= 1, f"{where}.patience", self.patience, "an integer >= 1")
        action = settings.get("action", "alert")
        check(action in get_args(WatchAction), f"{where}.action", action, f"one of {', '.join(get_args(WatchAction))}")
        self.action = cast(WatchAction, action)
        self.above, self.below = (_number(settings.get(name), f"{where}.{name}") for name in ("above", "below"))
        self.rise, self.relative = _rise(settings.get("max_rise"), f"{where}.max_rise")
        self.baseline = _baseline(settings.get("baseline"), key, f"{where}.baseline")
        if self.baseline is not None and self.rise is None:
            raise InvalidArgumentError(f"{where}.baseline needs max_rise: how much worse than the baseline is allowed")
        if self.rise is None and self.above is None and self.below is None:
            raise InvalidArgumentError(f"{where} has no limit: give max_rise, above or below")
        self.best = math.nan
        self.best_step = -1
        self._beyond = 0

    def update(self, value: float, step: int) -> Breach | None:
        """Take in a new value of the metric; the breach, if it has been beyond a limit for ``patience`` looks in a row.

        A value that is not finite is a breach at once.
        """
        limit, distance = self._judge(value)
        if not distance > 0:
            self._beyond = 0
        else:
            self._beyond += 1
        breach = None
        if self._beyond >= self.patience or not math.isfinite(value):
            self._beyond = 0
            breach = Breach(value, limit, distance, self.action, self.best, self.best_step)
        if math.isfinite(value) and (math.isnan(self.best) or self._worse(self.best, value) > 0):
            self.best, self.best_step = value, step
        return breach

    def _judge(self, value: float) -> tuple[float, float]:
        """The limit that the value is furthest beyond (or closest to), and by how much."""
        limits: list[tuple[float, float]] = []
        if self.above is not None:
            limits.append((self.above, value - self.above))
        if self.below is not None:
            limits.append((self.below, self.below - value))
        reference = self.best if self.baseline is None else self.baseline
        if self.rise is not None and not math.isnan(reference):
            allowed = self.rise * abs(reference) if self.relative else self.rise
            limit = reference + (allowed if self.mode == "min" else -allowed)
            limits.append((limit, self._worse(value, limit)))
        if not math.isfinite(value):
            return (limits[0][0] if limits else math.nan), math.inf
        return max(limits, key=lambda pair: pair[1], default=(math.nan, 0.0))

    def _worse(self, value: float, other: float) -> float:
        """By how much ``value`` is worse than ``other``."""
        return value - other if self.mode == "min" else other - value

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as plain numbers."""
        return {"best": self.best, "best_step": self.best_step, "beyond": self._beyond}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.best, self.best_step, self._beyond = float(state["best"]), int(state["best_step"]), int(state["beyond"])


def _rise(given: object, where: str) -> tuple[float | None, bool]:
    """``max_rise`` as a number, and whether it is a share of the reference."""
    if isinstance(given, str) and given.strip().endswith("%"):
        try:
            share = float(given.strip()[:-1]) / 100
        except ValueError:
            share = math.nan
        check(share >= 0, where, given, "a number >= 0, or a text such as 3%")
        return share, True
    number = _number(given, where)
    check(number is None or number >= 0, where, given, "a number >= 0, or a text such as 3%")
    return number, False


def _number(given: object, where: str) -> float | None:
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
        raise InvalidArgumentError(f"{where}={given!r} is out of range: a finite number")
    return float(given)


def _is_integer(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _baseline(given: object, key: str, where: str) -> float | None:
    if given is None:
        return None
    try:
        values = json.loads(Path(str(given)).read_text())
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{where}={str(given)!r} cannot be read as JSON: {error}") from error
    value = values.get(key) if isinstance(values, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidArgumentError(f"{where}={str(given)!r} does not hold a number {key!r}, such as {{{key!r}: 2.5}}")
    return float(value)
