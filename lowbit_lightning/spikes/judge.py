"""One optimizer's signals judged together: the detectors of all of them, and what kind of trouble they add up to.

Pure arithmetic on reduced numbers, so every rank that is given the same numbers comes to the same judgement without
talking to the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit_lightning.spikes.detector import DivergenceDetector, RobustDetector, Verdict

LOG_SPACE = ("grad_norm", "update_ratio")
MEASURED = ("loss", "grad_norm", "nonfinite", "update_ratio")
"""Signals that the monitor measures itself; any other name is that of a logged metric."""


@dataclass(frozen=True)
class Judgement:
    """What one step's signals add up to.

    Attributes:
        kind: of the trouble, or None for a healthy step.
        signal: the signal furthest out of line (of a healthy step the one with the highest score).
        value: that signal's value.
        score: its score.
        limit: the largest value that would have been let through.
        verdicts: of every signal that was judged.
    """

    kind: Literal["spike", "divergence", "nonfinite_weights"] | None
    signal: str
    value: float
    score: float
    limit: float
    verdicts: dict[str, Verdict]


class Judge:
    """Judges one step after another and remembers the healthy ones.

    Values of a step that is out of line never enter a detector. So that a lasting new level (another phase of the
    training, say) is not refused for ever, every ``patience`` spikes in a row are one divergence, after which the
    detectors learn anew.

    Args:
        signals: names of the signals that are judged.
        window: see RobustDetector.
        threshold: see RobustDetector.
        min_samples: see RobustDetector.
        divergence_ratio: see DivergenceDetector.
        fast: see DivergenceDetector.
        slow: see DivergenceDetector.
        patience: see DivergenceDetector; also the spikes in a row that make a divergence.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        signals: Sequence[str],
        window: int,
        threshold: float,
        min_samples: int,
        divergence_ratio: float,
        fast: float,
        slow: float,
        patience: int,
    ) -> None:
        self._detectors = {
            name: RobustDetector(window, threshold, min_samples, log_space=name in LOG_SPACE)
            for name in signals
            if name != "nonfinite"
        }
        # Of several signals that are infinitely far out, the one is named that says most.
        self._signals = sorted(signals, key=lambda name: {"loss": 0, "nonfinite": 1}.get(name, 2))
        self._divergence = DivergenceDetector(divergence_ratio, fast, slow, patience)
        self._last: dict[str, float] = {}
        self.events_in_a_row = 0

    def judge(self, values: Mapping[str, float], weights_finite: bool = True) -> Judgement:
        """Judge a step and, if it is healthy, remember its values.

        Args:
            values: reduced signals by name; one that could not be measured is left out.
            weights_finite: whether every weight is finite, as far as is known.
        """
        verdicts = {name: self._verdict(name, values[name]) for name in self._signals if self._has_news(name, values)}
        worst = max(verdicts, key=lambda name: (verdicts[name].spike, verdicts[name].score), default="")
        found = verdicts.get(worst, Verdict(math.nan, 0.0, math.nan, math.inf, spike=False))
        if not weights_finite:
            self.events_in_a_row += 1
            return Judgement("nonfinite_weights", worst, found.value, math.inf, found.limit, verdicts)
        if found.spike:
            self.events_in_a_row += 1
            lasting = self.events_in_a_row % self._divergence.patience == 0
            if lasting and math.isfinite(found.score):
                self._restart()
            kind: Literal["spike", "divergence"] = "divergence" if lasting else "spike"
            return Judgement(kind, worst, found.value, found.score, found.limit, verdicts)
        self.events_in_a_row = 0
        if "loss" in verdicts and self._divergence.update(verdicts["loss"].value):
            risen = self._divergence
            return Judgement("divergence", "loss", verdicts["loss"].value, risen.score, risen.limit, verdicts)
        for name, verdict in verdicts.items():
            if name in self._detectors:
                self._detectors[name].accept(verdict.value)
            self._last[name] = verdict.value
        return Judgement(None, worst, found.value, found.score, found.limit, verdicts)

    def _verdict(self, name: str, value: float) -> Verdict:
        if name == "nonfinite":
            return Verdict(value, math.inf if value else 0.0, 0.0, 0.0, spike=value > 0)
        return self._detectors[name].judge(value)

    def _has_news(self, name: str, values: Mapping[str, float]) -> bool:
        """A logged metric keeps its value until it is logged again; repetitions would only narrow its band."""
        return name in values and (name in MEASURED or values[name] != self._last.get(name))

    def _restart(self) -> None:
        for detector in self._detectors.values():
            detector.restart()
        self._divergence.restart()

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as plain numbers."""
        return {
            "detectors": {name: detector.state_dict() for name, detector in self._detectors.items()},
            "divergence": self._divergence.state_dict(),
            "last": dict(self._last),
            "events_in_a_row": self.events_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; a signal that was not judged there starts anew."""
        for name, detector in self._detectors.items():
            detector.load_state_dict(state["detectors"].get(name, {"accepted": []}))
        self._divergence.load_state_dict(state["divergence"])
        self._last = dict(state["last"])
        self.events_in_a_row = int(state["events_in_a_row"])
