"""What ``tune`` tries: six values of eps on the same batches, then successive halving of eight learning rates.

σ/ε estimates the norm of the gradient, whatever ε is: where ε is too small, the rounding of the losses raises it, where
ε is too large, curvature changes it. Between lies a flat region, and its middle is taken. All values see the same
batches under the same signs, so that within the region they agree to a few per cent after a handful of batches.

Learning rates are compared by the losses of the second half of their steps, against those of the start weights on the
same batches: what is common to all of them, the batch above all, cancels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, stdev

from lowbit_lightning.errors import InvalidArgumentError

#: Times the configured eps and lr: half decades, which is how well either can be known.
EPS_FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LR_FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
#: Survivors of each rung train for twice as many steps as the rung before, so every rung costs the same.
RUNGS = (8, 4, 2)
#: Neighbours differ by no more than this in the flat region, in the natural logarithm of σ/ε.
FLAT = 0.1
_EPS_SHARE, _EPS_BATCHES = 0.2, 8  # of the budget, and at most
_LEAST_STEPS = 2  # of the first rung


@dataclass(frozen=True)
class Plan:
    """What a budget is spent on.

    Attributes:
        eps_batches: batches on which each eps is measured.
        steps: that a learning rate has made at the end of each rung.
        forwards: forward passes that all of it takes, at the most.
    """

    eps_batches: int
    steps: tuple[int, ...]
    forwards: int

    @property
    def window(self) -> list[range]:
        """The steps by which learning rates are compared at the end of each rung."""
        return [range(steps // 2, steps) for steps in self.steps]


def make_plan(forwards: int, passes: int, micro_batches: int = 1) -> Plan:
    """Return the plan for a budget.

    Args:
        forwards: forward passes there are.
        passes: forward passes of one step, all micro-batches together.
        micro_batches: of one step.

    Raises:
        InvalidArgumentError: the budget is too small.
    """
    eps_batches = min(_EPS_BATCHES, max(1, int(_EPS_SHARE * forwards) // (len(EPS_FACTORS) * passes)))
    for batches in (eps_batches, 1):
        fixed = len(EPS_FACTORS) * passes * batches
        a_step = passes * sum(count << rung for rung, count in enumerate(RUNGS)) + micro_batches * (2 ** len(RUNGS) - 1)
        first = (forwards - fixed) // a_step
        if first >= _LEAST_STEPS:
            steps = tuple(first * (2 ** (rung + 1) - 1) for rung in range(len(RUNGS)))
            return Plan(batches, steps, fixed + first * a_step)
    raise InvalidArgumentError(
        f"tune: --forwards {forwards} is too few: a step takes {passes} forward passes here, so at least "
        f"{fixed + _LEAST_STEPS * a_step} are needed"
    )


def around(value: float, factors: Sequence[float]) -> list[float]:
    """Return ``value`` times each factor, rounded to four digits: it will be read by people."""
    return [float(f"{value * factor:.4g}") for factor in factors]


@dataclass
class EpsTrial:
    """One eps: σ/ε of each batch, and how far its logarithm is from the next larger eps's (median)."""

    eps: float
    norms: list[float] = field(default_factory=list)
    change: float = math.inf
    is_flat: bool = False


def choose_eps(trials: Sequence[EpsTrial]) -> EpsTrial:
    """Return the trial in the middle of the longest flat region; marks all of the region.

    Without a flat region the end of the smallest change, which is then not marked.

    Args:
        trials: in ascending order of eps, each with the norms of the same batches.

    Raises:
        InvalidArgumentError: no two neighbours have losses that differ and are finite.
    """
    for trial, larger in pairwise(trials):
        pairs = zip(trial.norms, larger.norms, strict=True)
        trial.change = median(_distance(*pair) for pair in pairs)
    best: Sequence[EpsTrial] = ()
    region = [trials[0]]
    for trial, larger in pairwise(trials):
        region = [*region, larger] if trial.change <= FLAT else [larger]
        if len(region) > max(1, len(best)):
            best = region
    for trial in best:
        trial.is_flat = True
    if best:
        return best[len(best) // 2]
    steadiest, larger = min(pairwise(trials), key=lambda pair: pair[0].change)
    if math.isinf(steadiest.change):
        raise InvalidArgumentError(
            f"tune: at no eps from {trials[0].eps:g} to {trials[-1].eps:g} the losses are finite and differ: look at "
            "the loss of the start weights, or start from another eps"
        )
    return larger


def _distance(one: float, other: float) -> float:
    is_known = 0 < one < math.inf and 0 < other < math.inf
    return abs(math.log(other / one)) if is_known else math.inf


# On the same batches and signs even a step of 1e-8 lowers the loss measurably; less than this share of it is no reason.
LEAST_GAIN = 1e-4


@dataclass
class LrTrial:
    """One learning rate: its losses so far, how much they are above those of the start weights, and the standard error.

    The error is that of a mean over batches, so it says nothing about the luck of the signs.
    """

    lr: float
    losses: list[float] = field(default_factory=list)
    change: float = math.nan
    error: float = math.inf
    least: float = 0.0

    def compare(self, start_losses: Sequence[float]) -> None:
        """Compare the last losses with those of the start weights on the same batches."""
        pairs = zip(self.losses[-len(start_losses) :], start_losses, strict=True)
        differences = [math.inf] if self.diverged else [loss - start for loss, start in pairs]
        self.change = fmean(differences)
        self.error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
        self.least = LEAST_GAIN * abs(fmean(start_losses))

    @property
    def is_better(self) -> bool:
        """Whether the loss is lower than at the start by more than twice the error, and by enough to matter."""
        return self.change < -max(2 * self.error, self.least)

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite."""
        return not all(map(math.isfinite, self.losses))


def halve(
    trials: Sequence[LrTrial], plan: Plan, train: Callable[[LrTrial, int], None], start_loss: Callable[[int], float]
) -> LrTrial:
    """Return the best learning rate.

    Args:
        trials: as many as the first rung takes.
        plan: how far to train.
        train: makes the steps of a trial up to a number, and adds their losses to it.
        start_loss: the loss of a step's batch at the start weights.
    """
    left = list(trials)
    for count, steps, window in zip(RUNGS, plan.steps, plan.window, strict=True):
        left = left[:count]
        reference = [start_loss(step) for step in window]
        for trial in left:
            train(trial, steps)
            trial.compare(reference)
        left.sort(key=lambda trial: trial.change)
    # Of all: what looked best in a few steps may have turned bad since, and less was better.
    return min(trials, key=lambda trial: trial.change)
