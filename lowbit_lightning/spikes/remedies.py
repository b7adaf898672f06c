"""The remedies that need no snapshot: what the rungs of the ladder below ``rollback`` do to a run.

Precision as a remedy is open to everybody: a callback, the strategy or the precision plugin that computes in few bits
offers two methods, both called on every rank at the same step.

``raise_precision() -> bool``
    Go one level up, from the next batch on; say whether there was a level to go to. Nobody going up means that the
    ladder goes on to its next rung. Called again while the trouble lasts, if the ladder comes by again.
``restore_precision() -> None``
    Come back down; called once a healthy stretch is over. Who rises for good does without this method.

The level belongs into the state of who offers it. A rollback brings back the level of the snapshot, as it does with the
learning rate, from a precision plugin's ``state_dict`` always and from a callback's if that says
``restore_on_rollback = True``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lowbit_lightning.spikes.arguments import check
from lowbit_lightning.spikes.ladder import Rung
from lowbit_lightning.spikes.lowered_rate import LoweredRate
from lowbit_lightning.spikes.momentum import reset_momentum


class Remedies:
    """Carries out ``skip``, ``reset_momentum``, ``lower_lr`` and ``raise_precision``.

    Args:
        lr_scale: what the learning rate is multiplied with.
        lr_recover_steps: optimizer steps until the full rate is back.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(self, lr_scale: float, lr_recover_steps: int) -> None:
        check(0 < lr_scale < 1, "lr_scale", lr_scale, "a number above 0 and below 1")
        check(lr_recover_steps >= 1, "lr_recover_steps", lr_recover_steps, "an integer >= 1")
        self.lr_scale = lr_scale
        self.rate = LoweredRate(lr_recover_steps)
        self._raised = False  # whether precision was raised and did not return

    def carry_out(self, rung: Rung, trainer: Trainer) -> str | None:
        """Do what ``rung`` says beside leaving the step out; return that for people, None where it is not possible."""
        if rung == "skip":
            return "the step is left out"
        if rung == "reset_momentum":
            forgetful = [type(optimizer).__name__ for optimizer in trainer.optimizers if reset_momentum(optimizer)]
            return f"the averages of {', '.join(forgetful)} start anew" if forgetful else None
        if rung == "lower_lr":
            self.rate.lower(self.lr_scale)
            return f"learning rate times {self.rate.factor:g}, recovering over {self.rate.recover_steps} steps"
        raised = [type(one).__name__ for one in _offering(trainer, "raise_precision") if one.raise_precision()]
        self._raised = self._raised or bool(raised)
        return f"one level up: {', '.join(raised)}" if raised else None

    def trouble_is_over(self, trainer: Trainer) -> None:
        """Let precision that was raised for a time return."""
        if self._raised:
            for one in _offering(trainer, "restore_precision"):
                one.restore_precision()
            self._raised = False

    def state_dict(self) -> dict[str, Any]:
        """Return the state, plain values."""
        return {"rate": self.rate.state_dict(), "raised": self._raised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.rate.load_state_dict(state["rate"])
        self._raised = state["raised"]


def drop_step(trainer: Trainer, pl_module: LightningModule) -> None:
    """Make the coming step leave everything as it is; a gradient of zero would not, as moments decay.

    An optimizer without gradients is asked to by ``skip_next_update()``. Nothing is done under manual optimization,
    where the module may want its gradients after the step. Call it at most once for a step.
    """
    if not pl_module.automatic_optimization:
        return
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    for optimizer in trainer.optimizers:
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # A fused optimizer's gradients are looked at for overflow only in its step, and the scaler does not bear a
            # step in which it saw none.
            scaler.unscale_(optimizer)
    for param in pl_module.parameters():
        param.grad = None
    for optimizer in trainer.optimizers:
        if hasattr(optimizer, "skip_next_update"):
            optimizer.skip_next_update()
        for group in optimizer.param_groups:
            for param in group["params"]:  # some may be none of the module's
                param.grad = None


def _offering(trainer: Any, method: str) -> list[Any]:
    everyone = [*trainer.callbacks, trainer.strategy, trainer.precision_plugin]
    return [one for one in everyone if callable(getattr(one, method, None))]
