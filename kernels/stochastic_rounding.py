"""Stochastic rounding of fp32 weights to bf16.

An update below half a unit in the last place of bf16 (2⁻⁹ of the weight) vanishes under nearest rounding; weight decay
nearly always is one. Rounding up with a probability equal to the discarded fraction keeps it in expectation. Values
that bf16 represents exactly are returned unchanged.

The same holds for the scales of blocks where those are kept in bf16.
"""

import torch
from torch import Tensor


def round_to_bf16(values: Tensor, draws: Tensor) -> Tensor:
    """Return bf16 of fp32 values, rounded by 16-bit draws.

    Args:
        values: fp32 of any shape. Infinities and NaN pass through.
        draws: int32 in [0, 65536), the shape of ``values``.
    """
    bits = values.view(torch.int32)
    rounded = ((bits + draws) & -65536).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def round_scale(scale: Tensor, dtype: torch.dtype, draws: Tensor | None = None) -> Tensor:
    """Return fp32 metadata of blocks in the dtype it is stored in.

    Args:
        scale: fp32, finite; stays so, as bf16 it is at most the largest finite number.
        dtype: fp32 returns ``scale`` itself; bf16 rounds it.
        draws: int32 in [0, 65536), the shape of ``scale``, to round stochastically; None rounds to nearest even.
    """
    if dtype == torch.float32:
        return scale
    scale = scale.clamp_max(torch.finfo(torch.bfloat16).max)
    return scale.to(torch.bfloat16) if draws is None else round_to_bf16(scale, draws)
