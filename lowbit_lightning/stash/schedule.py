"""The schedule of precision in a Lightning run: which metric decides, on every rank alike and across a resume.

Lightning does not run again a validation that was due right after a checkpoint was saved, although the run that was
killed there did. Its metric may have raised the level, so a run that goes on from such a checkpoint validates first.
This file alone in this package knows of Lightning.
"""

from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.dsq import Cost
from lowbit_lightning.stash.dsq_linear import GemmPrecision
from lowbit_lightning.stash.levels import Level, PlateauRule

# Words of metrics' names that leave no doubt about which way is better.
_LOWER_IS_BETTER = {"loss", "perplexity", "ppl", "nll"}
_HIGHER_IS_BETTER = {"accuracy", "acc", "bleu", "f1", "auroc", "rouge", "chrf"}


class PrecisionSchedule:
    """Takes a run from level to level, and adds up what its linear layers would have cost.

    Args:
        rule: when to rise.
        monitor: name of the metric of the validation.
        max_gradient_error: a sampled error of a weight's gradient above it raises the level at once; None never does.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(self, rule: PlateauRule, monitor: str, max_gradient_error: float | None) -> None:
        if max_gradient_error is not None and not max_gradient_error > 0:
            raise InvalidArgumentError(
                f"max_gradient_error={max_gradient_error!r} is out of range: a number above 0, such as 0.5, or null"
            )
        self.rule = rule
        self.monitor = monitor
        self.max_gradient_error = max_gradient_error
        self._spent = self._yardstick = Cost(0.0, 0.0)
        self._validated_at = -1  # batches of the run when the last validation ended
        self.validation_missed = False

    @property
    def level(self) -> Level:
        """The present level."""
        return self.rule.level

    def describe(self) -> str:
        """Say what happens when."""
        levels = [level.q1 if level.stash_only else str(level) for level in self.rule.levels]
        if len(levels) == 1:
            return f"{levels[0]}"
        return f"{', then '.join(map(str, levels))} as {self.monitor} stops improving ({self.rule.mode})"

    def reset(self) -> None:
        """Start anew; what a checkpoint holds is loaded later."""
        self.rule.reset()
        self._spent = self._yardstick = Cost(0.0, 0.0)
        self._validated_at, self.validation_missed = -1, False

    def check(self, trainer: Trainer) -> None:
        """Look for what can be known to be wrong before the run.

        Raises:
            InvalidArgumentError: ``mode`` contradicts the metric's name, or another callback that monitors it.
        """
        if len(self.rule.levels) == 1:
            return
        words = set(self.monitor.lower().replace("/", "_").replace("-", "_").split("_"))
        for known, mode in ((_LOWER_IS_BETTER, "min"), (_HIGHER_IS_BETTER, "max")):
            if words & known and self.rule.mode != mode:
                raise InvalidArgumentError(
                    f"mode={self.rule.mode!r} contradicts monitor={self.monitor!r}, of which "
                    f"{'less' if mode == 'min' else 'more'} is better: set mode: {mode}"
                )
        for callback in cast(Any, trainer).callbacks:
            monitors = isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor == self.monitor
            if monitors and callback.mode != self.rule.mode:
                raise InvalidArgumentError(
                    f"mode={self.rule.mode!r} with monitor={self.monitor!r}, but {type(callback).__name__} monitors it "
                    f"with mode={callback.mode!r}: one of them is wrong"
                )
        if not cast(Any, trainer).enable_validation:
            rank_zero_info(
                f"DynamicStashing has {len(self.rule.levels)} levels, but there is no validation to go by: the run "
                f"stays at {self.level} unless something else asks for more precision."
            )

    def catch_up(self, trainer: Trainer) -> None:
        """Run the validation that a checkpoint was saved just before; in ``on_train_start``."""
        if not self.validation_missed:
            return
        self.validation_missed = False
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False
        trainer.validating = True
        validation.run()
        trainer.training = True

    def after_validation(self, trainer: Trainer) -> str | None:
        """Judge the metric of a validation and rise if it is time; return why, or None. Call it on every rank.

        Raises:
            InvalidArgumentError: the metric was not logged.
        """
        self._validated_at = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if len(self.rule.levels) == 1:
            return None
        metrics = trainer.callback_metrics
        own = float(metrics[self.monitor]) if self.monitor in metrics else None
        # A metric may differ between ranks, and a level must not.
        value: float | None = trainer.strategy.broadcast(own)
        if value is None:
            logged = ", ".join(sorted(name for name in metrics if not name.startswith(("stash/", "dsq/")))) or "nothing"
            raise InvalidArgumentError(
                f"monitor={self.monitor!r} was not logged by the validation; logged so far: {logged}. Set monitor to "
                "one of them, log it with self.log in validation_step, or give a single level, which needs none"
            )
        reason = self.rule.update(value)
        return f"{self.monitor} {reason}" if reason is not None else None

    def after_sample(self, trainer: Trainer, error: float | None) -> str | None:
        """Judge a sampled error of a gradient; return why the level rose, or None. Call it on every rank."""
        if self.max_gradient_error is None or self.rule.at_the_top:
            return None
        seen: float | None = trainer.strategy.broadcast(error)
        if seen is None or seen <= self.max_gradient_error:  # what is not a number is a matter for SpikeGuard
            return None
        self.rule.rise(for_good=True)
        return f"the sampled gradient error is {seen:.3g}, above {self.max_gradient_error:.3g}"

    def spend(self, gemms: GemmPrecision) -> None:
        """Add what a batch would have cost."""
        self._spent += gemms.cost
        self._yardstick += gemms.yardstick
        gemms.cost = gemms.yardstick = Cost(0.0, 0.0)

    def scalars(self) -> dict[str, float]:
        """Return the level and the modelled ratios over the run so far, for the loggers."""
        named = {f"dsq/{name}": float(bits) for name, bits in self.level._asdict().items()}
        scalars = {"dsq/level": float(self.rule.index), **named}
        if self._spent.arithmetic:
            scalars["dsq/arithmetic_ratio"] = self._yardstick.arithmetic / self._spent.arithmetic
            scalars["dsq/dram_ratio"] = self._yardstick.dram / self._spent.dram
        return scalars

    def validation_follows(self, trainer: Trainer) -> bool:
        """Whether a batch is at its end, in its hooks, and Lightning will validate next: a resume would not."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        progress: Any = loop.batch_progress.total  # annotated as a base class
        if fetcher is None or not progress.ready == progress.processed == progress.completed + 1:
            return False
        return self._validated_at != progress.ready and loop._should_check_val_fx(fetcher)

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to go on, as plain values."""
        return {
            "rule": self.rule.state_dict(),
            "spent": list(self._spent),
            "yardstick": list(self._yardstick),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.rule.load_state_dict(state["rule"])
        self._spent, self._yardstick = Cost(*state["spent"]), Cost(*state["yardstick"])
