"""A learning rate that is lowered for a while, whatever scheduler there is.

Schedulers of the chainable kind compute the next rate from the present one, so a rate that stayed lowered between two
steps would be lowered for good. It is therefore lowered in the optimizer's own hook before ``step`` and put back, to
the bit, in the one after it: schedulers, checkpoints and loggers only ever see their own rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LoweredRate:
    """Scales the learning rate of every group of some optimizers, recovering in a straight line.

    Args:
        recover_steps: optimizer steps until the full rate is back.
    """

    def __init__(self, recover_steps: int) -> None:
        self.recover_steps = recover_steps
        self._lowest = 1.0
        self._passed = 0
        self._stepping: list[tuple[Optimizer, list[Any]]] = []  # optimizers inside their step, with the full rates
        self._handles: list[RemovableHandle] = []

    @property
    def factor(self) -> float:
        """What the next step's rate is multiplied with; 1 when nothing is lowered."""
        return self._lowest + (1 - self._lowest) * min(self._passed / self.recover_steps, 1.0)

    def lower(self, scale: float) -> None:
        """Scale the rate of the next step by ``scale``; a rate that has not recovered yet is lowered further."""
        self._lowest = self.factor * scale
        self._passed = 0

    def advance(self) -> None:
        """One optimizer step has passed."""
        if self._lowest < 1:
            self._passed += 1
            if self._passed >= self.recover_steps:
                self.give_back()

    def give_back(self) -> None:
        """Let the next step have the full rate."""
        self._lowest, self._passed = 1.0, 0

    def attach(self, optimizers: Sequence[Optimizer]) -> None:
        """Take part in the steps of ``optimizers``."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def detach(self) -> None:
        """Leave the optimizers as they were."""
        self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, plain values."""
        return {"lowest": self._lowest, "passed": self._passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._lowest, self._passed = state["lowest"], state["passed"]

    def restore(self) -> None:
        """Put back every rate. An error or Ctrl-C leaves a step without the hook after it."""
        while self._stepping:
            optimizer, rates = self._stepping.pop()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(rate, Tensor):
                    group["lr"].copy_(rate)
                else:
                    group["lr"] = rate

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        factor = self.factor
        if factor == 1:
            return
        rates = []
        for group in optimizer.param_groups:
            rate = group["lr"]
            if isinstance(rate, Tensor):  # in place: compiled and captured steps hold on to it
                rates.append(rate.clone())
                rate.mul_(factor)
            else:
                rates.append(rate)
                group["lr"] = rate * factor
        self._stepping.append((optimizer, rates))

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()
