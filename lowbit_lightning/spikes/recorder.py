"""Where events become visible: cards, scalars, the user's command, and curves that stay clean over a rollback."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lowbit_lightning.spikes import tensorboard
from lowbit_lightning.spikes.alerts import AlertCommand
from lowbit_lightning.spikes.events import SpikeEvent


class _Never(int):
    """An interval of steps that never comes round, for everybody who asks ``step % interval``: not even at step 0.

    Zero would do for Lightning, but is what others' modules and callbacks divide by.
    """

    def __rmod__(self, step: int, /) -> int:
        return 1


def axis_step(trainer: Trainer) -> int:
    """The step at which the trainer itself logs now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


class EventRecorder:
    """Writes, on global rank zero, what is seen and what is done about it.

    Args:
        signals: that are judged, for the layout of the charts.
        on_alert: shell command for every event but a single spike, or None.
        axis: whether TensorBoard is to drop abandoned steps after a rollback (``rewind``) or never sees a step twice.
    """

    def __init__(self, signals: Iterable[str], on_alert: str | None, axis: Literal["rewind", "monotonic"]) -> None:
        self.alerts = AlertCommand(on_alert)
        self._signals = tuple(signals)
        self._axis = axis
        self._trainer: Trainer | None = None
        self._held_back: int | None = None
        self._open: list[tuple[SpikeEvent, int]] = []
        self._cards: list[tuple[int, str, str]] = []

    @property
    def open(self) -> list[SpikeEvent]:
        """Events that nobody has recorded yet, the oldest first."""
        return [event for event, _ in self._open]

    def attach(self, trainer: Trainer | None) -> None:
        """Write to this trainer's loggers from now on; None lets go of it."""
        self._trainer = trainer

    def add_layout(self) -> None:
        """Make the charts."""
        tensorboard.add_layout(self._loggers(), self._signals)

    def log(self, scalars: Mapping[str, float]) -> None:
        """Log numbers at the trainer's own step."""
        if self._trainer is not None:
            tensorboard.log_scalars(self._loggers(), scalars, axis_step(self._trainer))

    def note(self, event: SpikeEvent) -> None:
        """Remember an event until it is recorded."""
        if self._trainer is not None:
            self._open.append((event, axis_step(self._trainer)))

    def record(self, event: SpikeEvent, decision: str, detail: str) -> None:
        """Show an event and what was done about it, at the step at which it was noted."""
        if self._trainer is None:
            return
        if decision == "rollback" and self._axis == "rewind":
            self._hold_back(self._trainer)
        noted = [step for one, step in self._open if one is event]
        self._open = [entry for entry in self._open if entry[0] is not event]
        if not self._trainer.is_global_zero:
            return
        step = noted[0] if noted else axis_step(self._trainer)
        # A tag of its own for every card: of one tag TensorBoard shows ten.
        tag = f"spike/{len(self._cards):04d}_{event.kind}_at_{event.step}"
        text = tensorboard.card(event, decision, detail)
        self._cards.append((step, tag, text))
        rank_zero_info(f"{event.message()}; {decision}{f': {detail}' if detail else ''}")
        tensorboard.add_card(self._loggers(), tag, text, step)
        if noted and event.kind != "spike":
            self.alerts.run(event, decision, detail)

    def mark_rollback(self, count: int, abandoned: int) -> None:
        """Drop the abandoned steps from the curves, if the axis rewinds, and mark the place; see SpikeMonitor."""
        if self._trainer is None or not self._trainer.is_global_zero:
            return
        first_new = axis_step(self._trainer)
        step = max(first_new - 1, 0)
        if self._axis == "rewind":
            for logger in self._loggers():
                if tensorboard.purge_after(logger, first_new):
                    if first_new == 0:  # where the layout was written
                        tensorboard.add_layout([logger], self._signals)
                    for _, tag, text in (card for card in self._cards if card[0] >= first_new):
                        tensorboard.add_card([logger], tag, text, step)
            self._cards = [(min(at, step), tag, text) for at, tag, text in self._cards]
        marks = {"spike/rollbacks": float(count), "spike/rolled_back_steps": float(abandoned)}
        tensorboard.log_scalars(self._loggers(), marks, step)

    def _hold_back(self, trainer: Any) -> None:
        """Keep the trainer from logging the abandoned batch, which it would at the step that was gone back to."""
        if self._held_back is None:
            self._held_back, trainer.log_every_n_steps = trainer.log_every_n_steps, _Never(sys.maxsize)

    def release(self) -> None:
        """Let the trainer log again; call it when the next batch begins, or none does."""
        if self._held_back is not None and self._trainer is not None:
            trainer: Any = self._trainer
            trainer.log_every_n_steps, self._held_back = self._held_back, None

    def _loggers(self) -> list[Any]:
        return self._trainer.loggers if self._trainer is not None and self._trainer.is_global_zero else []
