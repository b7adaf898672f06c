"""Linear warm-up followed by a cosine, the schedule of all recipes here, named in YAML without a line of code."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowbit_lightning.errors import InvalidArgumentError


class WarmupCosine(LambdaLR):
    """Raise the learning rate linearly over ``warmup_steps``, then let it fall along a half cosine.

    Args:
        optimizer: whose groups' ``lr`` is scaled.
        warmup_steps: optimizer steps until the full learning rate is reached; a shorter run ends before.
        total_steps: length of the schedule in optimizer steps; the rate stays at its minimum afterwards. Null takes
            the length of the run, which ``lowbit-lightning fit`` fills in.
        min_lr_ratio: the last learning rate over the full one.

    Raises:
        InvalidArgumentError: the lengths are negative or ``total_steps`` is unknown.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, total_steps: int | None = None, min_lr_ratio: float = 0.1
    ) -> None:
        if total_steps is None:
            raise InvalidArgumentError(
                "total_steps=None: the length of the run is known to `lowbit-lightning fit` only; "
                "elsewhere give the number of optimizer steps"
            )
        if warmup_steps < 0:
            raise InvalidArgumentError(f"warmup_steps={warmup_steps} is out of range: an integer >= 0")
        if not 0 <= min_lr_ratio <= 1:
            raise InvalidArgumentError(f"min_lr_ratio={min_lr_ratio} is out of range: a number in [0, 1]")
        factor = partial(warmup_cosine, warmup_steps=warmup_steps, total_steps=total_steps, min_lr_ratio=min_lr_ratio)
        super().__init__(optimizer, factor)


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, min_lr_ratio: float) -> float:
    """Return the factor on the learning rate at optimizer step ``step``, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
