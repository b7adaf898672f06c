"""Two detectors on a stream of plain numbers: one step out of line, and a slow way up. No torch, no Lightning.

Peers compare with mean and standard deviation of the last values; one spike that enters them hides the next one, and
one NaN switches them off. Here the centre is the median, the width is the median absolute deviation, both of the last
values that were *accepted*, and a value that is not finite can neither enter nor pass.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from lowbit_lightning.spikes.arguments import check

MAD_TO_SIGMA = 1.4826  # of a normal distribution, so that ``threshold`` reads like a number of standard deviations

# The width is at least this, or a constant signal (its deviation is 0) would make a spike of the next rounding error:
# of a loss 1 % of its median, of a norm 0.2 in its logarithm. At 6 widths nothing is a spike that rises the loss by
# less than 6 % or the norm to less than 3.3 times its median, which clipping is for: at 0.05 a healthy run had four
# times as many alarms, and saw none of the injected spikes any better (examples/spike_detection.py).
LEAST_RELATIVE_WIDTH = 0.01
LEAST_LOG_WIDTH = 0.2


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one value.

    Attributes:
        value: the value as it came.
        score: widths above the median (below 0: under it); infinite if the value is not finite, 0 while too few values
            are known.
        median: of the accepted values, in the value's units; NaN if there are none.
        limit: the largest value that is let through; infinite while too few values are known.
        spike: whether the value is out of line.
    """

    value: float
    score: float
    median: float
    limit: float
    spike: bool


class RobustDetector:
    """One-sided robust z-score: is a value far above the median of the last accepted ones?

    Args:
        window: accepted values that are remembered.
        threshold: widths above the median from which on a value is a spike.
        min_samples: accepted values that are needed before anything finite is called a spike.
        log_space: compare logarithms, for signals such as norms that vary by factors. A value that is not positive has
            none: it is never a spike and is not remembered.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self, window: int = 128, threshold: float = 6.0, min_samples: int = 32, log_space: bool = False
    ) -> None:
        check(window >= 2, "window", window, "an integer >= 2")
        check(threshold > 0, "threshold", threshold, "a number > 0")
        check(2 <= min_samples <= window, "min_samples", min_samples, f"an integer from 2 to window={window}")
        self.threshold = threshold
        self.min_samples = min_samples
        self.log_space = log_space
        self._accepted: deque[float] = deque(maxlen=window)

    def judge(self, value: float) -> Verdict:
        """What is to be said of ``value``; nothing is remembered of it."""
        center = median(self._accepted) if self._accepted else math.nan
        warm = len(self._accepted) >= self.min_samples
        width = self._width(center) if warm else math.inf
        limit = self._outside(center + self.threshold * width) if warm else math.inf
        if not math.isfinite(value):
            return Verdict(value, math.inf, self._outside(center), limit, spike=True)
        inside = self._inside(value)
        score = (inside - center) / width if warm and inside is not None else 0.0
        return Verdict(value, score, self._outside(center), limit, spike=score > self.threshold)

    def accept(self, value: float) -> None:
        """Remember a healthy value. One that is not finite never enters."""
        inside = self._inside(value) if math.isfinite(value) else None
        if inside is not None:
            self._accepted.append(inside)

    def restart(self) -> None:
        """Forget everything: the signal has a new level, which is to be learned."""
        self._accepted.clear()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on without a blind step, as plain numbers."""
        return {"accepted": list(self._accepted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; of a longer window the latest values are kept."""
        self._accepted.clear()
        self._accepted.extend(float(value) for value in state["accepted"])

    def _width(self, center: float) -> float:
        deviation = MAD_TO_SIGMA * median(abs(value - center) for value in self._accepted)
        least = LEAST_LOG_WIDTH if self.log_space else LEAST_RELATIVE_WIDTH * abs(center)
        return max(deviation, least, 1e-12)

    def _inside(self, value: float) -> float | None:
        if not self.log_space:
            return value
        return math.log(value) if value > 0 else None

    def _outside(self, value: float) -> float:
        return math.exp(min(value, 700.0)) if self.log_space else value  # beyond 709 a double overflows


class DivergenceDetector:
    """Is the loss rising for good? Its fast average stays far above its slow one for ``patience`` updates.

    For a positive loss the rule is ``fast / slow > ratio``. A ratio means nothing for a loss that is negative or near
    zero, so the rise is compared with a reference instead: ``fast - slow > (ratio - 1) * max(|slow|, 4 * spread)``,
    where ``spread`` is the mean distance below the slow average of the values that are below it. It says how noisy the
    loss is, and as a rise has no such values, it does not grow with the rise. Nothing is said before the fast average
    has seen twice its own length.

    Args:
        ratio: fast over slow average from which on the loss diverges.
        fast: decay of the fast average.
        slow: decay of the slow average.
        patience: updates in a row beyond the ratio that make a divergence.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(self, ratio: float = 1.5, fast: float = 0.9, slow: float = 0.99, patience: int = 20) -> None:
        check(ratio > 1, "divergence_ratio", ratio, "a number > 1")
        check(0 <= fast < 1, "fast", fast, "a decay from 0 to below 1")
        check(fast < slow < 1, "slow", slow, f"a decay above fast={fast} and below 1")
        check(patience >= 1, "patience", patience, "an integer >= 1")
        self.ratio = ratio
        self.patience = patience
        self._warm_up = 2 / (1 - fast)
        self._fast = _Average(fast)
        self._slow = _Average(slow)
        self._spread = _Average(slow)
        self._updates = 0
        self._beyond = 0

    @property
    def score(self) -> float:
        """Fast over slow average, if the loss is well above zero; else 1 plus the rise in units of the reference."""
        reference = max(abs(self._slow.value), 4 * self._spread.value)
        return 1 + (self._fast.value - self._slow.value) / reference if reference > 0 else 1.0

    @property
    def limit(self) -> float:
        """The fast average that would have been let through."""
        return self._slow.value + (self.ratio - 1) * max(abs(self._slow.value), 4 * self._spread.value)

    def update(self, value: float) -> bool:
        """Take in an accepted, finite value; True once for every ``patience`` updates in a row beyond the ratio."""
        if not math.isfinite(value):
            return False
        if self._updates and value < self._slow.value:
            self._spread.update(self._slow.value - value)
        self._fast.update(value)
        self._slow.update(value)
        self._updates += 1
        self._beyond = self._beyond + 1 if self._updates > self._warm_up and self.score > self.ratio else 0
        if self._beyond < self.patience:
            return False
        self._beyond = 0
        return True

    def restart(self) -> None:
        """Forget everything."""
        for average in (self._fast, self._slow, self._spread):
            average.total = average.weight = 0.0
        self._updates = self._beyond = 0

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as plain numbers."""
        averages = {"fast": self._fast, "slow": self._slow, "spread": self._spread}
        return {name: [average.total, average.weight] for name, average in averages.items()} | {
            "updates": self._updates,
            "beyond": self._beyond,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        for name, average in (("fast", self._fast), ("slow", self._slow), ("spread", self._spread)):
            average.total, average.weight = (float(number) for number in state[name])
        self._updates, self._beyond = int(state["updates"]), int(state["beyond"])


class _Average:
    """Exponential moving average, corrected so that its first values are the plain means of what there is."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.total = 0.0
        self.weight = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def update(self, value: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
