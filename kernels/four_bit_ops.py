"""Quantization of an operand of a matrix product, in eager mode and under ``torch.compile``.

The compiled CPU code is called through addresses, which a compiler of graphs cannot follow. For it the two functions
are operators of torch's own kind, with their shapes told separately. Eager code calls them directly: an operator's
dispatch would take longer than a small matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .four_bit import Noise, dequantize, quantize
from .four_bit_formats import Packed, Scheme, empty_packed


@dataclass(frozen=True)
class Operand:
    """How one operand is quantized: its scheme, and the key of its noise or None to round to the nearest."""

    scheme: Scheme
    noise_key: tuple[int, int] | None = None


def quantized(
    x: Tensor, operand: Operand, dtype: torch.dtype, step: Tensor | None, *, values: bool = True, packed: bool = False
) -> tuple[Tensor | None, Packed | None]:
    """Quantize a (rows, columns) matrix, see :func:`.four_bit.quantize`.

    Args:
        x: the matrix.
        operand: how.
        dtype: of the values.
        step: () int64, the clock of the noise; None without noise.
        values: whether the values are wanted.
        packed: whether the packed matrix is wanted.
    """
    scheme, key = operand.scheme, operand.noise_key
    if not torch.compiler.is_compiling():
        noise = None if key is None or step is None else Noise(*key, int(step))
        return quantize(x, scheme, dtype, noise, values=values, packed=packed)
    seed, stream = key or (0, 0)
    found = _quantize_op(
        x, scheme.format, scheme.group_size, scheme.asymmetric, scheme.outliers, dtype, seed, stream,
        step if key is not None else None, values, packed,
    )  # fmt: skip
    return found[0] if values else None, Packed(*found[1:]) if packed else None


def dequantized(packed: Sequence[Tensor], scheme: Scheme, columns: int) -> Tensor:
    """Return the (rows, columns) values of a packed matrix, given by its parts."""
    if not torch.compiler.is_compiling():
        return dequantize(Packed(*packed), scheme, columns)
    found: Tensor = _dequantize_op(
        list(packed), scheme.format, scheme.group_size, scheme.asymmetric, scheme.outliers, columns
    )
    return found


@torch.library.custom_op("lowbit_lightning::four_bit_quantize", mutates_args=())
def _quantize_op(
    x: Tensor,
    format: str,
    group_size: int,
    asymmetric: bool,
    outliers: int,
    dtype: torch.dtype,
    seed: int,
    stream: int,
    step: Tensor | None,
    values: bool,
    packed: bool,
) -> list[Tensor]:
    noise = None if step is None else Noise(seed, stream, int(step))
    scheme = Scheme(format, group_size, asymmetric, outliers)
    found, parts = quantize(x, scheme, dtype, noise, values=values, packed=packed)
    first = x.new_empty(0, dtype=dtype) if found is None else found
    return [first, *(parts if parts is not None else ())]


@_quantize_op.register_fake
def _(
    x: Tensor,
    format: str,
    group_size: int,
    asymmetric: bool,
    outliers: int,
    dtype: torch.dtype,
    seed: int,
    stream: int,
    step: Tensor | None,
    values: bool,
    packed: bool,
) -> list[Tensor]:
    scheme = Scheme(format, group_size, asymmetric, outliers)
    first = x.new_empty(x.shape if values else (0,), dtype=dtype)
    return [first, *(empty_packed(x.shape[0], x.shape[1], scheme, dtype, x.device) if packed else ())]


@torch.library.custom_op("lowbit_lightning::four_bit_dequantize", mutates_args=())
def _dequantize_op(
    packed: list[Tensor], format: str, group_size: int, asymmetric: bool, outliers: int, columns: int
) -> Tensor:
    return dequantize(Packed(*packed), Scheme(format, group_size, asymmetric, outliers), columns)


@_dequantize_op.register_fake
def _(packed: list[Tensor], format: str, group_size: int, asymmetric: bool, outliers: int, columns: int) -> Tensor:
    parts = Packed(*packed)
    return parts.outlier_values.new_empty(parts.codes.shape[0], columns)
