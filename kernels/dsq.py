"""The three GEMMs of a linear layer with quantized operands, as DSQ describes them, and what they would cost.

DSQ (arXiv 2303.05295, Figure 2) names four places: [q0, q1, q2, q3] are the bits of both inputs of the forward GEMM, of
the stashed input that the weight gradient is made of, of the incoming gradient and the weight in both backward GEMMs,
and of the outgoing gradient. With Qi the quantizer of qi bits, x (M, K), w (N, K) and the incoming gradient d (M, N):

    y  = Q0(x) Q0(w)ᵀ             boxes along K
    dx = Q3(Q2(d) Q2(w))          boxes along N; of the result along K
    dw = Q2(d)ᵀ Q1(x)             boxes along M; of the stash along K

Boxes run along the axis that a GEMM sums over, as they must where a box shares one exponent in integer arithmetic; so d
is quantized twice. The exception is the stash: x is packed once, along its features, for all layers that read it (an
integer GEMM would have to shift within its sums, or lay the stash out anew). Products and sums themselves are those of
the tensors' dtype: this is what such a GEMM would compute, not how fast it would be. Hence the costs in here are
**modelled**; what is stashed is really packed, by the caller.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .block_float import BoxFormat, Noise, quantize
from .philox import stream_id

Bits = tuple[int, int, int, int]
Rounding = Literal["nearest", "stochastic"]

OFF = 32
"""Bits that stand for a tensor that is not quantized."""
WORD = 16
"""What such a tensor counts in the costs: the bits of the 16-bit run that the paper compares with."""
EXPONENT_BITS = 8


class Formats(NamedTuple):
    """Formats of the four places; None leaves a tensor as it is."""

    q0: BoxFormat | None
    q1: BoxFormat | None
    q2: BoxFormat | None
    q3: BoxFormat | None


class Noises(NamedTuple):
    """Noise for stochastic rounding, one for each tensor of the backward pass that the stash does not pack.

    ``recomputed`` is for an x that the stash does not hold itself, because it is a function of what it does hold.
    """

    input_gradient: Noise | None = None
    backward_weight: Noise | None = None
    weight_gradient: Noise | None = None
    outgoing: Noise | None = None
    recomputed: Noise | None = None


def formats(bits: Bits, box: int, kind: Literal["bfp", "affine"], rounding: Rounding) -> Formats:
    """Return the formats of [q0, q1, q2, q3].

    Forward rounds to nearest whatever ``rounding`` says: a rounding error there is not averaged out over steps, as one
    of a gradient is, and to nearest it is smaller. Affine codes of 16 bits do not exist: block floating point serves.
    """

    def format(q: int, rounding: Rounding) -> BoxFormat | None:
        return None if q == OFF else BoxFormat(q, box, "bfp" if q == 16 else kind, rounding)

    return Formats(format(bits[0], "nearest"), *(format(q, rounding) for q in bits[1:]))


def noise_streams(name: str) -> tuple[int, ...]:
    """Return a stream of randomness for each field of :class:`Noises`, from a name of the layer's own."""
    return tuple(stream_id(f"{name}:{place}", "stash") for place in Noises._fields)


def noises(seed: int, streams: tuple[int, ...], step: int) -> Noises:
    """Return the noise of one step."""
    return Noises(*((seed, stream, step) for stream in streams))


def forward(x: Tensor, weight: Tensor, formats: Formats) -> Tensor:
    """Return y (M, N) of x (M, K) and weight (N, K), without a bias."""
    x = quantized(x, formats.q0, None, -1)
    return x @ quantized(weight, formats.q0, None, -1).T


def input_gradient(grad: Tensor, weight: Tensor, formats: Formats, noises: Noises) -> Tensor:
    """Return dx (M, K) of the incoming gradient (M, N) and weight (N, K)."""
    grad = quantized(grad, formats.q2, noises.input_gradient, -1)
    dx = grad @ quantized(weight, formats.q2, noises.backward_weight, 0)
    return quantized(dx, formats.q3, noises.outgoing, -1)


def weight_gradient(grad: Tensor, stashed: Tensor, formats: Formats, noises: Noises) -> Tensor:
    """Return dw (N, K) of the incoming gradient (M, N) and Q1(x) (M, K), as it comes out of the stash."""
    return quantized(grad, formats.q2, noises.weight_gradient, 0).T @ stashed


def quantized(x: Tensor, format: BoxFormat | None, noise: Noise | None, axis: int) -> Tensor:
    """Return Q(x) in boxes along ``axis``, or ``x`` where there is no format."""
    if format is None:
        return x
    return quantize(x, format, noise if format.stochastic else None, axis)


def reference(
    x: Tensor, weight: Tensor, grad: Tensor, stashed: Tensor, formats: Formats, noises: Noises
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, dx and dw in float64: operands are quantized as above, products and sums are exact but for q3's.

    Args:
        x: (M, K) fp32.
        weight: (N, K) fp32.
        grad: (M, N) fp32.
        stashed: Q1(x), (M, K) fp32.
        formats: of the other operands.
        noises: of every tensor that is quantized here.
    """
    q0x = quantized(x, formats.q0, None, -1).double()
    q0w = quantized(weight, formats.q0, None, -1).double()
    q2w = quantized(weight, formats.q2, noises.backward_weight, 0).double()
    over_outputs = quantized(grad, formats.q2, noises.input_gradient, -1).double()
    over_tokens = quantized(grad, formats.q2, noises.weight_gradient, 0).double()
    dx = torch.einsum("mn,nk->mk", over_outputs, q2w)
    # The result is quantized as a tensor of the run's dtype.
    dx = quantized(dx.to(x.dtype), formats.q3, noises.outgoing, -1).double() if formats.q3 else dx
    return torch.einsum("mk,nk->mn", q0x, q0w), dx, torch.einsum("mn,mk->nk", over_tokens, stashed.double())


# ---- modelled costs ---------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Modelled cost of a linear layer's forward and backward pass.

    Attributes:
        arithmetic: one-bit multiplications: a product of a and b bits is a·b of them, as in an integer multiplier.
        dram: bits read and written.
    """

    arithmetic: float
    dram: float

    def __add__(self, other: tuple[object, ...]) -> "Cost":
        """Return the sum of both parts; of tuples it would be their concatenation."""
        assert isinstance(other, Cost)
        return Cost(self.arithmetic + other.arithmetic, self.dram + other.dram)


def linear_cost(
    bits: Bits, m: int, n: int, k: int, box: int, *, input_grad: bool = True, weight_grad: bool = True
) -> Cost:
    """Return the modelled cost of [q0, q1, q2, q3] for y (M, N) = x (M, K) · w (K, N).

    arithmetic = MNK (q0² + q2² + q1 q2); DRAM = MK (2 q1 + q3) + KN (q0 + q2) + MN q2, where every quantized element
    takes 8/box bits more for its share of an exponent. What is not quantized counts 16 bits. The stash and its GEMM are
    left out of a layer whose weight is frozen, dx and its GEMM where the input needs no gradient.

    The paper's model is not public; this one gives 64 times and 2.67 times less arithmetic than 16 bits for its first
    and its last level.
    """
    q0, q1, q2, _ = (WORD if q == OFF else q for q in bits)
    s0, s1, s2, s3 = (WORD if q == OFF else q + EXPONENT_BITS / box for q in bits)
    arithmetic, dram = float(q0 * q0), k * n * s0
    if weight_grad:
        arithmetic += q1 * q2
        dram += 2 * m * k * s1
    if input_grad:
        arithmetic += q2 * q2
        dram += k * n * s2 + m * k * s3
    if weight_grad or input_grad:
        dram += m * n * s2
    return Cost(arithmetic * m * n * k, dram)


def sixteen_bit_cost(m: int, n: int, k: int, *, input_grad: bool = True, weight_grad: bool = True) -> Cost:
    """Return the cost of the same layer with 16 bits everywhere and no exponents: the paper's yardstick."""
    return linear_cost((OFF, OFF, OFF, OFF), m, n, k, box=1, input_grad=input_grad, weight_grad=weight_grad)
