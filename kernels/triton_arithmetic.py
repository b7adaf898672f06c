# ruff: noqa: SIM108
# Triton's compiler knows no conditional expressions of tensors.
"""What the Triton kernels of several optimizers share: noise, rounding and powers, as the references have them."""

import triton
import triton.language as tl

_INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def philox(seed, stream, step, calls):
    """Return the four uint32 words of each int64 call, in a tuple."""
    c0, c1 = calls.to(tl.uint32), (calls >> 32).to(tl.uint32)
    c2, c3 = c0 * 0 + step, c0 * 0
    k0, k1 = seed, stream
    for _ in tl.static_range(10):
        # One widening multiplication gives both halves.
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def round_to_bf16(value, draw, NOISE: tl.constexpr):
    """Return int16 bits: rounded by a draw in [0, 65536), or to the nearest with ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if NOISE:
        rounded = tl.where(magnitude < _INFINITY_BITS, bits + draw, bits)
    else:
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(magnitude > _INFINITY_BITS, 0x7FC00000, rounded) >> 16).to(tl.int16)


@triton.jit
def integer_power(base, exponent):
    """Return base**exponent in fp64 by squaring; the error is far below what rounding to fp32 hides."""
    power = base * 0.0 + 1.0
    while exponent > 0:
        power = tl.where(exponent % 2 == 1, power * base, power)
        base = base * base
        exponent = exponent // 2
    return power
