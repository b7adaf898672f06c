"""All watched metrics of a run: read from what was logged, reduced over ranks, turned into events."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.events import SpikeEvent, WatchAction
from lowbit_lightning.spikes.signals import gather_rows, pack
from lowbit_lightning.spikes.watch import Watch


class WatchedMetrics:
    """The metrics of ``watch``, wherever in a run they are logged.

    A metric that is logged per batch is looked at when the trainer logs, others after a validation or an epoch; only a
    value that was logged anew counts. Ranks may log different values, or some of them none: their mean decides.

    Args:
        settings: of every metric, by its name; see Watch.

    Raises:
        InvalidArgumentError: see Watch.
    """

    def __init__(self, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self._watches = {key: Watch(key, setting) for key, setting in settings.items()}
        self._seen: set[str] = set()
        self._per_batch: set[str] = set()
        self._last: dict[str, Any] = {}

    def note(self, trainer: Trainer) -> None:
        """Take note of what is there, so that ``look`` knows what is new."""
        if self._watches:
            metrics = trainer.callback_metrics
            self._last = {key: metrics.get(key) for key in self._watches}

    def look(self, trainer: Trainer, stage: Literal["batch", "validation", "epoch"]) -> list[SpikeEvent]:
        """Judge what was logged anew; call it on every rank."""
        keys = [key for key in self._watches if stage != "epoch" or key not in self._per_batch]
        if not keys:
            return []
        before, events = self._last, []
        self.note(trainer)
        fresh = [None if self._last[key] is before.get(key) else self._last[key] for key in keys]
        cells = [cell for value in fresh for cell in (float(value is not None), _number(value))]
        rows = gather_rows(pack(cells, trainer.strategy.root_device))
        for index, key in enumerate(keys):
            local = {rank: row[2 * index + 1] for rank, row in enumerate(rows) if row[2 * index]}
            if local:
                self._seen.add(key)
                if stage == "batch":
                    self._per_batch.add(key)
                event = self._judge(trainer, key, local)
                events += [event] if event is not None else []
        return events

    def _judge(self, trainer: Trainer, key: str, local: dict[int, float]) -> SpikeEvent | None:
        breach = self._watches[key].update(sum(local.values()) / len(local), trainer.global_step)
        if breach is None:
            return None
        sign = -1 if breach.value < breach.limit else 1
        worst = max(local, key=lambda rank: sign * local[rank] if math.isfinite(local[rank]) else math.inf)
        return SpikeEvent(
            kind="watch",
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            batch=trainer.fit_loop.total_batch_idx,
            signal=key,
            value=breach.value,
            score=breach.distance,
            limit=breach.limit,
            rank=worst,
            signals={key: breach.value, "best": breach.best, "best_step": float(breach.best_step)},
            samples=None,
            action=breach.action,
        )

    @property
    def actions(self) -> dict[str, WatchAction]:
        """What is asked for beyond the limit of each metric."""
        return {key: watch.action for key, watch in self._watches.items()}

    def missing(self, trainer: Trainer) -> list[str]:
        """Names that were never logged so far."""
        return [key for key in self._watches if key not in self._seen and key not in trainer.callback_metrics]

    @staticmethod
    def require(missing: Iterable[str], trainer: Trainer, argument: str = "watch") -> None:
        """Refuse names that should have been logged by now.

        Raises:
            InvalidArgumentError: there is one.
        """
        for name in missing:
            raise InvalidArgumentError(_never_logged(argument, name, trainer))

    @staticmethod
    def warn_of(missing: Iterable[str], trainer: Trainer, argument: str = "watch") -> None:
        """Warn of names that may still be logged, but look as if they never were."""
        for name in missing:
            rank_zero_warn(_never_logged(argument, name, trainer))

    def describe(self) -> list[tuple[str, str]]:
        """What is watched, and what happens beyond its limit."""
        return [(key, f"watched: {watch.action}") for key, watch in self._watches.items()]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, as plain values."""
        return {key: watch.state_dict() for key, watch in self._watches.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; a metric that was not watched there starts anew."""
        for key, watch in self._watches.items():
            if key in state:
                watch.load_state_dict(state[key])


def _never_logged(argument: str, name: str, trainer: Trainer) -> str:
    logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
    return (
        f"{argument}: no metric {name!r} has been logged; logged so far: {logged}. Correct the name, or log it with "
        "self.log"
    )


def _number(value: Any) -> Tensor | float:
    if value is None:
        return 0.0
    return value.detach().reshape(()) if isinstance(value, Tensor) else float(value)
