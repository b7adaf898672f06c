"""Stochastic rounding of fp32 weights to bf16 and fp16.

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


def round_to_fp16(values: Tensor, draws: Tensor) -> Tensor:
    """Return fp16 of fp32 values, rounded by 16-bit draws; see :func:`round_to_bf16`.

    Thirteen bits are discarded, and below 2⁻¹⁴, where fp16 numbers are 2⁻²⁴ apart, more and more: there it is a sum,
    of as many bits of the draw as keep it exact. Magnitudes rounded to 2¹⁶ become infinite, as in any conversion.
    """
    bits = values.view(torch.int32)
    rounded = ((bits + (draws >> 3)) & -8192).view(torch.float32)
    small = torch.floor(values.abs() * 2.0**24 + (draws >> 2).float() * 2.0**-14) * 2.0**-24
    rounded = torch.where(values.abs() < 2.0**-14, torch.copysign(small, values), rounded)
    return torch.where(values.isfinite(), rounded, values).to(torch.float16)


# What weights may be rounded to.
ROUNDED_DTYPES = (torch.bfloat16, torch.float16)


def round_weights(values: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Return fp32 values in one of ROUNDED_DTYPES, rounded by 16-bit draws."""
    return round_to_bf16(values, draws) if dtype == torch.bfloat16 else round_to_fp16(values, draws)


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
