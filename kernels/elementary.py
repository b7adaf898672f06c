"""log2 and exp2 from IEEE additions and multiplications only, so that every backend computes the same bits.

Vector math libraries differ in the last place between CPUs, GPUs and versions, and one unit there flips a code now and
then. Addition, multiplication, division and square root are correctly rounded everywhere, so polynomials in them (with
contraction to fused multiply-add switched off in compiled paths) make integer codes reproducible bit for bit. The
coefficients are minimax fits of this project.
"""

import torch
from torch import Tensor

# log2(1 + t) / t on [sqrt(1/2) - 1, sqrt(2) - 1]: absolute error of log2 below 7e-7.
LOG2_COEFFICIENTS = (
    1.4426963329315186,
    -0.7213677167892456,
    0.4806486964225769,
    -0.3591848611831665,
    0.2951000928878784,
    -0.2709770202636719,
    0.17616517841815948,
)
# (2**t - 1) / t on [0, 1]: relative error of exp2 below 1e-7.
EXP2_COEFFICIENTS = (
    0.6931471228599548,
    0.24022944271564484,
    0.05547744408249855,
    0.009705863893032074,
    0.00120636192150414,
    0.00023381753999274224,
)
SMALLEST_NORMAL = 2.0**-126
# The square of a larger magnitude overflows fp32.
LARGEST_SQUARABLE = torch.finfo(torch.float32).max ** 0.5
# The bits of sqrt(1/2): subtracting them moves the exponent's step to where the mantissa crosses sqrt(2).
SQRT_HALF_BITS = 0x3F3504F3


def log2(x: Tensor) -> Tensor:
    """Return log2 of positive fp32 values; subnormals and zero count as 2⁻¹²⁶."""
    bits = torch.clamp_min(x, SMALLEST_NORMAL).view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).view(torch.float32) - 1.0
    polynomial = torch.full_like(t, LOG2_COEFFICIENTS[-1])
    for coefficient in reversed(LOG2_COEFFICIENTS[:-1]):
        polynomial = polynomial * t + coefficient
    return polynomial * t + exponent.to(torch.float32)


def sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root of fp32 values.

    ``torch.sqrt`` is a vector math library's on some CPUs and one unit off in 0.6 % of cases. The root of an fp32
    number is never so close to the middle of two others that a double's error decides the rounding.
    """
    return x.double().sqrt().to(torch.float32)


def exp2(y: Tensor) -> Tensor:
    """Return 2**y of fp32 values in [-126, 0]; exactly 1 at 0."""
    whole = torch.floor(y)
    t = y - whole
    polynomial = torch.full_like(t, EXP2_COEFFICIENTS[-1])
    for coefficient in reversed(EXP2_COEFFICIENTS[:-1]):
        polynomial = polynomial * t + coefficient
    power = ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
    return (polynomial * t + 1.0) * power
