"""Quantization of matrices to four bits and fewer, packed and unpacked: the arithmetic of FourBitPrecision.

:mod:`.four_bit_formats` has the formats. A matrix is quantized to what its codes stand for and, if asked, to the packed
codes themselves; unpacking them gives the former bit for bit. Stochastic rounding takes its noise from Philox, counted
by the step that the caller says, so that the same step quantizes alike in forward, in backward and after a resume.

A group that holds infinity or NaN comes out as NaN as a whole, unless the value is among the outliers, which are kept:
a broken activation breaks the loss, as it does without quantization, and whatever watches the run sees it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import four_bit_cpu, four_bit_triton
from .elementary import SMALLEST_NORMAL
from .four_bit_formats import (
    LARGEST_E4M3,
    Packed,
    Scheme,
    decode_scale,
    decode_symmetric,
    empty_packed,
    encode_scale,
    encode_symmetric,
    rounded,
    tensor_scale_of,
)
from .packing import pack, packed_length, unpack
from .philox import DRAWS_PER_CALL, draw_16bit


@dataclass(frozen=True)
class Noise:
    """Which random bits round; ``stream`` is from :func:`.philox.stream_id`."""

    seed: int
    stream: int
    step: int


class _Part(NamedTuple):
    """All full groups of a matrix, or the short last ones of its rows."""

    columns: slice
    bytes: slice
    groups: slice
    length: int

    def elements(self, matrix: Tensor) -> Tensor:
        """Return the part of a (rows, columns) matrix as (rows, groups, length)."""
        count = self.groups.stop - self.groups.start
        return matrix[:, self.columns].reshape(matrix.shape[0], count, self.length)


def _parts(columns: int, scheme: Scheme) -> Iterator[_Part]:
    size, bits = scheme.group_size, scheme.spec.bits
    full, rest = divmod(columns, size)
    first_byte = full * packed_length(size, bits)
    if full:
        yield _Part(slice(0, full * size), slice(0, first_byte), slice(0, full), size)
    if rest:
        last = slice(first_byte, first_byte + packed_length(rest, bits))
        yield _Part(slice(full * size, columns), last, slice(full, full + 1), rest)


def _draws(rows: int, columns: int, part: _Part, noise: Noise, device: torch.device) -> Tensor:
    """Return the noise of a part, (rows, groups, length) fp32 in (0, 1); calls are numbered through rows in order."""
    calls_per_row = -(-columns // DRAWS_PER_CALL)
    per_group = -(-part.length // DRAWS_PER_CALL)
    row = torch.arange(rows, device=device).view(-1, 1, 1) * calls_per_row + part.columns.start // DRAWS_PER_CALL
    group = torch.arange(part.groups.stop - part.groups.start, device=device).view(1, -1, 1) * per_group
    calls = row + group + torch.arange(per_group, device=device)
    draws = draw_16bit(noise.seed, noise.stream, noise.step, calls)[..., : part.length]
    return (draws.float() + 0.5) * 2.0**-16


def _take_outliers(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return values (..., length) with the ``count`` largest magnitudes of the last axis zero, and their places.

    Of equal magnitudes the first is taken. Where nothing but zeros is left, place 0 is named once more, which is
    harmless as the value there is kept as well.
    """
    places = []
    for _ in range(count):
        # As integers, so that NaN is the largest of all.
        magnitude = values.contiguous().view(torch.int32) & 0x7FFFFFFF
        place = magnitude.argmax(dim=-1, keepdim=True)
        values = values.scatter(-1, place, 0.0)
        places.append(place)
    return values, torch.cat(places, dim=-1)


def quantize_reference(
    x: Tensor, scheme: Scheme, dtype: torch.dtype, noise: Noise | None = None
) -> tuple[Tensor, Packed]:
    """Quantize a matrix on any device: the meaning of every other path.

    Args:
        x: (rows, columns), floating point.
        scheme: the format and its groups along the columns.
        dtype: of the values returned, in which outliers are exact.
        noise: for stochastic rounding; None rounds to the nearest, ties to even.

    Returns:
        The values that the codes stand for, (rows, columns) of ``dtype``, and the packed matrix.
    """
    rows, columns = x.shape
    values_out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    packed = empty_packed(rows, columns, scheme, dtype, x.device)
    if scheme.spec.scale == "e4m3":
        packed.tensor_scale.copy_(_tensor_scale(x))
    for part in _parts(columns, scheme):
        exact = part.elements(x).to(dtype)
        values = part.elements(x).float()
        if scheme.outliers:
            values, places = _take_outliers(values, scheme.outliers)
            packed.outlier_indices[:, part.groups] = places.to(packed.outlier_indices.dtype)
            packed.outlier_values[:, part.groups] = exact.gather(-1, places)
        finite = values.isfinite().all(dim=-1, keepdim=True)
        values = torch.where(finite, values, 0.0)
        uniform = _draws(rows, columns, part, noise, x.device) if noise is not None else None
        if scheme.asymmetric:
            codes, scale, zero = _encode_asymmetric(values, scheme, uniform)
            packed.zero_points[:, part.groups] = zero[..., 0].to(torch.uint8)
            packed.scales[:, part.groups] = torch.where(finite, scale, torch.nan)[..., 0]
        else:
            most = torch.where(finite, values.abs().amax(dim=-1, keepdim=True), torch.inf)
            stored = encode_scale(most, scheme, packed.tensor_scale)
            packed.scales[:, part.groups] = stored[..., 0]
            scale = decode_scale(stored, scheme, packed.tensor_scale)
            # The scale of a group of tiny values may be stored as zero; so are then the values.
            inverse = torch.where(scale > 0, scale.clamp_min(2.0**-127).reciprocal(), 0.0)
            codes = encode_symmetric(values * inverse, scheme.spec, uniform)
        packed.codes[:, part.bytes] = pack(codes, scheme.spec.bits).flatten(1)
        values_out[:, part.columns] = _decoded(packed, part, codes, scheme).to(dtype).flatten(1)
    return values_out, packed


def _encode_asymmetric(values: Tensor, scheme: Scheme, uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    levels = torch.full_like(values[..., :1], 2.0**scheme.spec.bits - 1)
    least = values.amin(dim=-1, keepdim=True).clamp_max(0.0)
    most = values.amax(dim=-1, keepdim=True).clamp_min(0.0)
    scale = (most / levels - least / levels).clamp_min(SMALLEST_NORMAL)  # the difference itself might overflow
    inverse = scale.reciprocal()
    zero = torch.minimum((-least * inverse).round(), levels)
    codes = torch.minimum((rounded(values * inverse, uniform) + zero).clamp_min(0.0), levels)
    return codes.to(torch.uint8), scale, zero


def _decoded(packed: Packed, part: _Part, codes: Tensor, scheme: Scheme) -> Tensor:
    scale = decode_scale(packed.scales[:, part.groups], scheme, packed.tensor_scale)[..., None]
    if scheme.asymmetric:
        units = codes.float() - packed.zero_points[:, part.groups, None].float()
    else:
        units = decode_symmetric(codes, scheme.spec)
    values = (units * scale).to(packed.outlier_values.dtype)
    if scheme.outliers:
        places = packed.outlier_indices[:, part.groups].long()
        values = values.scatter(-1, places, packed.outlier_values[:, part.groups])
    return values


def dequantize_reference(packed: Packed, scheme: Scheme, columns: int) -> Tensor:
    """Return the (rows, columns) values of a packed matrix, in the dtype of ``packed.outlier_values``."""
    rows = packed.codes.shape[0]
    values = torch.empty(rows, columns, dtype=packed.outlier_values.dtype, device=packed.codes.device)
    for part in _parts(columns, scheme):
        count = part.groups.stop - part.groups.start
        words = packed.codes[:, part.bytes].reshape(rows, count, packed_length(part.length, scheme.spec.bits))
        codes = unpack(words, scheme.spec.bits, part.length)
        values[:, part.columns] = _decoded(packed, part, codes, scheme).flatten(1)
    return values


def _tensor_scale(x: Tensor) -> Tensor:
    return tensor_scale_of(x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32))


def quantize(
    x: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    noise: Noise | None = None,
    *,
    values: bool = True,
    packed: bool = True,
) -> tuple[Tensor | None, Packed | None]:
    """Quantize a matrix by the fastest way there is; see :func:`quantize_reference`.

    Args:
        x: (rows, columns), floating point.
        scheme: the format and its groups along the columns.
        dtype: of the values returned.
        noise: for stochastic rounding.
        values: whether the values are wanted.
        packed: whether the packed matrix is wanted.

    Returns:
        What was wanted, and None for what was not.
    """
    for backend in (four_bit_cpu, four_bit_triton):
        if backend.takes(x, dtype):
            out = torch.empty(x.shape, dtype=dtype, device=x.device) if values else None
            rows, columns = x.shape
            filled = empty_packed(rows, columns, scheme, dtype, x.device)
            if scheme.spec.scale == "e4m3":
                filled.tensor_scale.copy_(_tensor_scale(x))
            if x.numel():
                backend.quantize(x, out, filled, scheme, noise, store_codes=packed)
            return out, filled if packed else None
    found_values, found = quantize_reference(x, scheme, dtype, noise)
    return found_values if values else None, found if packed else None


def dequantize(packed: Packed, scheme: Scheme, columns: int) -> Tensor:
    """Return the (rows, columns) values of a packed matrix by the fastest way there is."""
    for backend in (four_bit_cpu, four_bit_triton):
        if backend.takes(packed.codes, packed.outlier_values.dtype):
            shape = packed.codes.shape[0], columns
            out = torch.empty(shape, dtype=packed.outlier_values.dtype, device=packed.codes.device)
            if out.numel():
                backend.dequantize(packed, out, scheme)
            return out
    return dequantize_reference(packed, scheme, columns)


def fake_quantize_fp8(x: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Return (rows, columns) values rounded to E4M3 with an fp32 scale for each group.

    So DeepSeek-V3 (arXiv 2412.19437) scales what it multiplies in eight bits. A last group may be short; a group that
    holds infinity or NaN becomes NaN.
    """
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group_size)).view(rows, -1, group_size)
    most = padded.abs().amax(dim=-1, keepdim=True)
    finite = most.isfinite()
    scale = (most / torch.full_like(most, LARGEST_E4M3)).clamp_min(SMALLEST_NORMAL)
    units = torch.where(finite, padded / scale, 0.0).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    values = units.to(torch.float8_e4m3fn).float() * torch.where(finite, scale, torch.nan)
    return values.view(rows, -1)[:, :columns].to(dtype)
