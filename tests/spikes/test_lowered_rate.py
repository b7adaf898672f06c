"""The lowered learning rate is seen by the step alone: schedulers, which compute from it, only ever see their own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR

from lowbit_lightning.spikes.lowered_rate import LoweredRate

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 10),
    "chained": lambda optimizer: ChainedScheduler([ExponentialLR(optimizer, 0.9), CosineAnnealingLR(optimizer, 10)]),
    "one-cycle": lambda optimizer: OneCycleLR(optimizer, 1.0, total_steps=20),
}


def rates(lower_at: int | None, scheduler: str, lr: Any, recover_steps: int = 4) -> tuple[list[float], list[float]]:
    """What the steps of SGD with a gradient of one used, and what was left in the group between them."""
    param = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [param]}], lr=lr)
    schedule = SCHEDULERS[scheduler](optimizer)
    lowered = LoweredRate(recover_steps)
    lowered.attach([optimizer])
    used, kept = [], []
    for step in range(8):
        if step == lower_at:
            lowered.lower(0.5)
        param.grad = torch.ones(1)
        with torch.no_grad():
            param.zero_()
        optimizer.step()
        lowered.advance()
        used.append(-param.item())
        schedule.step()
        kept.append(float(optimizer.param_groups[0]["lr"]))
    return used, kept


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_never_sees_the_lowered_rate(scheduler: str, tensor: bool) -> None:
    lr: Any = torch.tensor(1.0) if tensor else 1.0
    usual, kept = rates(None, scheduler, lr.clone() if tensor else lr)
    lowered, kept_when_lowered = rates(2, scheduler, lr)
    assert kept_when_lowered == kept
    factors = [0.5 + 0.5 * passed / 4 for passed in range(4)]
    assert lowered == pytest.approx(
        [*usual[:2], *(f * r for f, r in zip(factors, usual[2:6], strict=True)), *usual[6:]]
    )


def test_lowering_again_goes_further_down() -> None:
    lowered = LoweredRate(10)
    lowered.lower(0.5)
    for _ in range(5):
        lowered.advance()
    assert lowered.factor == 0.75
    lowered.lower(0.5)
    assert lowered.factor == 0.375


def test_recovery_goes_on_after_a_resume() -> None:
    lowered, resumed = LoweredRate(10), LoweredRate(10)
    lowered.lower(0.5)
    lowered.advance()
    resumed.load_state_dict(lowered.state_dict())
    assert resumed.factor == lowered.factor == 0.55


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_step_that_fails_does_not_leave_the_rate_lowered(lr: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    lowered = LoweredRate(10)
    lowered.attach([optimizer])
    lowered.lower(0.5)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(_interrupted)
    assert optimizer.param_groups[0]["lr"] == 0.5
    lowered.detach()
    assert optimizer.param_groups[0]["lr"] == 1


def _interrupted() -> Any:
    raise KeyboardInterrupt
