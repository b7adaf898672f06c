"""Going back to an earlier state of the run, and all that belongs to it: which state, which data, which files.

SpikeGuard decides that a run goes back; here is what that consists of. The same object sees to it that there is
something to go back to: snapshots in memory or on disk, and checkpoints that are trusted only once they are old enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.abandoned import quarantine
from lowbit_lightning.spikes.arguments import check
from lowbit_lightning.spikes.data_position import accumulated_batches, prepare_replay, skip_batches
from lowbit_lightning.spikes.events import SpikeEvent
from lowbit_lightning.spikes.replay_fetcher import MEGABYTE
from lowbit_lightning.spikes.snapshot_ring import SnapshotRing
from lowbit_lightning.spikes.trusted import TrustedCheckpoints

_SETTINGS: dict[str, Any] = {"every_n_steps": 100, "keep": 3, "where": "cpu", "min_age": 20, "directory": None}


@dataclass(frozen=True)
class Return:
    """What a rollback did.

    Attributes:
        step: optimizer steps of the state that the run went back to.
        data: ``skip`` if it goes on with new data, ``replay`` if with the same again.
        first: the first batch, by its index in the run, that was trained on in vain.
        last: the last batch that was trained on in vain, or left out beyond it.
    """

    step: int
    data: Literal["skip", "replay"]
    first: int
    last: int

    def __str__(self) -> str:
        what = "left out" if self.data == "skip" else "trained on again"
        return f"to the snapshot of step {self.step}; batches {self.first} to {self.last} are {what}"


class Recovery:
    """Takes snapshots and goes back to them.

    Args:
        settings: ``every_n_steps``, ``keep``, ``where``, ``min_age`` and ``directory`` of the snapshots.
        data: what a rollback does about the data.
        skip_ahead: further batches that are left out with ``data="skip"``.
        replay_mb: megabytes of batches that are kept for a loader that cannot go back.

    Raises:
        InvalidArgumentError: a setting is unknown or out of range.
    """

    def __init__(
        self, settings: Mapping[str, Any], data: Literal["skip", "replay"], skip_ahead: int, replay_mb: float
    ) -> None:
        for name in settings:
            if name not in _SETTINGS:
                raise InvalidArgumentError(f"snapshot has the unknown key {name!r}: {', '.join(_SETTINGS)}")
        check(data in ("skip", "replay"), "data", data, "skip or replay")
        most = 0 if data == "replay" else math.inf
        check(0 <= skip_ahead <= most, "skip_ahead", skip_ahead, "an integer >= 0, 0 with data=replay")
        check(replay_mb > 0, "replay_mb", replay_mb, "a number > 0")
        self.settings = _SETTINGS | dict(settings)
        self.data = data
        self.skip_ahead = skip_ahead
        self.replay_mb = replay_mb
        self.ring = SnapshotRing(**self.settings)
        self.trusted = TrustedCheckpoints(self.ring.min_age)
        self.active = True  # whether the ladder has a rollback at all
        self._bytes = 0
        self._restored: int | None = None  # step of the last snapshot that was gone back to

    @property
    def reach(self) -> int:
        """The most steps that a rollback undoes where no step was out of line on the way."""
        return self.ring.min_age + self.ring.every_n_steps

    def describe(self) -> str:
        """Return what the snapshots take, for the table at the start."""
        if not self.active:
            return "no snapshots"
        ring = self.ring
        size = f"{ring.keep} snapshots on {ring.where}, {self._bytes / MEGABYTE:.3f} MB"
        return f"{size}, one every {ring.every_n_steps} steps"

    @property
    def can_go_back(self) -> bool:
        """Whether there is a snapshot; a run resumed within an accumulation window has none before the next one."""
        return not self.ring.is_empty

    def warn_if_younger(self, patience: int) -> None:
        """Warn of snapshots so young that the trouble may be in them already when it is seen."""
        if self.active and self.ring.min_age < patience:
            rank_zero_warn(
                f"snapshot.min_age={self.ring.min_age} is below the {patience} steps (patience) that SpikeMonitor takes"
                " to see a divergence: a rollback may bring back a state that already holds it. Raise min_age."
            )

    def prepare(self, trainer: Trainer) -> None:
        """Count the memory of all snapshots, in ``on_fit_start``.

        Raises:
            InvalidArgumentError: it is not there; the message has the numbers.
        """
        if self.active:
            self._bytes = self.ring.expected_bytes(trainer)
            self.ring.check_memory(trainer)

    def start(self, trainer: Trainer) -> None:
        """Get ready, in ``on_train_start``, for data that may be wanted again."""
        self._restored = None
        if self.active and self.data == "replay":
            prepare_replay(trainer, self.replay_mb)

    def before_batch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the first snapshot, in the first ``on_train_batch_start``."""
        if self.active:
            self.ring.take_first(trainer, pl_module)

    def before_step(self) -> None:
        """Let a copy that is under way end before the weights change, in ``on_before_optimizer_step``."""
        self.ring.before_optimizer_step()

    def after_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the snapshot that is due, and trust checkpoints that are old enough, after a healthy step.

        In ``on_train_batch_end``, where ModelCheckpoint has not saved this step yet but all those before.
        """
        self.trusted.note_saved(trainer)
        self.trusted.healthy_step(trainer)
        if self.active and self.ring.due(trainer.global_step):
            self.ring.take(trainer, pl_module)

    def go_back(
        self, trainer: Trainer, pl_module: LightningModule, event: SpikeEvent, axis: Literal["rewind", "monotonic"]
    ) -> Return:
        """Bring back the snapshot that answers ``event``, in ``on_train_batch_end`` and on every rank."""
        self.trusted.note_saved(trainer)
        last = trainer.fit_loop.total_batch_idx
        snapshot = self.ring.choose(trainer.global_step, before_step=self._before_step(trainer, event))
        self._restored = snapshot.step
        data = snapshot.restore(trainer, pl_module, data=self.data, axis=axis)
        self.ring.discard_after(snapshot.step)
        self.trusted.discard_after(snapshot.step)
        quarantine(trainer, snapshot.step, since=snapshot.taken_at)
        if data == "skip" and self.skip_ahead:
            last += skip_batches(trainer, self.skip_ahead)
        return Return(snapshot.step, data, snapshot.batch, last)

    def undo_batch(self, trainer: Trainer, pl_module: LightningModule, axis: Literal["rewind", "monotonic"]) -> None:
        """Bring back the state before this batch, in ``on_train_batch_end``, if there is a snapshot of just that.

        There is where a run resumes at the beginning of a stretch that it is to leave out: its first batch was on its
        way before anybody could stop it.
        """
        if self.can_go_back and trainer.global_step:
            snapshot = self.ring.choose(trainer.global_step, before_step=trainer.global_step)
            if snapshot.batch == accumulated_batches(trainer)[0]:
                snapshot.restore(trainer, pl_module, data="skip", axis=axis)

    def _before_step(self, trainer: Trainer, event: SpikeEvent) -> int | None:
        """Return the step before which the snapshot must have been taken, None for whatever is old enough."""
        if event.kind == "watch" and event.signals.get("best_step", -1) >= 0:
            return int(event.signals["best_step"]) + 1
        # Several bad batches in a row: the state gone back to was old enough the first time, and is still the best. Of
        # a divergence it may be the cause, so that goes back further.
        restored = self._restored
        if event.kind != "spike" or restored is None or trainer.global_step - restored >= self.ring.min_age:
            return None
        return restored + 1

    def close(self) -> None:
        """Let go of memory and of files that are of no use any more."""
        self.ring.close()
        self.trusted.close()
