"""MeZO (arXiv 2305.17333): θ ← θ - lr (l₊ - l₋)/(2ε) u.

Unlike the paper, u has random signs in place of Gaussians, as SPSA has it: the same mean step, with less variance.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_lightning.optim.forward_only import Evaluation, ForwardOnlyOptimizer


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
