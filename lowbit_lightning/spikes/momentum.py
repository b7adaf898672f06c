"""Forget what an optimizer has averaged, so that the gradients of a bad stretch no longer steer the next steps.

The step counters go back to zero with the moments. With zero moments and an old counter Adam's bias correction is
already spent, and its first step is (1 - beta1) / sqrt(1 - beta2) times too long: 3.2 times at the usual betas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.optim.base import LowBitOptimizer

#: What torch's own optimizers, bitsandbytes' and torchao's call their averages, and what an average is before the first
#: step. A float stands for itself, a name for the group's setting.
_BEFORE_THE_FIRST_STEP: dict[str, float | str] = {
    "step": 0.0,
    "exp_avg": 0.0,
    "exp_avg_sq": 0.0,
    "max_exp_avg_sq": 0.0,
    "exp_inf": 0.0,
    "momentum_buffer": 0.0,
    "square_avg": 0.0,
    "grad_avg": 0.0,
    "acc_delta": 0.0,
    "row_var": 0.0,
    "col_var": 0.0,
    "variance": 0.0,
    "mu_product": 1.0,  # NAdam's running product of its betas
    "sum": "initial_accumulator_value",  # Adagrad's
    "state1": 0.0,
    "state2": 0.0,
    "absmax1": 0.0,
    "absmax2": 0.0,
}


@torch.no_grad()
def reset_momentum(optimizer: Optimizer) -> bool:
    """Bring the averages of ``optimizer`` back to what they are before the first step, in place.

    An optimizer may offer ``reset_momentum()`` of its own. One of this project without it gets its empty state again,
    quantized codes included; of any other, the entries of its state that are known by name are reset.

    Returns:
        Whether there was anything to forget; plain SGD has no averages.
    """
    if hasattr(optimizer, "reset_momentum"):
        optimizer.reset_momentum()
        return True
    if isinstance(optimizer, LowBitOptimizer):
        return _reset_low_bit(optimizer)
    forgotten = False
    for group in optimizer.param_groups:
        for param in group["params"]:
            state: dict[str, Any] = optimizer.state.get(param, {})
            for key in state.keys() & _BEFORE_THE_FIRST_STEP.keys():
                if state[key] is not None:
                    state[key] = _reset(state[key], _first_value(key, group))
                    forgotten = forgotten or key != "step"
    return forgotten


def _reset_low_bit(optimizer: LowBitOptimizer) -> bool:
    forgotten = False
    for group, name, param in optimizer.named_params():
        state = optimizer.state.get(param)
        if state:
            for key, empty in optimizer.new_state(group, name, param, param.device).items():
                state[key].copy_(empty)
            forgotten = True
    return forgotten


def _first_value(key: str, group: Mapping[str, Any]) -> float:
    value = _BEFORE_THE_FIRST_STEP[key]
    return float(group.get(value, 0.0)) if isinstance(value, str) else value


def _reset(value: Any, first: float) -> Any:
    if not isinstance(value, Tensor):
        return type(value)(first)
    if type(value).__name__.startswith("OptimState"):  # torchao's: codes and scales, which are zeros in a new one
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            if name != "qmap":
                getattr(value, name).zero_()
        return value
    return value.fill_(first)
