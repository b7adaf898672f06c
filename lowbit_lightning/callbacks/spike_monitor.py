"""SpikeMonitor: does this step fit in with the steps before it?

It looks at loss, gradient norm and whatever else is asked for just before the optimizer would step, so that a step out
of line can still be left out. Seeing is all it does; SpikeGuard acts. Unlike peers' detectors it compares with robust
statistics of healthy steps only, decides on every rank from the same numbers, and keeps all it knows in checkpoints.
"""

import math
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.spikes.arguments import check
from lowbit_lightning.spikes.events import SpikeEvent, WatchAction
from lowbit_lightning.spikes.judge import MEASURED, Judge, Judgement
from lowbit_lightning.spikes.recorder import EventRecorder, axis_step
from lowbit_lightning.spikes.step_meter import Measured, StepMeter
from lowbit_lightning.spikes.watched_metrics import WatchedMetrics

LOOKS = 100  # after so many, a name that was never logged is warned of: a run of one epoch ends only days later


class SpikeMonitor(Callback):
    """See spikes, divergence and metrics out of bounds, in TensorBoard and before they reach the weights.

    Before every optimizer step each of ``signals`` is compared with its last healthy values; ``spike/*`` scalars are
    logged every ``trainer.log_every_n_steps``, events always, with a card each. Works under automatic and manual
    optimization; where there are several optimizers, each has detectors of its own, and its events carry its number as
    ``optimizer``. With a gradient scaler (``16-mixed``), gradients that overflow are the scaler's business until its
    scale is 1.

    Args:
        signals: what is judged: ``loss`` (mean over accumulated batches and ranks), ``grad_norm`` (global, before
            stabilizers and clipping), ``nonfinite`` (gradient tensors and losses with NaN or infinity),
            ``update_ratio`` (update over weight, on a sample, every 10 steps), or the name of any metric that is logged
            while training.
        window: healthy values that a value is compared with.
        threshold: robust standard deviations above their median from which on it is a spike.
        min_samples: healthy values needed before anything finite is called a spike.
        divergence_ratio: fast over slow average of the loss from which on it diverges.
        fast: decay of the fast average.
        slow: decay of the slow average.
        patience: steps in a row beyond the ratio, or spikes in a row, that make a divergence.
        watch: limits for logged metrics, by name, such as ``val_loss: {mode: min, max_rise: 3%, patience: 2, action:
            alert}`` or ``solo/swamped: {above: 0.5}``. Settings: ``mode``, ``max_rise`` (3% or a number; of the best
            value so far, or of the one in the JSON file ``baseline``), ``above``, ``below``, ``patience``, ``action``
            (``alert``; with a SpikeGuard also ``raise_precision`` or ``rollback``, which brings back the last snapshot
            before the best value, or the oldest that is kept).
        on_alert: shell command for every event but a single spike; finds it in the environment variables
            ``SPIKE_MESSAGE`` and ``SPIKE_EVENT`` (JSON).
        axis: after a rollback the loggers' step goes back too and TensorBoard drops the abandoned steps (``rewind``),
            or it goes on (``monotonic``).

    Attributes:
        event: the event of the step that is about to be taken, None if it is healthy; the same on all ranks.
        watch_events: events of watched metrics that nobody has recorded yet.
        events: number of events so far.
        guarded: whether somebody else calls ``record``; if not, the monitor records every event as ``seen``.

    Raises:
        InvalidArgumentError: an argument is out of range, there is another SpikeMonitor, ``watch`` asks for an action
            that nobody is there to take, or a name in ``signals`` or ``watch`` turns out never to be logged.
    """

    restore_on_rollback = True

    def __init__(
        self,
        signals: tuple[str, ...] = ("loss", "grad_norm", "nonfinite"),
        window: int = 128,
        threshold: float = 6.0,
        min_samples: int = 32,
        divergence_ratio: float = 1.5,
        fast: float = 0.9,
        slow: float = 0.99,
        patience: int = 20,
        watch: dict[str, dict[str, Any]] | None = None,
        on_alert: str | None = None,
        axis: Literal["rewind", "monotonic"] = "rewind",
    ) -> None:
        check(bool(signals) and len(set(signals)) == len(signals), "signals", list(signals), "names, each once")
        check(axis in ("rewind", "monotonic"), "axis", axis, "rewind or monotonic")
        self.signals = tuple(signals)
        self.patience = patience
        self.threshold = threshold
        self.window = window
        self.axis = axis
        self.guarded = False
        self._judge_settings = (window, threshold, min_samples, divergence_ratio, fast, slow, patience)
        self._published = tuple(name for name in self.signals if name not in MEASURED)
        self._watch = watch or {}
        self._on_alert = on_alert
        self._begin_run()

    def _begin_run(self) -> None:
        """Know nothing of any step."""
        self.event: SpikeEvent | None = None
        self.events = 0
        self.rollbacks = 0
        self._judges = [self._new_judge()]
        self._unseen = set(self.signals)
        self._meter = StepMeter(self._published)
        self._watched = WatchedMetrics(self._watch)
        self._recorder = EventRecorder(self.signals, self._on_alert, self.axis)
        self._scalars: dict[str, float] = {}
        self._validated = False
        self._looks = 0

    @property
    def watch_events(self) -> list[SpikeEvent]:
        """Events of watched metrics that nobody has recorded yet, those that ask for most first."""
        order = ("rollback", "raise_precision", "alert")
        events = [event for event in self._recorder.open if event.kind == "watch"]
        return sorted(events, key=lambda event: order.index(event.action or "alert"))

    @property
    def watch_actions(self) -> dict[str, WatchAction]:
        """What ``watch`` asks for, by the name of the metric."""
        return self._watched.actions

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Rows for the table at the start of a run."""
        rule = f"above {self.threshold:g} robust deviations of the last {self.window} healthy steps"
        rows = [("SpikeMonitor", ", ".join(self.signals), rule)]
        return rows + [("SpikeMonitor", key, text) for key, text in self._watched.describe()]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor, and forget the run of another trainer."""
        callbacks: list[Callback] = cast(Any, trainer).callbacks
        if len([callback for callback in callbacks if isinstance(callback, SpikeMonitor)]) > 1:
            raise InvalidArgumentError(
                "callbacks hold two SpikeMonitors: keep one (SpikeGuard makes its own if it needs)"
            )
        if stage == "fit" and trainer.global_step == 0:
            self._begin_run()  # a checkpoint's state is loaded later
        self._recorder.attach(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a watched metric whose action nobody would take."""
        for key, action in self.watch_actions.items():
            if action != "alert" and not self.guarded:
                raise InvalidArgumentError(
                    f"watch[{key!r}].action={action} needs a SpikeGuard among the callbacks, which acts: add one, or "
                    "use action: alert"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with a clean window of losses and with charts for what will be logged."""
        self.event = None
        self._meter.clear()
        while len(self._judges) < len(trainer.optimizers):
            self._judges.append(self._new_judge())
        self._recorder.add_layout()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record what nobody else has recorded, and remember which samples come."""
        self._recorder.release()
        self._record_seen()
        self._recorder.alerts.poll()
        self.event = None
        self._meter.note_batch(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss, as the module computed it."""
        self._meter.note_loss(trainer, pl_module, loss)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step; what is found is in ``event``, on every rank."""
        index = next((i for i, one in enumerate(trainer.optimizers) if one is optimizer), 0)
        plain_copies = 1 if isinstance(trainer.strategy, FSDPStrategy) else trainer.world_size
        measured = self._meter.measure(trainer, optimizer, index, plain_copies)
        self._unseen -= measured.values.keys()
        judge = self._judges[index]
        judgement = judge.judge(measured.judged, measured.weights_finite)
        self.event = self._event(trainer, measured, judgement, index) if judgement.kind else None
        if self.event is not None:
            self.events += 1
            # A trouble that lasts is told of a few times, then now and then.
            if self.guarded or judge.events_in_a_row <= self.patience or judgement.kind == "divergence":
                self._recorder.note(self.event)
        self._scalars |= self._scalars_of(measured, judgement, "" if len(trainer.optimizers) == 1 else f"_{index}")

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what was seen, and look at watched metrics that are logged while training."""
        if not self._meter.stepped:
            return
        self._meter.note_step_taken(healthy=self.event is None)
        every: int = cast(Any, trainer).log_every_n_steps
        due = every > 0 and (axis_step(trainer) + 1) % every == 0
        if due or self.event is not None:
            scalars = self._scalars | {"spike/events": float(self.events)}
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scalars.items()})
            self._recorder.log(scalars)
        if due:
            self._look(trainer, "batch")
            self._looks += 1
            if self._looks == LOOKS:
                self._warn_of_missing(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take note of what was logged before the validation."""
        self._watched.note(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at watched metrics of the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated = True
            self._look(trainer, "validation")
            missing = self._watched.missing(trainer)
            self._watched.require([key for key in missing if key.startswith("val")], trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at watched metrics of the epoch; from now on a name that was never logged is an error."""
        self._look(trainer, "epoch")
        if not trainer.fit_loop.epoch_loop._is_training_done:
            self._require_all(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record what is left. Where no epoch was finished, a name that was never logged is only warned of."""
        self._record_seen()
        self._recorder.alerts.finish()
        if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._require_all(trainer)
        elif self._looks < LOOKS:
            self._warn_of_missing(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Record what is left: it may be why the run ends. No teardown follows."""
        self._record_seen()
        self._recorder.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the trainer."""
        self._recorder.release()
        self._recorder.attach(None)

    def record(self, event: SpikeEvent, decision: str, detail: str = "") -> None:
        """Show what was done about an event: a card, scalars, and the user's command.

        Call it on every rank. The first call for an event settles it; a later one adds a card. After ``rollback`` the
        trainer logs nothing more of this batch if the axis rewinds: it would, at the step that was gone back to.

        Args:
            event: of this monitor.
            decision: one word, such as ``skip``; ``seen`` if nothing was done.
            detail: more about it.
        """
        self._recorder.record(event, decision, detail)

    def mark_rollback(self, from_step: int, to_step: int) -> None:
        """Mark a rollback in the loggers and, if the axis rewinds, make TensorBoard drop the abandoned steps.

        Call it on every rank in the first ``on_train_batch_start`` after the rollback, when the trainer's own step is
        back. Cards of abandoned steps are written again, at the step that was gone back to.

        Args:
            from_step: optimizer step that was abandoned.
            to_step: optimizer step that was gone back to.
        """
        self.rollbacks += 1
        self._recorder.mark_rollback(self.rollbacks, from_step - to_step)

    def state_dict(self) -> dict[str, Any]:
        """Detectors, watched metrics and counts, as plain values."""
        return {
            "judges": [judge.state_dict() for judge in self._judges],
            "meter": self._meter.state_dict(),
            "watched": self._watched.state_dict(),
            "events": self.events,
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; counts of events never go back."""
        self._judges = [self._new_judge() for _ in state_dict["judges"]]
        for judge, state in zip(self._judges, state_dict["judges"], strict=True):
            judge.load_state_dict(state)
        self._watched.load_state_dict(state_dict["watched"])
        self.events = max(self.events, int(state_dict["events"]))
        self.rollbacks = max(self.rollbacks, int(state_dict["rollbacks"]))
        self._meter.load_state_dict(state_dict["meter"])

    def _new_judge(self) -> Judge:
        return Judge(self.signals, *self._judge_settings)

    def _event(self, trainer: Trainer, measured: Measured, judgement: Judgement, index: int) -> SpikeEvent:
        assert judgement.kind is not None
        signal = judgement.signal or "nonfinite"
        rank = measured.worst_rank(signal)
        several = {"optimizer": float(index)} if len(trainer.optimizers) > 1 else {}
        return SpikeEvent(
            kind=judgement.kind,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            batch=trainer.fit_loop.total_batch_idx,
            signal=signal,
            value=judgement.value,
            score=judgement.score,
            limit=judgement.limit,
            rank=rank,
            signals=measured.values | several,
            samples=trainer.strategy.broadcast(self._meter.samples(), src=rank),
        )

    def _scalars_of(self, measured: Measured, judgement: Judgement, suffix: str) -> dict[str, float]:
        scalars = {name: value for name, value in measured.values.items() if name in MEASURED}
        scalars["score"] = judgement.score
        for name, verdict in judgement.verdicts.items():
            if math.isfinite(verdict.limit) and name in ("loss", "grad_norm"):
                scalars |= {"loss_median": verdict.median} if name == "loss" else {}
                scalars["threshold" if name == "loss" else "grad_norm_threshold"] = verdict.limit
                scalars |= {"loss_lower": 2 * verdict.median - verdict.limit} if name == "loss" else {}
        return {f"spike/{name}{suffix}": value for name, value in scalars.items()}

    def _look(self, trainer: Trainer, stage: Literal["batch", "validation", "epoch"]) -> None:
        for event in self._watched.look(trainer, stage):
            self.events += 1
            self._recorder.note(event)

    def _require_all(self, trainer: Trainer) -> None:
        # A validation that is still to come may log what is missing.
        if self._validated or not trainer.enable_validation:
            self._watched.require(self._watched.missing(trainer), trainer)
        unseen = [name for name in self._published if name in self._unseen]
        self._watched.require(unseen, trainer, argument="signals")
        if "loss" in self._unseen and "loss" in self.signals:
            rank_zero_warn("SpikeMonitor saw no loss: it sees losses of manual_backward and of automatic optimization")
            self._unseen.discard("loss")

    def _warn_of_missing(self, trainer: Trainer) -> None:
        if self._validated or not trainer.enable_validation:
            self._watched.warn_of(self._watched.missing(trainer), trainer)
        self._watched.warn_of([name for name in self._published if name in self._unseen], trainer, argument="signals")

    def _record_seen(self) -> None:
        if not self.guarded:
            for event in self._recorder.open:
                self.record(event, "seen")
