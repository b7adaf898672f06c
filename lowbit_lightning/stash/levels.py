"""Precision that rises with training: the levels of DSQ and the rule that goes from one to the next.

DSQ (arXiv 2303.05295) describes precision by [q0, q1, q2, q3], bits for the inputs of the forward GEMM, for the stash,
for the inputs of the backward GEMMs and for the outgoing gradient, and raises it when the validation metric stops
improving. No torch, no Lightning: a level is numbers, the rule sees one metric after another.

Different from the paper: the stash alone can rise (``stash_only``: forward exact), and a metric that gets worse beyond
a bound raises the level at once, whatever the patience.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from lowbit_lightning.errors import InvalidArgumentError

OFF = 32
"""The number of bits that means: not quantized."""
ALLOWED_BITS = (2, 3, 4, 5, 6, 7, 8, 16, OFF)


class Level(NamedTuple):
    """Bits of one precision level; ``OFF`` leaves a tensor as it is.

    Attributes:
        q0: both inputs of the forward GEMM.
        q1: the stash, which is the input of the weight-gradient GEMM.
        q2: the incoming gradient and the weight in both backward GEMMs.
        q3: the outgoing gradient.
    """

    q0: int
    q1: int
    q2: int
    q3: int

    @property
    def stash_only(self) -> bool:
        """Whether nothing but the stash is quantized, which leaves the forward pass exact."""
        return self.q0 == self.q2 == self.q3 == OFF

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self))}]"


PRESETS: dict[str, tuple[Level, ...]] = {
    # The first and the last are the paper's, the two between are ours.
    "paper": (Level(2, 2, 2, 16), Level(4, 4, 4, 16), Level(8, 4, 4, 16), Level(16, 4, 4, 16)),
}
DEFAULT_STASH_ONLY = (4, 8)


def parse_levels(
    levels: Sequence[Sequence[int]] | None, preset: str | None, stash_only: int | Sequence[int] | None
) -> list[Level]:
    """Return the levels that a user's arguments stand for.

    Args:
        levels: [q0, q1, q2, q3] each, from the lowest to the highest.
        preset: one of ``PRESETS``.
        stash_only: bits of the stash, from the lowest to the highest; the default, at 4 and 8 bits.

    Raises:
        InvalidArgumentError: more than one of them, bits outside ``ALLOWED_BITS``, or levels that fall.
    """
    given = {"levels": levels, "preset": preset, "stash_only": stash_only}
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise InvalidArgumentError(f"{', '.join(named)}: give one of levels, preset and stash_only")
    if preset is not None:
        if preset not in PRESETS:
            raise InvalidArgumentError(f"preset={preset!r} is out of range: one of {', '.join(PRESETS)}")
        return list(PRESETS[preset])
    if levels is not None:
        argument, rows = "levels", [list(row) if isinstance(row, Sequence) else [row] for row in levels]
        for row in rows:
            if len(row) != len(Level._fields):
                raise InvalidArgumentError(f"levels: {row} is out of range: four numbers, [q0, q1, q2, q3]")
    else:
        bits = DEFAULT_STASH_ONLY if stash_only is None else stash_only
        argument, rows = "stash_only", [[OFF, q1, OFF, OFF] for q1 in ([bits] if isinstance(bits, int) else bits)]
    if not rows:
        raise InvalidArgumentError(f"{argument}={given[argument]!r} is out of range: at least one level")
    made = [Level(*row) for row in rows]
    for level in made:
        for name, value in zip(Level._fields, level, strict=True):
            if isinstance(value, bool) or value not in ALLOWED_BITS:
                raise InvalidArgumentError(
                    f"{argument}: {name}={value!r} is out of range: one of {', '.join(map(str, ALLOWED_BITS))}, "
                    f"of which {OFF} is not quantized"
                )
    for lower, higher in itertools.pairwise(made):
        falling = [name for name, one, other in zip(Level._fields, lower, higher, strict=True) if other < one]
        if falling or lower == higher:
            reason = f"{falling[0]} falls" if falling else "they are equal"
            raise InvalidArgumentError(
                f"{argument}: {_shown(lower, argument)} is followed by {_shown(higher, argument)}, where {reason}: "
                "precision must rise from level to level. Change the order or leave one out"
            )
    return made


def _shown(level: Level, argument: str) -> str:
    return str(level.q1) if argument == "stash_only" else str(level)


class PlateauRule:
    """Which level a run is at: one higher whenever a metric has stopped improving.

    Args:
        levels: from the lowest to the highest.
        mode: whether the metric is better when it is lower (``min``) or higher (``max``).
        patience: values in a row without an improvement that it takes.
        min_delta: what counts as an improvement must be at least so much better, in the metric's units.
        max_degradation: a value that is worse than the best one by more than this share of it raises the level at once;
            None never does. A value that is not finite always does.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        mode: Literal["min", "max"] = "min",
        patience: int = 1,
        min_delta: float = 0.0,
        max_degradation: float | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise InvalidArgumentError(f"mode={mode!r} is out of range: min or max")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise InvalidArgumentError(f"patience={patience!r} is out of range: an integer >= 1")
        if not 0 <= min_delta < math.inf:
            raise InvalidArgumentError(f"min_delta={min_delta!r} is out of range: a number >= 0")
        if max_degradation is not None and not 0 < max_degradation < math.inf:
            raise InvalidArgumentError(
                f"max_degradation={max_degradation!r} is out of range: a number above 0, such as 0.1 for 10 %, or null"
            )
        self.levels = list(levels)
        self.mode = mode
        self.patience = patience
        self.min_delta = min_delta
        self.max_degradation = max_degradation
        self.index = 0
        self._floor = 0
        self._best: float | None = None
        self._wait = 0

    @property
    def level(self) -> Level:
        """The present level."""
        return self.levels[self.index]

    @property
    def at_the_top(self) -> bool:
        """Whether there is no higher level."""
        return self.index == len(self.levels) - 1

    def reset(self) -> None:
        """Start anew, at the lowest level."""
        self.index = self._floor = self._wait = 0
        self._best = None

    def update(self, value: float) -> str | None:
        """Take in the next value of the metric and go one level up if it is time; return why, or None.

        Args:
            value: the metric; the same on every rank.
        """
        if not math.isfinite(value):
            return f"{value}" if self.rise() else None
        gain = math.inf if self._best is None else self._better(value, self._best)
        if gain > 0 and gain >= self.min_delta:
            self._best, self._wait = value, 0
            return None
        best = self._best
        assert best is not None
        self._wait += 1
        if self.max_degradation is not None and -gain > self.max_degradation * abs(best):
            return (
                f"{value:.6g} is worse than {best:.6g} by more than {self.max_degradation:.3g}" if self.rise() else None
            )
        if self._wait < self.patience:
            return None
        waited = self._wait
        return f"not better than {best:.6g} {waited} times" if self.rise() else None

    def rise(self, for_good: bool = False) -> bool:
        """Go one level up, if there is one; return whether it went up.

        Args:
            for_good: not to be undone when an earlier state of the run is loaded into this object.
        """
        if self.at_the_top:
            return False
        self.index += 1
        self._wait = 0
        if for_good:
            self._floor = self.index
        return True

    def _better(self, value: float, than: float) -> float:
        return than - value if self.mode == "min" else value - than

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on, as plain values."""
        return {
            "level": list(self.level),
            "floor": list(self.levels[self._floor]) if self._floor else None,
            "mode": self.mode,
            "best": self._best,
            "wait": self._wait,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, at the lowest level that has no fewer bits than the saved one.

        What was raised for good since then stays so.
        """
        if state["floor"] is not None:
            self._floor = max(self._floor, self._find(state["floor"]))
        self.index = max(self._find(state["level"]), self._floor)
        same_mode = state["mode"] == self.mode
        self._best, self._wait = (state["best"], state["wait"]) if same_mode else (None, 0)

    def _find(self, saved: Sequence[int]) -> int:
        enough = (
            i
            for i, level in enumerate(self.levels)
            if all(bits >= other for bits, other in zip(level, saved, strict=True))
        )
        return next(enough, len(self.levels) - 1)
