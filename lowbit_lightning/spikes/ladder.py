"""Which measure answers which event: the ladder of SpikeGuard as a state machine of plain numbers.

A *trouble* begins with an event and ends with a healthy stretch, so many healthy steps in a row. Within one trouble
every further event is answered one rung higher; only ``skip`` (``max_skips`` times in a row) and ``rollback`` repeat.
A rollback brings back a state that knows nothing of the trouble, so the next event starts at the bottom again, and the
number of rollbacks is what is limited.

It never goes round in circles. Whatever happens, ``(max_rollbacks + 1) * (max_skips + 5)`` events without a healthy
stretch between them end in ``abort``, and a stretch counts only from the furthest step on at which a rollback was
decided: the budget of rollbacks is filled up again by steps that were never made before, and by no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.arguments import check
from lowbit_lightning.spikes.events import SpikeEvent

Rung = Literal["skip", "reset_momentum", "lower_lr", "raise_precision", "rollback", "abort"]
RUNGS: tuple[Rung, ...] = get_args(Rung)

#: Rungs that can mend an event of this kind. A divergence is no single step that could be left out, and no measure
#: but another state helps weights that are not numbers any more.
_ANSWERS: dict[str, tuple[Rung, ...]] = {
    "spike": RUNGS,
    "divergence": RUNGS[1:],
    "nonfinite_weights": ("rollback", "abort"),
}


class Ladder:
    """Decides, event by event, what is to be done.

    Args:
        rungs: what may be done, in the order in which it is tried; each once, ``abort`` only as the last. The end of
            the ladder is ``abort`` whether it is listed or not.
        max_skips: steps in a row that ``skip`` may leave out.
        max_rollbacks: rollbacks without a healthy stretch between them.
        healthy_stretch: healthy steps in a row that end a trouble.

    Raises:
        InvalidArgumentError: an unknown rung, one listed twice, ``abort`` before another, or a number below 1.
    """

    def __init__(self, rungs: Sequence[str], max_skips: int, max_rollbacks: int, healthy_stretch: int) -> None:
        _check(rungs)
        for name, value in (
            ("max_skips", max_skips),
            ("max_rollbacks", max_rollbacks),
            ("healthy_stretch", healthy_stretch),
        ):
            check(value >= 1, name, value, "an integer >= 1")
        self.rungs: tuple[Rung, ...] = tuple(rung for name in rungs for rung in RUNGS if rung == name)
        self.max_skips = max_skips
        self.max_rollbacks = max_rollbacks
        self.healthy_stretch = healthy_stretch
        #: Under manual optimization no step can be left out; of a step out of line only an earlier state gets rid then.
        self.leaves_out_steps = True
        self._position = 0  # of the lowest rung that this trouble has not used up
        self._skips = 0
        self._rollbacks = 0
        self._healthy = 0
        self._furthest = 0  # step at which a rollback was decided
        self._rolled_back: list[int] = []  # batches that caused a rollback and were not passed in good health since

    def decide(self, event: SpikeEvent) -> Rung:
        """Return what answers ``event``; the same answer on every rank that saw the same events.

        A caller that finds the answer impossible (no technique has a precision to raise) asks again.
        """
        self._healthy = 0
        if event.kind == "watch":
            return self._answer_watch(event)
        if self.caused_rollback(event):
            self._position = max(self._position, self.rungs.index("rollback") + 1)
        kind = event.kind if self.leaves_out_steps or event.kind != "spike" else "nonfinite_weights"
        while self._position < len(self.rungs):
            rung = self.rungs[self._position]
            if rung in _ANSWERS[kind] and self._affords(rung):
                return self._take(rung, event)
            self._position += 1
        return "abort"

    def caused_rollback(self, event: SpikeEvent) -> bool:
        """Whether this very batch caused a rollback before: it was replayed, and the trouble is reproducible."""
        return event.batch in self._rolled_back

    def healthy(self, step: int, batch: int) -> bool:
        """Count a step without an event; return whether that completes a healthy stretch.

        Args:
            step: the step, counted as events count it.
            batch: the last batch of the step, by its index in the run.
        """
        self._skips = 0
        self._rolled_back = [caused for caused in self._rolled_back if caused > batch]
        if step <= self._furthest and self._rollbacks:
            return False
        self._healthy += 1
        if self._healthy < self.healthy_stretch:
            return False
        self._position = self._rollbacks = self._healthy = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the state, plain values."""
        return {
            "rungs": list(self.rungs),
            "position": self._position,
            "skips": self._skips,
            "rollbacks": self._rollbacks,
            "healthy": self._healthy,
            "furthest": self._furthest,
            "rolled_back": list(self._rolled_back),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. On a ladder of other rungs the trouble starts at the bottom; budgets stay spent."""
        self._position = state["position"] if tuple(state["rungs"]) == self.rungs else 0
        self._skips = state["skips"]
        self._rollbacks = state["rollbacks"]
        self._healthy = state["healthy"]
        self._furthest = state["furthest"]
        self._rolled_back = list(state["rolled_back"]) if "rollback" in self.rungs else []

    def _affords(self, rung: Rung) -> bool:
        if rung == "skip":
            return self._skips < self.max_skips
        return rung != "rollback" or self._rollbacks < self.max_rollbacks

    def _take(self, rung: Rung, event: SpikeEvent) -> Rung:
        if rung == "rollback":
            self._rolled_back.append(event.batch)
            self._note_rollback(event)
        elif rung == "skip":
            self._skips += 1
        elif rung != "abort":
            self._position += 1
        return rung

    def _answer_watch(self, event: SpikeEvent) -> Rung:
        """The user has chosen the answer to a watched metric; the budget of rollbacks holds for it as well."""
        if event.action == "raise_precision":
            return "raise_precision"
        if self._rollbacks >= self.max_rollbacks:
            return "abort"
        self._note_rollback(event)
        return "rollback"

    def _note_rollback(self, event: SpikeEvent) -> None:
        self._rollbacks += 1
        self._furthest = max(self._furthest, event.step)
        self._position = self._skips = 0


def _check(rungs: Sequence[str]) -> None:
    allowed = f"a list of {', '.join(RUNGS)}, in any order, each at most once, abort only at the end"
    for rung in rungs:
        if rung not in RUNGS:
            raise InvalidArgumentError(f"ladder has the unknown rung {rung!r}: {allowed}")
    if not rungs or len(set(rungs)) < len(rungs) or "abort" in rungs[:-1]:
        raise InvalidArgumentError(f"ladder={list(rungs)} is out of range: {allowed}")
