"""What zeroth-order optimizers share: perturbing weights, collecting losses, and the one pass that moves the weights.

A step is made in two halves, which a bare loop's ``step(closure)`` and
:class:`~lowbit_lightning.strategies.ForwardOnlyStrategy` share: :meth:`ForwardOnlyOptimizer.accumulate` takes the
losses of the passes that :meth:`ForwardOnlyOptimizer.evaluations` lists, ``step()`` moves the weights. Signs are
functions of (seed, parameter, step), so there is no state but a few numbers in ``param_groups``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.kernels.rademacher import Noise, Update, apply_updates, perturbed_copy
from lowbit_lightning.optim.base import LowBitOptimizer, ParamGroup, State
from lowbit_lightning.optim.random_state import RandomState

_stream = cache(stream_id)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One forward pass of a step, at the weights ``θ + sign · ε · u_index``; at θ itself where ``sign`` is 0."""

    index: int
    sign: int


class ForwardOnlyOptimizer(LowBitOptimizer):
    """Base of FZOO and MeZO, which say what is evaluated, and what is made of the losses.

    Counters live in the first parameter group: ``step``, ``nonfinite_skips`` (steps without an update because of a
    loss that is not finite), ``flat_skips`` (because losses did not differ), and what is collected for the next step.
    """

    #: Settings that are the same in all groups: two that differ in one of these would not be one perturbation.
    shared_settings: tuple[str, ...] = ("eps", "seed")

    _requested_skip = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        clock = {"step": 0, "nonfinite_skips": 0, "flat_skips": 0}
        pending: dict[str, Any] = {"pending_losses": [], "pending_params": [], "previous_losses": []}
        for key, value in (clock | pending).items():
            self.param_groups[0].setdefault(key, value)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group, its settings checked; all but ``lr`` and ``weight_decay`` must be those of the first."""
        super().add_param_group(param_group)
        group, first = self.param_groups[-1], self.param_groups[0]
        if "betas" in group and group["eps"] != self.defaults["eps"]:
            raise InvalidArgumentError(
                f"eps={group['eps']!r} comes with an Adam's parameter groups, where it means something else: name "
                f"eps among the settings of {type(self).__name__}"
            )
        self.check_settings(group)
        for key in self.shared_settings:
            if group[key] != first[key]:
                raise InvalidArgumentError(
                    f"{key}={group[key]!r} of parameter group {len(self.param_groups) - 1} differs from the first "
                    f"group's {first[key]!r}: only lr and weight_decay may differ between groups"
                )

    def check_settings(self, group: ParamGroup) -> None:
        """Check a group's settings.

        Raises:
            InvalidArgumentError: one is outside its range.
        """
        require(group, "lr", float(group["lr"]) >= 0, "a number >= 0")
        require(group, "eps", 0 < group["eps"] < math.inf, "a number > 0")
        require(group, "weight_decay", group["weight_decay"] >= 0, "a number >= 0")
        if any(param.is_complex() for param in group["params"]):
            raise InvalidArgumentError("params: forward-only optimizers take real parameters; use view_as_real")

    @property
    def perturbation(self) -> str:
        """Which signs matrices get: ``"rademacher"`` or ``"rank1"``."""
        return "rademacher"

    @property
    def execution(self) -> str:
        """How a strategy makes the passes: ``"sequential"``, ``"batched"`` or ``"auto"``."""
        return "sequential"

    def new_state(self, group: ParamGroup, name: str, param: Tensor, device: torch.device) -> State:
        """Return the state, which is empty."""
        return {}

    # ---- the first half: losses -------------------------------------------------------------------------------------

    def evaluations(self) -> list[Evaluation]:
        """Return the forward passes that the present step consists of, in order; the first one's loss is reported."""
        raise NotImplementedError

    def trainable(self) -> Iterator[tuple[ParamGroup, str, Tensor]]:
        """Yield (group, name, parameter) of what is perturbed and moved: all that requires a gradient."""
        return (entry for entry in self.named_params() if entry[2].requires_grad and entry[2].numel())

    def noise(self, group: ParamGroup, name: str, param: Tensor) -> Noise:
        """Return where the parameter's random bits of the present step come from."""
        return Noise(
            group["seed"],
            _stream(name, "sign"),
            _stream(name, "weight"),
            self.param_groups[0]["step"],
            self.perturbation == "rank1" and param.ndim > 1,
            group["bf16_stochastic_rounding"],
        )

    @torch.no_grad()
    def perturb(self, group: ParamGroup, name: str, param: Tensor, evaluation: Evaluation, out: Tensor) -> Tensor:
        """Write the parameter as ``evaluation`` wants it to ``out``, of its shape, dtype and strides; return it."""
        eps = evaluation.sign * group["eps"]
        return perturbed_copy(param, eps, self.noise(group, name, param), evaluation.index, out)

    def accumulate(self, losses: Sequence[float], params: Iterable[Tensor] | None = None) -> None:
        """Add the losses of one (micro-)batch to those of the present step.

        Args:
            losses: one for each of :meth:`evaluations`, already divided by the number of micro-batches.
            params: the parameters that took part in them, None for all. Others get no update: moving what the losses
                do not depend on would be noise.
        """
        clock = self.param_groups[0]
        used = None if params is None else {id(param) for param in params}
        positions = {i for i, (_, _, param) in enumerate(self.named_params()) if used is None or id(param) in used}
        so_far = clock["pending_losses"] or [0.0] * len(losses)
        clock["pending_losses"] = [float(a + b) for a, b in zip(so_far, losses, strict=True)]
        clock["pending_params"] = sorted(positions | set(clock["pending_params"]))

    @property
    def is_ready(self) -> bool:
        """Whether losses have been collected for a step."""
        return bool(self.param_groups[0]["pending_losses"])

    def gradient_norm(self) -> float:
        """Return an estimate of the gradient's norm from the losses collected so far."""
        raise NotImplementedError

    def skip_next_update(self) -> None:
        """Let the next ``step()`` drop its losses and leave the weights alone.

        For guards: with no gradient there is none to set to None. Call it from ``on_before_optimizer_step``, on every
        rank alike.
        """
        self._requested_skip = True

    # ---- the second half: the update --------------------------------------------------------------------------------

    def coefficients(self, losses: Sequence[float]) -> list[float]:
        """Return the factor of ``lr · uᵢ`` for each perturbation of this step; all 0 for no update."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: returns the loss of one batch at the present weights and computes no gradient. It is called once
                for each of :meth:`evaluations`, with the generators put back, while one more copy of the trainable
                weights exists. Without it, the losses given to :meth:`accumulate` are used.

        Returns:
            What the first call of ``closure`` returned.

        Raises:
            InvalidArgumentError: there is neither a closure nor a loss, nothing is trainable, the loss is no scalar,
                or the closure called ``backward``.
        """
        result = self._evaluate(closure) if closure is not None else None
        if not self.is_ready:
            raise InvalidArgumentError(
                f"{type(self).__name__}.step() needs a closure that returns the loss: step(lambda: loss_of(batch))"
            )
        clock = self.param_groups[0]
        losses, positions = clock["pending_losses"], set(clock["pending_params"])
        if not self._requested_skip:
            if not all(map(math.isfinite, losses)):
                clock["nonfinite_skips"] += 1
            elif not any(coefficients := self.coefficients(losses)):
                clock["flat_skips"] += 1
            else:
                self._move(coefficients, positions)
        clock["pending_losses"], clock["pending_params"], self._requested_skip = [], [], False
        clock["step"] += 1
        return result

    def _move(self, coefficients: Sequence[float], positions: set[int]) -> None:
        updates = []
        for position, (group, name, param) in enumerate(self.named_params()):
            if position not in positions or not param.requires_grad or not param.numel():
                continue
            lr = float(group["lr"])
            sizes = tuple(lr * coefficient for coefficient in coefficients)
            updates.append(Update(param, self.noise(group, name, param), sizes, 1 - lr * group["weight_decay"]))
        apply_updates(updates)

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        entries = list(self.trainable())
        if not entries:
            raise InvalidArgumentError(
                f"{type(self).__name__} has no trainable parameter: there is nothing to optimize"
            )
        scratch = [torch.empty_like(param) for _, _, param in entries]
        before = RandomState({param.device for _, _, param in entries})
        results, losses = [], []
        for evaluation in self.evaluations():
            before.restore()
            with self._perturbed(entries, evaluation, scratch):
                results.append(closure())
            losses.append(scalar_loss(results[-1]))
            self._check_no_gradient(entries)
        self.accumulate(torch.stack(losses).tolist())
        return results[0]

    @contextmanager
    def _perturbed(
        self, entries: Sequence[tuple[ParamGroup, str, Tensor]], evaluation: Evaluation, scratch: Sequence[Tensor]
    ) -> Iterator[None]:
        """Point the parameters at perturbed copies: restoring weights by arithmetic would drift."""
        originals = [param.data for _, _, param in entries]
        try:
            if evaluation.sign:
                for (group, name, param), out in zip(entries, scratch, strict=True):
                    param.data = self.perturb(group, name, param, evaluation, out)
            yield
        finally:
            for (_, _, param), original in zip(entries, originals, strict=True):
                param.data = original

    def _check_no_gradient(self, entries: Sequence[tuple[ParamGroup, str, Tensor]]) -> None:
        for _, name, param in entries:
            if param.grad is not None:
                raise InvalidArgumentError(
                    f"parameter {name!r} has a gradient, {type(self).__name__} takes none: with a Trainer set "
                    "strategy to lowbit_lightning.strategies.ForwardOnlyStrategy (several devices: "
                    "ForwardOnlyDDPStrategy), in a loop of your own drop backward() and call zero_grad() once"
                )

    def _describe(self, detail: str) -> list[tuple[str, str, str]]:
        params = [param for _, _, param in self.trainable()]
        active = f"{len(params)} tensors, {sum(param.numel() for param in params):,} parameters"
        return [(type(self).__name__, active, f"{detail}, {len(self.evaluations())} forward passes a step")]


def scalar_loss(result: Any) -> Tensor:
    """Return a step's loss, 0-d fp32, from what a training step or a closure returned.

    Raises:
        InvalidArgumentError: it is not a tensor of one element.
    """
    loss = result["loss"] if isinstance(result, dict) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"has shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"is {loss!r}"
        raise InvalidArgumentError(f"the loss {found}: forward-only training needs a tensor of one element")
    return loss.detach().reshape(()).float()


def require(group: ParamGroup, name: str, holds: bool, allowed: str) -> None:
    """Raise InvalidArgumentError, with the setting's name, value and range, unless it holds."""
    if not holds:
        raise InvalidArgumentError(f"{name}={group[name]!r} is out of range: {allowed}")
