"""Rules that clip and scale gradients by what gradients were like before, in front of any optimizer.

AdaClip and AdaGN are Stable-SPAM's (arXiv 2502.17055); ZClip (2504.02507), AdaGC (2502.11034) and the clipping of SPAM
(2501.06842) are its neighbours. Every rule keeps its averages in fp32 by the parameters' names, and leaves gradients
that are not finite, and its averages of them, alone. A published ZClip or AdaGC that sees one NaN never clips again.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.stable_spam import ada_clip, ada_gn
from lowbit_lightning.optim.gradient_batch import GradientBatch
from lowbit_lightning.optim.sharding import local

# Distinct sets of parameters whose places are remembered: more only where gradients come and go at random.
_REMEMBERED = 16


class Averages:
    """Some fp32 numbers for each of many names, 0 before the first update, kept in one tensor on the device.

    Args:
        width: numbers for each name.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._names: list[str] = []
        self._values = torch.zeros(0, width, dtype=torch.float32)
        self._places: dict[tuple[str, ...], Tensor] = {}

    def read(self, names: Sequence[str], device: torch.device) -> tuple[Tensor, ...]:
        """Return the columns, each (names,) on ``device``."""
        known = set(self._names)
        if new := [name for name in names if name not in known]:
            self._names += new
            self._values = torch.cat([self._values, self._values.new_zeros(len(new), self.width)])
        self._values = self._values.to(device)
        return self._values[self._find(names)].unbind(1)

    def update(self, names: Sequence[str], taken: Tensor, *columns: Tensor) -> None:
        """Keep ``columns`` of names that were read, where ``taken`` (names,) is true."""
        places = self._find(names)
        rows = torch.where(taken[:, None], torch.stack(columns, dim=1), self._values[places])
        self._values = self._values.index_copy(0, places, rows)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the numbers by name."""
        return dict(zip(self._names, self._values.tolist(), strict=True))

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take over what ``state_dict`` returned; all else is forgotten."""
        self._names, self._places = list(state), {}
        self._values = torch.tensor([list(row) for row in state.values()], dtype=torch.float32)
        self._values = self._values.view(len(state), self.width)

    def _find(self, names: Sequence[str]) -> Tensor:
        key = tuple(names)
        if key not in self._places or self._places[key].device != self._values.device:
            if len(self._places) == _REMEMBERED:
                self._places.clear()
            place = {name: index for index, name in enumerate(self._names)}
            self._places[key] = torch.tensor([place[name] for name in names], device=self._values.device)
        return self._places[key]


class GradientRule(ABC):
    """What is done to the gradients of one step.

    Attributes:
        name: how configurations call it.
        width: how many averages it keeps for each name.
    """

    name: ClassVar[str]
    width: ClassVar[int]

    def __init__(self) -> None:
        self.averages = Averages(self.width)

    @abstractmethod
    def apply(self, batch: GradientBatch, optimizer: Optimizer, place: str) -> None:
        """Clip or scale.

        Args:
            batch: all gradients of the step.
            optimizer: whose step it is.
            place: which optimizer it is among those of the run.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return its settings in a few words."""

    def state_dict(self) -> dict[str, list[float]]:
        """Return its averages by name, as plain numbers."""
        return self.averages.state_dict()

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on with what ``state_dict`` returned."""
        self.averages.load_state_dict(state)


class AdaClip(GradientRule):
    """Scale down elements above an average of their tensor's largest magnitudes.

    Args:
        gamma: decay of that average, in [0, 1).
    """

    name, width = "ada_clip", 2

    def __init__(self, gamma: float = 0.999) -> None:
        super().__init__()
        self.gamma = _decay("ada_clip.gamma", gamma)

    def apply(self, batch: GradientBatch, optimizer: Optimizer, place: str) -> None:
        """Clip."""
        count, average = self.averages.read(batch.names, batch.maxima.device)
        average, limits = ada_clip(average, count + 1, batch.maxima, self.gamma)
        self.averages.update(batch.names, batch.usable, count + 1, average)
        batch.clip(limits)

    def describe(self) -> str:
        """Return the decay."""
        return f"γ {self.gamma:g}"


class AdaGN(GradientRule):
    """Divide every tensor's gradient by its norm and multiply it by a smoothed one, which is about 1.

    Args:
        gamma1: decay of the average of norms, in [0, 1).
        gamma2: decay of the average of squared norms, in [0, 1).
        eps: added to the root of the latter.
    """

    name, width = "ada_gn", 3

    def __init__(self, gamma1: float = 0.7, gamma2: float = 0.9, eps: float = 1e-8) -> None:
        super().__init__()
        self.gamma1, self.gamma2 = _decay("ada_gn.gamma1", gamma1), _decay("ada_gn.gamma2", gamma2)
        self.eps = _number("ada_gn.eps", eps, eps >= 0, "a number >= 0")

    def apply(self, batch: GradientBatch, optimizer: Optimizer, place: str) -> None:
        """Scale."""
        count, mean, square = self.averages.read(batch.names, batch.norms.device)
        decays = self.gamma1, self.gamma2
        mean, square, factors = ada_gn(mean, square, count + 1, batch.norms, *decays, self.eps)
        self.averages.update(batch.names, batch.usable, count + 1, mean, square)
        batch.scale(factors)

    def describe(self) -> str:
        """Return the decays."""
        return f"γ {self.gamma1:g}/{self.gamma2:g}"


class ZClip(GradientRule):
    """Scale all gradients down together where their global norm is out of line with the steps before.

    Args:
        alpha: decay of the averages of the norm and of its variance, in [0, 1).
        z_threshold: standard deviations above the average from which on a norm is clipped; the further above, the
            closer to the average.
        warmup_steps: steps from whose norms the averages start; in them only ``max_norm`` clips.
        max_norm: what the global norm never exceeds; null for no such limit.
    """

    name, width = "zclip", 3

    def __init__(
        self, alpha: float = 0.97, z_threshold: float = 2.5, warmup_steps: int = 25, max_norm: float | None = 1.0
    ) -> None:
        super().__init__()
        self.alpha = _decay("zclip.alpha", alpha)
        self.z_threshold = _number("zclip.z_threshold", z_threshold, z_threshold > 0, "a number > 0")
        self.warmup_steps = _number("zclip.warmup_steps", warmup_steps, warmup_steps >= 1, "an integer >= 1")
        self.max_norm = _number("zclip.max_norm", max_norm, max_norm is None or max_norm > 0, "a number > 0, or null")

    def apply(self, batch: GradientBatch, optimizer: Optimizer, place: str) -> None:
        """Scale by one factor."""
        total = global_norm(batch)[None]
        names = [f"optimizer {place}"]
        count, mean, variance = self.averages.read(names, total.device)
        std = variance.sqrt()
        z = (total - mean) / (std + 1e-6)
        is_spike = (count >= self.warmup_steps) & (z > self.z_threshold)
        calmed = mean + self.z_threshold * std / (z / self.z_threshold)
        limit = torch.where(is_spike, calmed, math.inf).clamp_max(self.max_norm or math.inf)
        is_clipped = total > limit
        self._take(batch, names, torch.where(is_spike, calmed, total))
        batch.scale(torch.where(is_clipped, limit / total, 1.0).expand_as(batch.norms))
        batch.clipped = batch.clipped | (is_clipped & batch.usable)

    def _take(self, batch: GradientBatch, names: list[str], norm: Tensor) -> None:
        count, mean, variance = self.averages.read(names, norm.device)
        # In the warm-up every norm counts the same; after it, the variance is about the new average, as published.
        warm_mean = mean + (norm - mean) / (count + 1)
        warm_variance = variance + ((norm - mean) * (norm - warm_mean) - variance) / (count + 1)
        later_mean = self.alpha * mean + (1 - self.alpha) * norm
        later_variance = self.alpha * variance + (1 - self.alpha) * (norm - later_mean).square()
        is_warm = count < self.warmup_steps
        mean, variance = (
            torch.where(is_warm, warm_mean, later_mean),
            torch.where(is_warm, warm_variance, later_variance),
        )
        self.averages.update(names, batch.usable.all()[None], count + 1, mean, variance)

    def describe(self) -> str:
        """Return the threshold."""
        return f"z > {self.z_threshold:g}" + (f", norm <= {self.max_norm:g}" if self.max_norm else "")


class AdaGC(GradientRule):
    """Scale a tensor's gradient down where its norm exceeds an average of its clipped norms.

    Args:
        relative: how many times the average a norm may be.
        beta: decay of the average, in [0, 1).
        absolute: what the global norm is clipped to in the warm-up.
        warmup_steps: steps in which the average is the smallest norm so far, clipped by ``absolute``.
    """

    name, width = "ada_gc", 2

    def __init__(
        self, relative: float = 1.05, beta: float = 0.98, absolute: float = 1.0, warmup_steps: int = 100
    ) -> None:
        super().__init__()
        self.relative = _number("ada_gc.relative", relative, relative > 0, "a number > 0")
        self.beta = _decay("ada_gc.beta", beta)
        self.absolute = _number("ada_gc.absolute", absolute, absolute > 0, "a number > 0")
        self.warmup_steps = _number("ada_gc.warmup_steps", warmup_steps, warmup_steps >= 1, "an integer >= 1")

    def apply(self, batch: GradientBatch, optimizer: Optimizer, place: str) -> None:
        """Scale."""
        count, average = self.averages.read(batch.names, batch.norms.device)
        norms, total = batch.norms, global_norm(batch)
        is_warm = count < self.warmup_steps
        together = torch.where(total > self.absolute, self.absolute / total, 1.0)
        limits = self.relative * average
        factors = torch.where(is_warm, together, torch.where(norms > limits, limits / norms, 1.0))
        clipped = norms * factors
        warm_average = torch.where(count > 0, torch.minimum(average, clipped), clipped)
        average = torch.where(is_warm, warm_average, self.beta * average + (1 - self.beta) * clipped)
        # A tensor without a gradient for now says nothing of how large its gradients are.
        self.averages.update(batch.names, batch.usable & (norms > 0), count + 1, average)
        batch.scale(factors)
        batch.clipped = batch.clipped | ((factors < 1) & batch.usable)

    def describe(self) -> str:
        """Return how far above the average a norm may be."""
        return f"norm <= {self.relative:g} × average"


class SpamClip(GradientRule):
    """Clip elements whose square exceeds a multiple of the optimizer's second moment of them.

    Args:
        threshold: that multiple.
        warmup_steps: steps of a tensor, counted by the optimizer from its last momentum reset, in which it is left
            alone, because its second moment is not one yet.
    """

    name, width = "spam_clip", 0

    def __init__(self, threshold: float = 5000.0, warmup_steps: int = 20) -> None:
        super().__init__()
        self.threshold = _number("spam_clip.threshold", threshold, threshold > 0, "a number > 0")
        self.warmup_steps = _number("spam_clip.warmup_steps", warmup_steps, warmup_steps >= 0, "an integer >= 0")

    def apply(self, batch: GradientBatch, optimizer: Optimizer, place: str) -> None:
        """Clip every element by itself."""
        batch.write()
        clipped = []
        for param, grad, usable in zip(batch.params, batch.grads, batch.usable, strict=True):
            state = optimizer.state.get(param) or {}
            moment = _second_moment(optimizer, param) if state else None
            if moment is None:
                clipped.append(torch.zeros_like(usable))
                continue
            limits = (self.threshold * local(moment).float()).sqrt()
            is_due = usable.to(grad.device) & (torch.as_tensor(state["step"]).to(grad.device) >= self.warmup_steps)
            # Where the moment is 0 nothing was seen yet: such an element would stay 0 for ever.
            is_spike = (grad.abs() > limits) & (limits > 0) & is_due
            grad.copy_(torch.where(is_spike, grad.sign() * limits, grad))
            clipped.append(is_spike.any().to(usable.device))
        batch.clipped = batch.clipped | torch.stack(clipped)
        batch.measure()

    def describe(self) -> str:
        """Return the threshold."""
        return f"g² <= {self.threshold:g} v"


#: By the names that configurations use.
RULES: dict[str, type[GradientRule]] = {rule.name: rule for rule in (AdaClip, AdaGN, ZClip, AdaGC, SpamClip)}


def global_norm(batch: GradientBatch) -> Tensor:
    """Return the norm (0-d) of all gradients that are usable together."""
    norm: Tensor = torch.linalg.vector_norm(torch.where(batch.usable, batch.norms, 0.0))
    return norm


def _second_moment(optimizer: Any, param: Tensor) -> Tensor:
    state: dict[str, Any] = optimizer.state[param]
    quantized = hasattr(optimizer, "dequantized_state")
    moment = optimizer.dequantized_state(param)["exp_avg_sq"] if quantized else state.get("exp_avg_sq")
    if not isinstance(moment, Tensor) or "step" not in state:
        raise InvalidArgumentError(
            f"rules hold spam_clip, which compares gradients with Adam's second moment; {type(optimizer).__name__} "
            "keeps none: use ada_clip"
        )
    return moment


def _decay(name: str, value: float) -> float:
    return _number(name, value, 0 <= value < 1, "a number in [0, 1)")  # type: ignore[no-any-return]


def _number(name: str, value: Any, holds: bool, allowed: str) -> Any:
    if not holds:
        raise InvalidArgumentError(f"rules: {name}={value!r} is out of range: {allowed}")
    return value
