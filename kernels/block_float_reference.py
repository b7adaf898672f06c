"""The meaning of packing, unpacking and quantizing, see :mod:`.block_float`, in PyTorch for any device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .block_float_formats import BoxFormat, Noise, Packed, matrix_shape
from .philox import DRAWS_PER_CALL, draw_16bit

# The exponent that no finite number has.
_NON_FINITE = 255
_LARGEST_BF16 = torch.finfo(torch.bfloat16).max
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def pack_reference(x: Tensor, format: BoxFormat, noise: Noise | None = None) -> Packed:
    """Do :func:`.block_float.pack`."""
    codes, scales = _encode(_boxed(x, format), format, noise)
    return Packed(_to_stream(codes.flatten(1), format, matrix_shape(x.shape)[1]), scales)


def unpack_reference(packed: Packed, format: BoxFormat, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Do :func:`.block_float.unpack`."""
    rows, columns = matrix_shape(shape)
    codes = _from_stream(packed.codes, format, format.boxes(columns) * format.box)
    values = _decode(codes.view(rows, format.boxes(columns), format.box), packed.scales, format, dtype)
    return values.flatten(1)[:, :columns].reshape(tuple(shape))


def quantize_reference(x: Tensor, format: BoxFormat, noise: Noise | None = None, axis: int = -1) -> Tensor:
    """Do :func:`.block_float.quantize`."""
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
        exponent = scales.to(torch.int32).clamp_min(format.bits - 1)
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
