"""What the spike monitor hands to the guard, to the ledger and to the logger: one event.

An event is frozen and made of plain values only, so that the same object can be shown to a person (``message``),
written as one line of strict JSON (``as_json``) and read back on another machine (``from_json``). Strict JSON knows
neither NaN nor infinity, and those are the very values that an event is about: they travel as the strings ``"nan"``,
``"inf"`` and ``"-inf"``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast, get_args

EventKind = Literal["spike", "divergence", "nonfinite_weights", "watch"]
WatchAction = Literal["alert", "raise_precision", "rollback"]

_TITLES: dict[str, str] = {
    "spike": "spike",
    "divergence": "divergence",
    "nonfinite_weights": "non-finite weights",
    "watch": "watched metric out of bounds",
}


@dataclass(frozen=True)
class SpikeEvent:
    """Something out of line, as every rank of the run sees it.

    Attributes:
        kind: ``spike`` (one step out of line, seen before the optimizer steps), ``divergence`` (the loss has been
            rising for ``patience`` steps), ``nonfinite_weights`` or ``watch`` (a logged metric out of bounds).
        step: ``trainer.global_step`` before the step that the event concerns.
        epoch: epoch of the run, from 0.
        batch: index of the batch in the whole run, never the index in the epoch.
        signal: the signal that is furthest out of line, or the key of the watched metric.
        value: that signal's reduced value.
        score: how far out of line: a robust z-score; for a divergence the ratio of the averages; for a watched metric
            the distance beyond its limit, in the metric's own units.
        limit: the largest value of the signal that would have been let through.
        rank: the rank whose local value was the worst.
        signals: every reduced signal of the step, by name.
        samples: ids of the samples in that rank's batch where the batch gives them, else None.
        action: what a watched metric asks for; None for the other kinds.
    """

    kind: EventKind
    step: int
    epoch: int
    batch: int
    signal: str
    value: float
    score: float
    limit: float
    rank: int
    signals: dict[str, float]
    samples: list[int] | None
    action: WatchAction | None = None

    def message(self) -> str:
        """The event in one line for people."""
        text = (
            f"{_TITLES[self.kind]} at step {self.step} (epoch {self.epoch}, batch {self.batch}, rank {self.rank}): "
            f"{self.signal} = {self.value:.6g}, limit {self.limit:.6g}, score {self.score:.3g}"
        )
        if self.samples:
            shown = ", ".join(str(sample) for sample in self.samples[:8])
            text += f"; samples {shown}" + (", ..." if len(self.samples) > 8 else "")
        return text

    def as_json(self) -> dict[str, Any]:
        """Plain values that ``json.dumps(..., allow_nan=False)`` accepts; ``from_json`` is its inverse."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("value", "score", "limit"):
            plain[name] = _strict(plain[name])
        plain["signals"] = {name: _strict(value) for name, value in self.signals.items()}
        plain["samples"] = None if self.samples is None else list(self.samples)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SpikeEvent:
        """The event that ``as_json`` wrote; keys of other owners (a ledger's decision) are passed over.

        Raises:
            KeyError: a field of the event is missing.
            ValueError: the kind is not one of ours, or a number is not a number.
        """
        if plain["kind"] not in get_args(EventKind):
            raise ValueError(f"an event's kind is one of {', '.join(get_args(EventKind))}, not {plain['kind']!r}")
        samples = plain["samples"]
        return cls(
            kind=cast(EventKind, plain["kind"]),
            step=int(plain["step"]),
            epoch=int(plain["epoch"]),
            batch=int(plain["batch"]),
            signal=str(plain["signal"]),
            value=float(plain["value"]),
            score=float(plain["score"]),
            limit=float(plain["limit"]),
            rank=int(plain["rank"]),
            signals={str(name): float(value) for name, value in plain["signals"].items()},
            samples=None if samples is None else [int(sample) for sample in samples],
            action=plain.get("action"),
        )


def _strict(value: float) -> float | str:
    """The value, or its name where strict JSON has no number for it (``float()`` reads the names back)."""
    return value if math.isfinite(value) else str(float(value))
