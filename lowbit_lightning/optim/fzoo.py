"""FZOO: an optimizer that needs the loss at a few weights near the present ones, and no gradient.

FZOO (arXiv 2506.09034) compares one batch's loss at θ with its losses at θ + ε uᵢ, signs uᵢ ∈ {±1}^d, and steps by

    σ = std(l₁ … l_N)      cᵢ = (lᵢ - l₀) / (N σ)      θ ← θ - lr Σ cᵢ uᵢ

which is the authors' code: to first order E[Δθ] = -lr ∇L/‖∇L‖, so ``lr`` is the length of a normalized-SGD step and ε
only the width of a finite difference. The paper writes η g/σ with g carrying 1/ε: η = lr · ε, up to √(N/(N-1)).

Differences from the authors' code: schedulers and weight decay act, losses that are not finite or do not differ change
nothing, FZOO-R exists, 16-bit weights take updates below their resolution, and weights are never written to compare
losses, so nothing drifts. What it shares with MeZO is in :mod:`.forward_only`.
"""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.optim.base import ParamGroup
from lowbit_lightning.optim.forward_only import Evaluation, ForwardOnlyOptimizer, require

# Losses are fp32: where they differ by less than this share of themselves, they differ by rounding alone.
_FLAT = 2.0**-24


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
    mean = sum(perturbed) / len(perturbed)
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
    mean = sum(losses) / len(losses)
    return sum((loss - mean) ** 2 for loss in losses)


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

    shared_settings = (
        "eps", "num_perturbations", "perturbation", "execution", "baseline", "reuse_losses", "seed",
    )  # fmt: skip

    def check_settings(self, group: ParamGroup) -> None:
        """Check a group's settings."""
        super().check_settings(group)
        count = group["num_perturbations"]
        require(group, "num_perturbations", count >= 1, "an integer >= 1")
        require(group, "perturbation", group["perturbation"] in ("rademacher", "rank1"), "rademacher or rank1")
        choices = ("auto", "sequential", "batched")
        require(group, "execution", group["execution"] in choices, "auto, sequential or batched")
        require(group, "baseline", group["baseline"] in ("clean", "mean"), "clean or mean")
        if group["execution"] == "batched":
            require(group, "perturbation", group["perturbation"] == "rank1", "execution=batched needs rank1")
        if group["reuse_losses"]:
            is_even = count % 2 == 0 and count >= 4
            require(group, "num_perturbations", is_even, "an even integer >= 4 with reuse_losses")
        if group["baseline"] == "mean":
            require(group, "num_perturbations", count >= 2, "an integer >= 2 with baseline=mean")

    @property
    def perturbation(self) -> str:
        """Which signs matrices get: ``"rademacher"`` or ``"rank1"``."""
        return str(self.param_groups[0]["perturbation"])

    @property
    def execution(self) -> str:
        """How a strategy makes the passes: ``"sequential"``, ``"batched"`` or ``"auto"``."""
        return str(self.param_groups[0]["execution"])

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
