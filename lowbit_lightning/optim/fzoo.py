"""FZOO and MeZO: optimizers that need the loss at a few weights near the present ones, and no gradient.

FZOO (arXiv 2506.09034) compares one batch's loss at θ with its losses at θ + ε uᵢ, signs uᵢ ∈ {±1}^d, and steps by

    σ = std(l₁ … l_N)      cᵢ = (lᵢ - l₀) / (N σ)      θ ← θ - lr Σ cᵢ uᵢ

which is the authors' code: to first order E[Δθ] = -lr ∇L/‖∇L‖, so ``lr`` is the length of a normalized-SGD step and ε
only the width of a finite difference. The paper writes η g/σ with g carrying 1/ε: η = lr · ε, up to √(N/(N-1)).
MeZO (arXiv 2305.17333) is θ ← θ - lr (l₊ - l₋)/(2ε) u, here with signs in place of Gaussians, as SPSA has it.

Differences from the authors' code: schedulers and weight decay act, losses that are not finite or do not differ change
nothing, FZOO-R exists, 16-bit weights take updates below their resolution, and signs are functions of (seed,
parameter, step): there is no state but a few numbers in ``param_groups``. A step is made in two halves, which a bare
loop's ``step(closure)`` and :class:`~lowbit_lightning.strategies.ForwardOnlyStrategy` share: :meth:`accumulate` takes
the losses of the passes that :meth:`evaluations` lists, ``step()`` moves the weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.philox import stream_id
from lowbit_lightning.kernels.rademacher import Noise, Update, apply_updates, perturbed_copy
from lowbit_lightning.optim.base import LowBitOptimizer, ParamGroup, State
from lowbit_lightning.optim.random_state import RandomState

# Losses are fp32: where they differ by less than this share of themselves, they differ by rounding alone.
_FLAT = 2.0**-24
# One clock for the whole optimizer; two groups that differ in one of these would not be one perturbation.
_SHARED = ("eps", "num_perturbations", "perturbation", "execution", "baseline", "reuse_losses", "seed")

_stream = cache(stream_id)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One forward pass of a step, at the weights ``θ + sign · ε · u_index``; at θ itself where ``sign`` is 0."""

    index: int
    sign: int


def normalized_coefficients(
    clean: float | None, perturbed: Sequence[float], previous: Sequence[float] = ()
) -> tuple[list[float], float]:
    """Return FZOO's coefficients cᵢ of the perturbations, and σ.

    Args:
        clean: l₀, or None to use the mean of ``perturbed`` in its place.
        perturbed: l₁ … l_N of this step.
        previous: the last step's losses, which make σ steadier without a forward pass (FZOO-R). Each step's losses
            are centred on their own mean, because its batch is another one.

    Returns:
        The coefficients, all 0 where σ is 0, not finite, or below the resolution of the losses; and σ, the population
        standard deviation. A single loss has none: σ is then its distance from ``clean``, so that c is ±1.
    """
    mean = math.fsum(perturbed) / len(perturbed)
    center = mean if clean is None else clean
    if len(perturbed) == 1 and not previous:
        sigma = abs(perturbed[0] - center)
    else:
        own, other = (_squared_deviations(losses) for losses in (perturbed, previous))
        sigma = math.sqrt((own + other) / (len(perturbed) + len(previous)))
    if not (math.isfinite(sigma) and math.isfinite(center) and sigma > _FLAT * abs(mean)):
        return [0.0] * len(perturbed), sigma
    return [(loss - center) / (len(perturbed) * sigma) for loss in perturbed], sigma


def _squared_deviations(losses: Sequence[float]) -> float:
    if not losses:
        return 0.0
    mean = math.fsum(losses) / len(losses)
    return math.fsum((loss - mean) ** 2 for loss in losses)


class ForwardOnlyOptimizer(LowBitOptimizer):
    """What FZOO and MeZO share: perturbing, collecting losses, and the one pass that moves the weights.

    Counters live in the first parameter group: ``step``, ``nonfinite_skips`` (steps without an update because of a
    loss that is not finite), ``flat_skips`` (because losses did not differ), and what is collected for the next step.
    """

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
        _check_settings(group)
        for key in _SHARED:
            if group[key] != first[key]:
                raise InvalidArgumentError(
                    f"{key}={group[key]!r} of parameter group {len(self.param_groups) - 1} differs from the first "
                    f"group's {first[key]!r}: only lr and weight_decay may differ between groups"
                )

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
            group["perturbation"] == "rank1" and param.ndim > 1,
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


class FZOO(ForwardOnlyOptimizer):
    """Fast zeroth-order optimization: fine-tune at inference memory, with forward passes only.

    For fine-tuning pretrained weights, on the paper's tasks with a few thousand steps; it does not train from scratch.
    In Lightning it needs ``trainer.strategy: lowbit_lightning.strategies.ForwardOnlyStrategy``.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: expected length of a step along the normalized gradient; a float, or a one-element tensor that a scheduler
            changes in place. The paper's η is lr · ε.
        eps: distance ε at which losses are compared, in the units of the weights.
        num_perturbations: N; a step takes N + 1 forward passes (see ``baseline`` and ``reuse_losses``).
        perturbation: ``"rademacher"`` for independent signs; ``"rank1"`` gives every matrix the signs r sᵀ, whose first
            two moments are the same, and with which a perturbed linear layer costs next to nothing.
        execution: ``"sequential"`` makes one forward pass after another, in any module; ``"batched"`` makes all N in
            one (rank1 only); ``"auto"`` chooses.
        baseline: what losses are compared with: ``"clean"``, the loss at the weights themselves, or ``"mean"``, their
            mean, which saves one forward pass.
        reuse_losses: FZOO-R: only N/2 new perturbations a step, and σ from those and the last step's.
        weight_decay: decoupled weight decay.
        bf16_stochastic_rounding: write bf16 and fp16 weights with stochastic rounding instead of to nearest.
        seed: of the signs and the rounding noise.

    Raises:
        InvalidArgumentError: an argument is outside its range; a ValueError that names argument, value and range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        *,
        eps: float = 1e-3,
        num_perturbations: int = 8,
        perturbation: Literal["rademacher", "rank1"] = "rademacher",
        execution: Literal["auto", "sequential", "batched"] = "auto",
        baseline: Literal["clean", "mean"] = "clean",
        reuse_losses: bool = False,
        weight_decay: float = 0.0,
        bf16_stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "num_perturbations": num_perturbations,
            "perturbation": perturbation,
            "execution": execution,
            "baseline": baseline,
            "reuse_losses": reuse_losses,
            "weight_decay": weight_decay,
            "bf16_stochastic_rounding": bf16_stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def evaluations(self) -> list[Evaluation]:
        """Return the clean pass (with the clean baseline), then one for each new perturbation."""
        group = self.param_groups[0]
        new = group["num_perturbations"] // 2 if group["reuse_losses"] else group["num_perturbations"]
        clean = [Evaluation(0, 0)] if group["baseline"] == "clean" else []
        return clean + [Evaluation(index, 1) for index in range(new)]

    def gradient_norm(self) -> float:
        """Return σ/ε, to first order the norm of the gradient."""
        return self._normalized(self.param_groups[0]["pending_losses"])[1] / float(self.param_groups[0]["eps"])

    def coefficients(self, losses: Sequence[float]) -> list[float]:
        """Return cᵢ, see :func:`normalized_coefficients`."""
        coefficients, _ = self._normalized(losses)
        group = self.param_groups[0]
        if group["reuse_losses"] and any(coefficients):
            group["previous_losses"] = self._split(losses)[1]
        return coefficients

    def _normalized(self, losses: Sequence[float]) -> tuple[list[float], float]:
        clean, perturbed = self._split(losses)
        return normalized_coefficients(clean, perturbed, self.param_groups[0]["previous_losses"])

    def _split(self, losses: Sequence[float]) -> tuple[float | None, list[float]]:
        if self.param_groups[0]["baseline"] == "clean":
            return losses[0], list(losses[1:])
        return None, list(losses)

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row with the settings and the forward passes a step takes."""
        group = self.param_groups[0]
        name = "rank-1" if group["perturbation"] == "rank1" else "full"
        reuse = ", losses reused" if group["reuse_losses"] else ""
        return self._describe(
            f"{group['num_perturbations']} perturbations with {name} signs, ε {group['eps']:g}, "
            f"{group['baseline']} baseline{reuse}"
        )


class MeZO(ForwardOnlyOptimizer):
    """Memory-efficient zeroth-order SGD: two forward passes a step, at θ + ε u and θ - ε u.

    The yardstick of zeroth-order fine-tuning. The reported loss is the first pass's, at θ + ε u.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate of plain SGD; a float, or a one-element tensor that a scheduler changes in place.
        eps: distance ε at which losses are compared, in the units of the weights.
        weight_decay: decoupled weight decay.
        bf16_stochastic_rounding: write bf16 and fp16 weights with stochastic rounding instead of to nearest.
        seed: of the signs and the rounding noise.

    Raises:
        InvalidArgumentError: an argument is outside its range; a ValueError that names argument, value and range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-6,
        *,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        bf16_stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "num_perturbations": 1,
            "perturbation": "rademacher",
            "execution": "sequential",
            "baseline": "clean",
            "reuse_losses": False,
            "weight_decay": weight_decay,
            "bf16_stochastic_rounding": bf16_stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def evaluations(self) -> list[Evaluation]:
        """Return the passes at θ + ε u and θ - ε u."""
        return [Evaluation(0, 1), Evaluation(0, -1)]

    def gradient_norm(self) -> float:
        """Return the slope along the perturbation; its root mean square over steps is the norm of the gradient."""
        return abs(self.coefficients(self.param_groups[0]["pending_losses"])[0])

    def coefficients(self, losses: Sequence[float]) -> list[float]:
        """Return the slope along u."""
        plus, minus = losses
        return [(plus - minus) / (2 * self.param_groups[0]["eps"])]

    def describe_technique(self) -> list[tuple[str, str, str]]:
        """Return one row with the settings and the forward passes a step takes."""
        return self._describe(f"ε {self.param_groups[0]['eps']:g}")


def _check_settings(group: ParamGroup) -> None:
    def require(name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise InvalidArgumentError(f"{name}={group[name]!r} is out of range: {allowed}")

    require("lr", float(group["lr"]) >= 0, "a number >= 0")
    require("eps", 0 < group["eps"] < math.inf, "a number > 0")
    require("weight_decay", group["weight_decay"] >= 0, "a number >= 0")
    require("num_perturbations", group["num_perturbations"] >= 1, "an integer >= 1")
    require("perturbation", group["perturbation"] in ("rademacher", "rank1"), "rademacher or rank1")
    require("execution", group["execution"] in ("auto", "sequential", "batched"), "auto, sequential or batched")
    require("baseline", group["baseline"] in ("clean", "mean"), "clean or mean")
    if group["execution"] == "batched":
        require("perturbation", group["perturbation"] == "rank1", "execution=batched needs rank1")
    if group["reuse_losses"]:
        even = group["num_perturbations"] % 2 == 0 and group["num_perturbations"] >= 4
        require("num_perturbations", even, "an even integer >= 4 with reuse_losses")
    if group["baseline"] == "mean":
        require("num_perturbations", group["num_perturbations"] >= 2, "an integer >= 2 with baseline=mean")
    for param in group["params"]:
        if param.is_complex():
            raise InvalidArgumentError("params: forward-only optimizers take real parameters; use view_as_real")
