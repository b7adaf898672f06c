"""SpikeGuard: a run in trouble helps itself, in the process, from leaving a step out to going back to a snapshot.

What happens when is decided by :class:`~lowbit_lightning.spikes.ladder.Ladder`, from events that SpikeMonitor makes of
reduced numbers: every rank comes to the same decision without asking the others. The step that brings the trouble to
light is never applied, and a rollback happens at the end of its batch, before ModelCheckpoint could save it.
"""

import uuid
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lowbit_lightning.callbacks.spike_injector import SpikeInjector
from lowbit_lightning.callbacks.spike_monitor import SpikeMonitor
from lowbit_lightning.errors import InvalidArgumentError, TrainingDivergedError
from lowbit_lightning.spikes.data_position import accumulated_batches, skip_batches
from lowbit_lightning.spikes.events import SpikeEvent
from lowbit_lightning.spikes.ladder import RUNGS, Ladder
from lowbit_lightning.spikes.ledger import Ledger, LeftOut
from lowbit_lightning.spikes.recovery import Recovery
from lowbit_lightning.spikes.remedies import Remedies, drop_step
from lowbit_lightning.spikes.trusted import find

RUN_KEY = "spike_guard_run"
"""Of a checkpoint; no state, which would be the same in two runs that do the same."""


class SpikeGuard(Callback):
    """Answer spikes and divergence, rung by rung of a ladder; needs a SpikeMonitor and makes one where there is none.

    ``skip`` leaves the step out: weights and optimizer states stay as they are, to the bit. ``reset_momentum`` makes
    the optimizer forget its averages, ``lower_lr`` lowers the learning rate for a time, ``raise_precision`` lets
    techniques of few bits go one level up; the step is left out as well. ``rollback`` brings back a snapshot, its
    precision, and the full learning rate. ``abort`` ends the run with an error that names the last trusted checkpoint;
    so does the end of the ladder.

    EarlyStopping forgets abandoned validations too, but one that stops the run at a validation does so before a
    rollback for the same validation could happen; the ledger then says ``too late``.

    Args:
        ladder: what may be done, in the order in which it is tried for one trouble; all of the above, in that order,
            when null. Under manual optimization no step can be left out: there is no ``skip``, and a spike is answered
            by ``rollback``.
        max_skips: steps in a row that may be skipped.
        snapshot: ``every_n_steps`` (100), ``keep`` (3), ``where`` (``cpu`` or ``disk``, there in ``directory``) and
            ``min_age`` (20: a rollback takes a snapshot that is at least so many steps old, since a younger one may
            hold the trouble already).
        data: after a rollback go on with new data (``skip``), or train on the same again (``replay``).
        skip_ahead: further batches that are left out after a rollback with ``data: skip``.
        lr_scale: what ``lower_lr`` multiplies the learning rate with.
        lr_recover_steps: optimizer steps until the full rate is back.
        max_rollbacks: rollbacks without a healthy stretch between them.
        ledger: JSON-lines file of all events, in the trainer's default_root_dir unless its path is absolute. A resumed
            run reads it and leaves out what the run before it left out.
        replay_mb: megabytes of batches that are kept for ``data: replay`` if the data loader cannot go back.

    Raises:
        InvalidArgumentError: an argument is out of range, the snapshots do not fit into free memory, or the ledger
            cannot be written.
        TrainingDivergedError: nothing helped.
    """

    def __init__(
        self,
        ladder: list[str] | None = None,
        max_skips: int = 3,
        snapshot: dict[str, Any] | None = None,
        data: Literal["skip", "replay"] = "skip",
        skip_ahead: int = 0,
        lr_scale: float = 0.5,
        lr_recover_steps: int = 200,
        max_rollbacks: int = 5,
        ledger: str = "spikes.jsonl",
        replay_mb: float = 256.0,
    ) -> None:
        self.ledger = ledger
        self._recovery = Recovery(snapshot or {}, data, skip_ahead, replay_mb)
        self._has_default_ladder = ladder is None
        self._remedy_settings = (lr_scale, lr_recover_steps)
        self._ladder_settings = (RUNGS if ladder is None else tuple(ladder), max_skips, max_rollbacks)
        self._monitor: SpikeMonitor
        self._ledger: Ledger
        self._begin_run()
        self._begin_fit()

    def _begin_run(self) -> None:
        """Know of no trouble yet."""
        self._remedies = Remedies(*self._remedy_settings)
        self._ladder = Ladder(*self._ladder_settings, healthy_stretch=self._recovery.reach)
        self._tried: list[str] = []

    def _begin_fit(self) -> None:
        self._recovery.close()  # an error may have left snapshots of another run
        self._run = uuid.uuid4().hex[:12]
        self._resumed = False
        self._left_out = LeftOut([])
        self._last_step = 0
        self._answered: SpikeEvent | None = None
        self._trouble = False  # in the step of this batch
        self._pending: SpikeEvent | None = None  # what a rollback at the end of this batch answers
        self._replayed: SpikeEvent | None = None  # what the present replay makes happen again, or not
        self._gone_back: tuple[int, int] | None = None  # steps from and to, until the loggers are told

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return the row of the table at the start of a run: what may be done, and what it takes."""
        return [("SpikeGuard", ", ".join(self._ladder.rungs), self._recovery.describe())]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find or make the monitor, put the callbacks in order, and refuse early what cannot work."""
        if stage != "fit":
            return
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        monitors = [callback for callback in callbacks if isinstance(callback, SpikeMonitor)]
        self._monitor = monitors[0] if monitors else SpikeMonitor()
        if not monitors:
            self._monitor.setup(trainer, pl_module, stage)
            callbacks = [self._monitor, *callbacks]
        self._monitor.guarded = True
        if trainer.global_step == 0:
            self._begin_run()  # a checkpoint's state is loaded later
        # A new list, because Lightning is going through the old one.
        cast(Any, trainer).callbacks = sorted(callbacks, key=_place)
        self._ladder.leaves_out_steps = pl_module.automatic_optimization
        if not pl_module.automatic_optimization and "skip" in self._ladder.rungs:
            self._leave_out_skip(type(pl_module).__name__)
        self._check_watched()
        self._recovery.active = "rollback" in self._ladder.rungs
        self._recovery.warn_if_younger(self._monitor.patience)
        self._ladder.healthy_stretch = self._recovery.reach + self._monitor.patience
        self._begin_fit()
        self._check_ledger(trainer)

    def _leave_out_skip(self, module: str) -> None:
        why = f"{module} optimizes manually, and what it makes of a step that did not happen is not known"
        if not self._has_default_ladder:
            raise InvalidArgumentError(f"ladder={list(self._ladder.rungs)} holds skip, but {why}: leave skip out")
        rank_zero_info(f"SpikeGuard leaves skip out of its ladder: {why}.")
        self._ladder.rungs = tuple(rung for rung in self._ladder.rungs if rung != "skip")

    def _check_watched(self) -> None:
        for key, action in self._monitor.watch_actions.items():
            if action == "rollback" and "rollback" not in self._ladder.rungs:
                raise InvalidArgumentError(
                    f"watch[{key!r}].action=rollback, but ladder={list(self._ladder.rungs)} has no rollback, without "
                    "which there are no snapshots: add it to the ladder, or use action: alert"
                )

    def _check_ledger(self, trainer: Trainer) -> None:
        """Refuse an unwritable ledger, on every rank: one that raises alone leaves the others waiting."""
        problem = None
        if trainer.is_global_zero:
            try:
                self._open_ledger(trainer).check_writable()
            except InvalidArgumentError as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem:
            raise InvalidArgumentError(problem)

    def _open_ledger(self, trainer: Trainer) -> Ledger:
        if "://" in str(trainer.default_root_dir) and not Path(self.ledger).is_absolute():
            raise InvalidArgumentError(
                f"ledger={self.ledger!r} is relative to default_root_dir={str(trainer.default_root_dir)!r}, which is "
                "no folder of this machine: give an absolute path"
            )
        return Ledger(Path(trainer.default_root_dir) / self.ledger, self._run)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the memory of the snapshots while there is still time to say no."""
        self._recovery.prepare(trainer)
        self._remedies.rate.attach(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read in the ledger what a resumed run has to leave out."""
        self._ledger = self._open_ledger(trainer)
        if self._resumed:
            entries = self._ledger.read() if trainer.is_global_zero else []
            self._left_out = trainer.strategy.broadcast(LeftOut(entries))
        self._last_step = trainer.global_step
        self._recovery.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take the first snapshot, and tell the loggers of a rollback: they know of the abandoned batch by now."""
        self._trouble = False
        self._recovery.before_batch(trainer, pl_module)
        self._mark_rollback()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Decide what to do about the step that is about to be taken."""
        self._recovery.before_step()
        event, batch = self._monitor.event, trainer.fit_loop.total_batch_idx
        out_of_line = event is not None and event is not self._answered
        if event is not None and out_of_line:
            self._answered = event
            if self._pending is None:
                self._answer(trainer, pl_module, event)
            else:
                self._record(trainer, event, "rollback", "on its way already")
        elif self._pending is None:
            if not (batch in self._left_out.batches or self._left_out.upcoming(batch)):
                return
            rank_zero_info(f"SpikeGuard leaves out batch {batch}, as the ledger says.")
        self._trouble = True
        drop_step(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Go back if that was decided; else, after a healthy step, take the snapshot that is due."""
        self._answer_watched(trainer)
        if trainer.global_step == self._last_step:  # inside an accumulation
            return
        self._remedies.rate.advance()
        if self._pending is not None and not self._recovery.can_go_back:
            self._record(trainer, self._pending, "skip", "no snapshot yet: the run was resumed within an accumulation")
            self._pending = None
        elif self._pending is not None:
            self._roll_back(trainer, pl_module, self._pending)
        elif self._left_out.upcoming(trainer.fit_loop.total_batch_idx):
            self._recovery.undo_batch(trainer, pl_module, self._monitor.axis)
        elif not self._trouble:
            self._go_on(trainer, pl_module)
        self._last_step = trainer.global_step
        if count := self._left_out.upcoming(trainer.fit_loop.total_batch_idx + 1):
            passed = skip_batches(trainer, count)
            rank_zero_info(f"SpikeGuard passes over {passed} batches that a rollback had left behind.")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer metrics of the validation."""
        if trainer.state.fn == "fit":
            self._answer_watched(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer metrics of the epoch."""
        self._answer_watched(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the last validation asked for a rollback: there is no batch any more at whose end it could be."""
        self._mark_rollback()
        if self._pending is not None:
            self._record(trainer, self._pending, "too late", "training ended before the rollback")
            self._pending = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of everything, as no teardown follows, and keep ModelCheckpoint from saving weights that diverged."""
        self.teardown(trainer, pl_module, "fit")
        if isinstance(exception, TrainingDivergedError):
            for checkpoint in trainer.checkpoint_callbacks:
                if isinstance(checkpoint, ModelCheckpoint):
                    checkpoint._last_global_step_saved = trainer.global_step

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the optimizers and of the snapshots."""
        self._remedies.rate.detach()
        self._recovery.close()
        if hasattr(self, "_monitor"):
            self._monitor.guarded = False

    def state_dict(self) -> dict[str, Any]:
        """Return place on the ladder, budgets and the learning rate in recovery; plain values."""
        return {
            "ladder": self._ladder.state_dict(),
            "remedies": self._remedies.state_dict(),
            "tried": list(self._tried),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what ``state_dict`` returned."""
        self._ladder.load_state_dict(state_dict["ladder"])
        self._remedies.load_state_dict(state_dict["remedies"])
        self._tried = list(state_dict["tried"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell under which name the ledger knows this run."""
        checkpoint[RUN_KEY] = self._run

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on under the same name, if the run before had a guard."""
        if RUN_KEY in checkpoint:
            self._run = checkpoint[RUN_KEY]
            self._resumed = True

    def _answer(self, trainer: Trainer, pl_module: LightningModule, event: SpikeEvent) -> None:
        finding = ""
        if self._ladder.caused_rollback(event):
            finding = "again in the replay, so it is reproducible: data or state; "
            self._replayed = None
        while (rung := self._ladder.decide(event)) not in ("rollback", "abort"):
            if (detail := self._remedies.carry_out(rung, trainer)) is not None:
                left_out = accumulated_batches(trainer) if pl_module.automatic_optimization else None
                self._record(trainer, event, rung, finding + detail, left_out=left_out)
                break
        if rung == "abort":
            self._abort(trainer, event, finding)
        self._tried.append(f"{rung} at step {event.step}")
        if rung == "rollback":
            self._pending = event

    def _answer_watched(self, trainer: Trainer) -> None:
        for event in self._monitor.watch_events:
            detail = ""
            if event is self._pending:
                continue
            if event.action == "raise_precision":
                detail = self._remedies.carry_out("raise_precision", trainer) or "no precision can be raised"
            elif event.action == "rollback" and self._pending is not None:
                detail = f"together with the one for {self._pending.signal}"
            elif event.action == "rollback":
                if self._ladder.decide(event) == "abort":
                    self._abort(trainer, event, "")
                self._tried.append(f"rollback at step {event.step} for {event.signal}")
                self._pending = event
                continue
            self._record(trainer, event, event.action or "alert", detail)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batch = trainer.fit_loop.total_batch_idx
        if self._replayed is not None and batch >= self._replayed.batch:
            detail = f"batch {self._replayed.batch} is healthy in its replay: not data nor state, suspect the hardware"
            self._record(trainer, self._replayed, "not reproducible", detail)
            self._replayed = None
        if self._ladder.healthy(trainer.global_step - 1, batch):
            self._tried.clear()
            self._remedies.trouble_is_over(trainer)
        self._recovery.after_step(trainer, pl_module)

    def _roll_back(self, trainer: Trainer, pl_module: LightningModule, event: SpikeEvent) -> None:
        from_step = trainer.global_step
        done = self._recovery.go_back(trainer, pl_module, event, self._monitor.axis)
        self._remedies.rate.give_back()  # what was lowered before was for the trouble that is left behind
        batches = {"left_out" if done.data == "skip" else "replayed": (done.first, done.last)}
        self._record(trainer, event, "rollback", str(done), **batches)
        self._pending = None
        self._replayed = event if done.data == "replay" and event.kind != "watch" else None
        self._gone_back = from_step, done.step

    def _mark_rollback(self) -> None:
        if self._gone_back is not None:
            self._monitor.mark_rollback(*self._gone_back)
            self._gone_back = None

    def _abort(self, trainer: Trainer, event: SpikeEvent, finding: str) -> NoReturn:
        self._record(trainer, event, "abort", finding + "nothing helped")
        trusted = find(trainer)
        raise TrainingDivergedError(
            event.message(), self._tried, str(trusted) if trusted else None, str(self._ledger.path)
        )

    def _record(self, trainer: Trainer, event: SpikeEvent, decision: str, detail: str, **batches: Any) -> None:
        self._monitor.record(event, decision, detail)
        if trainer.is_global_zero:
            self._ledger.append(event, decision, detail, **batches)


def _place(callback: Callback) -> int:
    """Return where a callback belongs: what breaks gradients, what sees it, what acts, and only then what uses them."""
    order: list[Any] = [(BatchSizeFinder, LearningRateFinder), SpikeInjector, SpikeMonitor, SpikeGuard]
    first = next((place for place, kind in enumerate(order) if isinstance(callback, kind)), len(order))
    return len(order) + 1 if isinstance(callback, Checkpoint) else first
