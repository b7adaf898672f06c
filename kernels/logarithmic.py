"""SOLO's unsigned logarithmic format, for second moments (arXiv 2505.00347, §3).

A block with largest value D has the levels D·α^k, k = 0 … 2^b - 1, and α is chosen so that the last level is the
block's ``quantile`` (0.1 by default). An exponential moving average with β near 1 moves by less than half a step of any
linear or dynamic format and would never move at all under nearest rounding; on logarithmic levels with stochastic
rounding every level decays at the average's own rate.

Two faults of the published code are avoided. A block with many exact zeros has quantile 0 and hence α = 0 there, which
decodes every element to D: here such a block takes the quantile of its positive elements, or D/64 if that is less (a
mere floor at 2⁻²⁴ would leave two levels to all that matter and inflate the mean fourfold), and zeros take the last
level. An all-zero block stays exactly zero, and a constant block does not divide by log 1.

D and log2 α may be stored in bf16. To the nearest, both would stay where they are while the average moves by less than
half a unit (0.2 to 0.4 %), and with them the first and the last level. So they are rounded stochastically, and codes
stay relative to the exact ones: codes relative to rounded ones would be cut off at either end, by more than an average
with β = 0.999 moves. Rounding then scales the levels of a whole block by factors that are 1 on average.
"""

import math

import torch
from torch import Tensor

from .elementary import exp2, log2

# The lowest the quantile may lie below the block's maximum, as a power of two.
LOG2_FLOOR = -24.0
# What an exact zero is decoded to at most, of the block's maximum; a power of two, so the product is exact.
LARGEST_ZERO = 2.0**-6
# Stands for -log2 α of a constant block, whose codes are all 0 whatever the divisor.
SMALLEST_SPAN = 1e-12


def block_quantile(values: Tensor, quantile: float) -> Tensor:
    """Return the quantile of each block, linearly interpolated as in ``torch.quantile``.

    Where that is 0, it is the quantile of the positive elements, without interpolation, but at most 1/64 of the block's
    maximum: the zeros will be decoded to it.

    Args:
        values: (blocks, L) fp32, not negative.
        quantile: in [0, 1).

    Returns:
        (blocks,) fp32.
    """
    length = values.shape[-1]
    ascending = values.sort(dim=-1).values
    position = quantile * (length - 1)
    rank, weight = math.floor(position), position - math.floor(position)
    low, high = ascending[..., rank], ascending[..., min(rank + 1, length - 1)]
    zeros = (values == 0).sum(dim=-1)
    positive_rank = zeros + (quantile * (length - zeros - 1).clamp_min(0).double()).floor().long()
    positive = ascending.gather(-1, positive_rank.clamp_max(length - 1).unsqueeze(-1)).squeeze(-1)
    positive = torch.minimum(positive, ascending[..., -1] * LARGEST_ZERO)
    interpolated = low + (high - low) * weight
    return torch.where(interpolated > 0, interpolated, positive)


def encode_logarithmic(
    values: Tensor, bits: int, quantile: float, rounding: Tensor | float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize blocks.

    Args:
        values: (blocks, L) fp32, finite and not negative.
        bits: 2 to 8.
        quantile: in [0, 1), the share of a block that lies below its last level.
        rounding: added before the floor: 0.5 rounds to the nearest level, (blocks, L) fp32 uniform in (0, 1) rounds
            stochastically (in the logarithm).

    Returns:
        codes (blocks, L) uint8, scale D (blocks,) fp32, log2_base log₂α (blocks,) fp32, never positive.
    """
    last = 2**bits - 1
    scale = values.amax(dim=-1)
    log2_scale = log2(scale)
    span = torch.clamp_max(log2_scale - log2(block_quantile(values, quantile)), -LOG2_FLOOR)
    # By a tensor: on CUDA torch multiplies by the reciprocal of a Python divisor, which rounds otherwise.
    log2_step = span / torch.tensor(float(last), device=values.device)
    step = torch.clamp_min(log2_step, SMALLEST_SPAN)
    steps_below = (log2_scale.unsqueeze(-1) - log2(values)) * (1.0 / step).unsqueeze(-1)
    codes = torch.clamp(torch.floor(steps_below + rounding), 0, last)
    return codes.to(torch.uint8), scale, -log2_step


def decode_logarithmic(codes: Tensor, scale: Tensor, log2_base: Tensor, bits: int) -> Tensor:
    """Return (blocks, L) fp32 values D·α^code.

    The power is a product of α, α², α⁴, … chosen by the code's bits, which rounds alike on every backend.
    """
    factor = exp2(log2_base.to(torch.float32))
    values = scale.to(torch.float32).unsqueeze(-1).expand(codes.shape)
    for bit in range(bits):
        values = torch.where((codes >> bit) & 1 == 1, values * factor.unsqueeze(-1), values)
        factor = factor * factor
    return values
