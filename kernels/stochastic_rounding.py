"""Stochastic rounding of fp32 weights to bf16.

An update below half a unit in the last place of bf16 (2⁻⁹ of the weight) vanishes under nearest rounding; weight decay
nearly always is one. Rounding up with a probability equal to the discarded fraction keeps it in expectation. Values
that bf16 represents exactly are returned unchanged.
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
