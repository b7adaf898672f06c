"""The rules that examples/spike_detection.py compares, each written anew from its description, with its defaults.

A rule is called once per step with loss and gradient norm and says whether it raises an alarm.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable

import numpy as np

from lowbit_lightning.spikes.judge import Judge

Rule = Callable[[float, float], bool]


class Ours:
    """SpikeMonitor's judge with its default settings."""

    def __init__(self, *signals: str) -> None:
        self.judge = Judge([*signals, "nonfinite"], 128, 6.0, 32, 1.5, 0.9, 0.99, 20)

    def __call__(self, loss: float, norm: float) -> bool:
        bad = float(not (math.isfinite(loss) and math.isfinite(norm)))
        return self.judge.judge({"loss": loss, "grad_norm": norm, "nonfinite": bad}).kind is not None


class LightningSpikeDetection:
    """Above the last loss, and away from the mean of the last 10 by at least twice that mean; or not finite.

    It ends the run at an alarm. Here it goes on as after a restart without that batch: the value is forgotten.
    """

    def __init__(self, window: int = 10, rtol: float = 2.0) -> None:
        self.values: deque[float] = deque(maxlen=window)
        self.rtol = rtol

    def __call__(self, loss: float, norm: float) -> bool:
        if not math.isfinite(loss):
            return True
        if self.values:
            mean = statistics.fmean(self.values)
            if loss > self.values[-1] and abs(loss - mean) >= self.rtol * mean:
                return True
        self.values.append(loss)
        return False


class KillLossSpike:
    """More than 4 steps in a row at twice the mean of the window, or half of the window above the first one's maximum.

    It is meant to end hopeless runs, not to see single steps. Every loss enters the window.
    """

    def __init__(self, steps: int, multiplier: float = 2.0, patience: int = 4) -> None:
        self.size = max(100, steps // 20)
        self.values: deque[float] = deque(maxlen=self.size)
        self.multiplier, self.patience = multiplier, patience
        self.in_a_row = self.step = 0
        self.cap = math.inf

    def __call__(self, loss: float, norm: float) -> bool:
        alarm = False
        if len(self.values) == self.size:
            if self.cap == math.inf:
                self.cap = min(max(self.values), 10.0)
            self.in_a_row = self.in_a_row + 1 if loss >= self.multiplier * statistics.fmean(self.values) else 0
            high = sum(value > self.cap for value in self.values)
            alarm = self.in_a_row > self.patience or (self.step > 2 * self.size and high >= self.size / 2)
        self.values.append(loss)
        self.step += 1
        return alarm


class SixSigma:
    """OLMo-core: loss or norm not within 6 standard deviations above the mean of the last 128; from 64 values on.

    Every value enters, also one that raised an alarm; a comparison with NaN is false, which is an alarm.
    """

    def __init__(self, window: int = 128, sigma: float = 6.0) -> None:
        self.sigma, self.least = sigma, window // 2
        self.values: deque[tuple[float, float]] = deque(maxlen=window)

    def __call__(self, loss: float, norm: float) -> bool:
        alarm = False
        if len(self.values) >= self.least:
            known = np.array(self.values)
            within = np.array([loss, norm]) - known.mean(0) <= self.sigma * known.std(0, ddof=1)
            alarm = not within.all()
        self.values.append((loss, norm))
        return alarm


RULES: dict[str, Callable[[int], Rule]] = {
    "ours": lambda steps: Ours("loss", "grad_norm"),
    "ours, loss only": lambda steps: Ours("loss"),
    "Lightning SpikeDetection": lambda steps: LightningSpikeDetection(),
    "llm-foundry KillLossSpike": KillLossSpike,
    "OLMo-core 6σ": lambda steps: SixSigma(),
}
