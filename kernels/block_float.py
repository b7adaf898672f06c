"""Block floating point and affine codes of 2 to 16 bits: what a packed stash of activations is made of.

Quantizers of DSQ (arXiv 2303.05295), here really packed. A tensor is seen as a matrix of its last axis; each row is cut
into boxes of ``box`` elements, of which the last may be short.

``bfp``: the elements of a box share one 8-bit exponent E, the biased fp32 exponent of the largest magnitude, and are
signed mantissas of ``bits`` bits, ``q = round(x / 2^(E - 125 - bits))``, |q| <= 2^(bits-1) - 1. The range is symmetric
as in the paper's lineage (MSFP: sign and magnitude), so that no sign is favoured. A magnitude that rounds to
2^(bits-1) is **clipped**, so even stochastic rounding is biased for what exceeds the largest mantissa: at 2 bits every
magnitude above half of the box's power of two, at 4 bits above 7/8, at 8 bits above 127/128 of it.

``affine``: 2^bits levels from a bf16 minimum in bf16 steps. The minimum is rounded down and the step up, so that the
levels enclose every element and stochastic rounding is unbiased. Costs 32 bits a box instead of 8: choose longer boxes.

Codes of a row are a little-endian stream of bits: element ``j`` has bits ``j * bits`` to ``(j + 1) * bits - 1``; rows
end on whole bytes. Boxes of zeros stay exactly zero. Magnitudes so small that the step would be subnormal are rounded
on a grid of 2^-126. One element that is not finite makes all of its box NaN after unpacking.

Stochastic rounding takes 16-bit draws of Philox: counting elements over all boxes as if none were short, element ``e``
takes half-word ``e % 8`` of call ``e // 8``, counter (call, step), key (seed, stream). 16-bit mantissas take only the
draw's high byte, as fp32 has no bits for more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .philox import DRAWS_PER_CALL, draw_16bit

BFP_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
AFFINE_BITS = (2, 3, 4, 5, 6, 7, 8)
BOXES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The exponent that no finite number has.
_NON_FINITE = 255
_LARGEST_BF16 = torch.finfo(torch.bfloat16).max
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

Noise = tuple[int, int, int]


@dataclass(frozen=True)
class BoxFormat:
    """How a tensor is quantized.

    Args:
        bits: of a code; 2 to 8, for ``bfp`` also 16.
        box: elements that share an exponent (``bfp``) or a minimum and a step (``affine``): 16, 32, 64 or 128.
        kind: ``bfp`` or ``affine``.
        rounding: ``nearest`` (ties to even) or ``stochastic``.

    Raises:
        ValueError: an argument outside its set.
    """

    bits: int
    box: int = 16
    kind: Literal["bfp", "affine"] = "bfp"
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def __post_init__(self) -> None:
        _check("kind", self.kind, ("bfp", "affine"))
        _check("rounding", self.rounding, ("nearest", "stochastic"))
        _check("box", self.box, BOXES)
        _check("bits", self.bits, BFP_BITS if self.kind == "bfp" else AFFINE_BITS, f" for kind={self.kind!r}")

    @property
    def stochastic(self) -> bool:
        """Whether rounding takes noise."""
        return self.rounding == "stochastic"

    def row_bytes(self, columns: int) -> int:
        """Return the bytes that the codes of a row of ``columns`` elements take."""
        return -(-columns * self.bits // 8)

    def boxes(self, columns: int) -> int:
        """Return the boxes of a row of ``columns`` elements."""
        return -(-columns // self.box)

    def packed_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes that a tensor of this shape takes packed, codes and scales."""
        rows, columns = matrix_shape(shape)
        return rows * (self.row_bytes(columns) + self.boxes(columns) * (1 if self.kind == "bfp" else 4))


class Packed(NamedTuple):
    """A packed tensor.

    Attributes:
        codes: (rows, bytes of a row) uint8.
        scales: ``bfp``: (rows, boxes) uint8 exponents; ``affine``: (rows, boxes, 2) bf16, minimum and step.
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.scales.nbytes


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor seen as a matrix of its last axis; a 0-d tensor is one element."""
    return math.prod(shape[:-1]), (shape[-1] if len(shape) else 1)


def pack(x: Tensor, format: BoxFormat, noise: Noise | None = None) -> Packed:
    """Quantize and pack a tensor in boxes along its last axis.

    Args:
        x: fp32, bf16 or fp16 of any shape and strides.
        format: how.
        noise: (seed, stream, step), see :mod:`.philox`; needed if, and only if, ``format.rounding`` is stochastic.

    Raises:
        ValueError: noise that is missing or not wanted.
        TypeError: a tensor of another dtype.
    """
    _check_input(x, format, noise)
    return pack_reference(x, format, noise)


def unpack(packed: Packed, format: BoxFormat, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the values of a packed tensor.

    Args:
        packed: from :func:`pack`, with the same format.
        shape: of the tensor that was packed.
        dtype: fp32, bf16 or fp16, the result's.

    Returns:
        A contiguous tensor of this shape and dtype.
    """
    return unpack_reference(packed, format, shape, dtype)


def quantize(x: Tensor, format: BoxFormat, noise: Noise | None = None, axis: int = -1) -> Tensor:
    """Return what unpacking a packed tensor would, without packing: what the inputs of a quantized GEMM are.

    Args:
        x: fp32, bf16 or fp16 of any shape.
        format: how.
        noise: as in :func:`pack`.
        axis: along which boxes run.

    Returns:
        The dtype and shape of ``x``.
    """
    _check_input(x, format, noise)
    return quantize_reference(x, format, noise, axis)


# ---- reference --------------------------------------------------------------------------------------------------


def pack_reference(x: Tensor, format: BoxFormat, noise: Noise | None = None) -> Packed:
    """Do :func:`pack`, for any device."""
    codes, scales = _encode(_boxed(x, format), format, noise)
    return Packed(_to_stream(codes.flatten(1), format, matrix_shape(x.shape)[1]), scales)


def unpack_reference(packed: Packed, format: BoxFormat, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Do :func:`unpack`, for any device."""
    rows, columns = matrix_shape(shape)
    codes = _from_stream(packed.codes, format, format.boxes(columns) * format.box)
    values = _decode(codes.view(rows, format.boxes(columns), format.box), packed.scales, format, dtype)
    return values.flatten(1)[:, :columns].reshape(tuple(shape))


def quantize_reference(x: Tensor, format: BoxFormat, noise: Noise | None = None, axis: int = -1) -> Tensor:
    """Do :func:`quantize`, for any device."""
    moved = x.movedim(axis, -1) if x.ndim > 1 else x
    values = _decode(*_encode(_boxed(moved, format), format, noise), format, x.dtype)
    values = values.flatten(1)[:, : matrix_shape(moved.shape)[1]].reshape(moved.shape)
    return values.movedim(-1, axis).contiguous() if x.ndim > 1 else values


def _boxed(x: Tensor, format: BoxFormat) -> Tensor:
    """Return (rows, boxes, box) fp32, short boxes filled up with their last element, which changes no scale."""
    rows, columns = matrix_shape(x.shape)
    boxes = format.boxes(columns)
    matrix = x.reshape(rows, columns).float()
    filling = matrix[:, -1:].expand(-1, boxes * format.box - columns)
    return torch.cat([matrix, filling], dim=1).view(rows, boxes, format.box)


def _encode(x: Tensor, format: BoxFormat, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """Return codes (rows, boxes, box) int32 and scales of boxed fp32 values."""
    largest = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1) if x.numel() else x.new_zeros(x.shape[:2], dtype=torch.int32)
    exponent = largest >> 23
    finite = (exponent != _NON_FINITE)[..., None]
    if format.kind == "bfp":
        exponent = exponent.clamp_min(format.bits - 1)
        # Halves, because 2^(125 + bits - E) itself is subnormal at 2 bits and E = 254.
        inverse = _power_of_two(126 + format.bits - exponent)
        most = (1 << (format.bits - 1)) - 1
        codes = _round((x * 0.5) * inverse[..., None], format, noise).clamp(-most, most)
        codes = torch.where(finite, codes, 0.0)
        return codes.to(torch.int32), exponent.to(torch.uint8)

    most = (1 << format.bits) - 1
    minimum, maximum = _extremes(x)
    minimum = _round_down(minimum).clamp_min(-_LARGEST_BF16) + 0.0  # no negative zero
    step = _round_up(maximum * (1.0 / most) - minimum * (1.0 / most)).clamp_min(_SMALLEST_NORMAL)
    # Halves, because the range of finite numbers is none.
    distance = x * 0.5 - (minimum * 0.5)[..., None]
    codes = _round(distance * (2.0 / step)[..., None], format, noise).clamp(0, most)
    minimum = torch.where(finite[..., 0], minimum, torch.nan)
    step = torch.where(finite[..., 0], step, _SMALLEST_NORMAL)
    codes = torch.where(finite, codes, 0.0)
    return codes.to(torch.int32), torch.stack([minimum, step], dim=-1).to(torch.bfloat16)


def _decode(codes: Tensor, scales: Tensor, format: BoxFormat, dtype: torch.dtype) -> Tensor:
    """Return values of codes (rows, boxes, box) int32."""
    if format.kind == "bfp":
        exponent = scales.to(torch.int32)
        step = _power_of_two(exponent - 125 - format.bits)
        step = torch.where(exponent == _NON_FINITE, torch.nan, step)
        return (codes.float() * step[..., None]).to(dtype)
    minimum, step = scales.float().unbind(-1)
    values = minimum[..., None] + codes.float() * step[..., None]
    # The outermost levels may lie beyond what the dtype can hold, as the minimum was rounded down and the step up.
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def _round(levels: Tensor, format: BoxFormat, noise: Noise | None) -> Tensor:
    """Return whole numbers of (rows, boxes, box) levels."""
    if noise is None:
        return levels.round()
    calls = torch.arange(levels.numel() // DRAWS_PER_CALL, device=levels.device)[:, None]
    draws = draw_16bit(*noise, calls).view(levels.shape)
    if format.bits == 16:
        return torch.floor(levels + ((draws >> 8).float() + 0.5) * 2.0**-8)
    return torch.floor(levels + (draws.float() + 0.5) * 2.0**-16)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return fp32 2^exponent of int32 exponents from -126 to 127."""
    power: Tensor = ((exponent + 127) << 23).view(torch.float32)
    return power


def _extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return (x.amin(-1), x.amax(-1)) if x.numel() else (x.new_zeros(x.shape[:2]), x.new_zeros(x.shape[:2]))


def _round_down(values: Tensor) -> Tensor:
    """Return the largest bf16 number that is not above, in fp32."""
    bits = values.view(torch.int32)
    return ((bits + ((bits >> 31) & 0xFFFF)) & -65536).view(torch.float32)


def _round_up(values: Tensor) -> Tensor:
    """Return the smallest bf16 number that is not below, in fp32, of values that are not negative."""
    return ((values.view(torch.int32) + 0xFFFF) & -65536).view(torch.float32)


def _to_stream(codes: Tensor, format: BoxFormat, columns: int) -> Tensor:
    """Return the bit stream of codes (rows, a multiple of 8) int32, cut after ``columns``."""
    places = torch.arange(format.bits, device=codes.device, dtype=torch.int32)
    octets = codes.shape[1] * format.bits // 8
    bits = ((codes[..., None] >> places) & 1).view(codes.shape[0], octets, 8)
    whole = (bits << torch.arange(8, device=codes.device, dtype=torch.int32)).sum(-1)
    return whole.to(torch.uint8)[:, : format.row_bytes(columns)].contiguous()


def _from_stream(stream: Tensor, format: BoxFormat, columns: int) -> Tensor:
    """Return (rows, columns) int32 codes of a bit stream; those behind its end are 0. ``columns``: a multiple of 8."""
    whole = torch.nn.functional.pad(stream, (0, columns * format.bits // 8 - stream.shape[1])).to(torch.int32)
    bits = (whole[..., None] >> torch.arange(8, device=stream.device, dtype=torch.int32)) & 1
    places = torch.arange(format.bits, device=stream.device, dtype=torch.int32)
    codes = (bits.view(stream.shape[0], columns, format.bits) << places).sum(-1, dtype=torch.int32)
    if format.kind == "affine":
        return codes
    half = 1 << (format.bits - 1)
    return (codes ^ half) - half  # two's complement


def _check(name: str, value: object, allowed: tuple[object, ...], where: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is out of range: one of {', '.join(map(repr, allowed))}{where}")


def _check_input(x: Tensor, format: BoxFormat, noise: Noise | None) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"cannot quantize a tensor of {x.dtype}: it must be one of {', '.join(map(str, DTYPES))}")
    if format.stochastic and noise is None:
        raise ValueError("noise=None is out of range for stochastic rounding: give (seed, stream, step)")
    if not format.stochastic and noise is not None:
        raise ValueError(f"noise={noise} has no use when rounding to nearest: leave it out")
