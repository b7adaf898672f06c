"""What SOLO is compared with: AdamW whose states are rounded to the nearest of evenly spaced levels.

The paper reports that this crashes at low bits: small second moments round to zero, and an average with decay 0.999
moves by less than half a level and so never moves. Quantization is simulated here (the states are stored in fp32 after
rounding): this shows quality, it saves nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def nearest_linear(values: Tensor, bits: int, block_size: int, signed: bool) -> Tensor:
    """Return values rounded to ``2**bits`` even levels of each block of a row, scaled by its largest magnitude."""
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    blocks = values.reshape(-1, block_size)
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / levels
    return (torch.round(blocks / scale) * scale).view_as(values)


class NaiveLinearAdamW(torch.optim.AdamW):
    """AdamW with both moments at ``bits`` bits, linear and to nearest.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decays of the moments.
        weight_decay: decoupled.
        bits: of both moments.
        block_size: elements that share a scale.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        bits: int = 4,
        block_size: int = 128,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.bits, self.block_size = bits, block_size

    @torch.no_grad()
    def step(self, closure: object = None) -> object:
        loss = super().step(closure)
        for param, state in self.state.items():
            if param.ndim > 1 and param.numel() >= 4096 and param.numel() % self.block_size == 0:
                state["exp_avg"] = nearest_linear(state["exp_avg"], self.bits, self.block_size, signed=True)
                state["exp_avg_sq"] = nearest_linear(state["exp_avg_sq"], self.bits, self.block_size, signed=False)
        return loss
