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

The references are in :mod:`.block_float_reference`; CPUs take a compiled path and CUDA a Triton kernel, equal to them
bit for bit. Under torch.compile the three functions are custom operators, which take noise as a tensor on the CPU: give
one (int64, of seed, stream and step) instead of three numbers, and a new step compiles nothing. Nothing here has a
gradient: call it from an ``autograd.Function``.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import block_float_cpu, block_float_triton
from .block_float_formats import (
    AFFINE_BITS,
    BFP_BITS,
    BOXES,
    DTYPES,
    BoxFormat,
    Noise,
    Packed,
    check_input,
    check_packed,
    empty_packed,
    matrix_shape,
)
from .block_float_reference import pack_reference, quantize_reference, unpack_reference

__all__ = [
    "AFFINE_BITS",
    "BFP_BITS",
    "BOXES",
    "DTYPES",
    "BoxFormat",
    "Noise",
    "Packed",
    "empty_packed",
    "matrix_shape",
    "pack",
    "pack_reference",
    "quantize",
    "quantize_reference",
    "unpack",
    "unpack_reference",
]


def pack(x: Tensor, format: BoxFormat, noise: Noise | Tensor | None = None) -> Packed:
    """Quantize and pack a tensor in boxes along its last axis.

    Args:
        x: fp32, bf16 or fp16 of any shape and strides.
        format: how.
        noise: (seed, stream, step), see :mod:`.philox`, or an int64 tensor of them on the CPU; needed if, and only if,
            ``format.rounding`` is stochastic.

    Raises:
        ValueError: noise that is missing or not wanted.
        TypeError: a tensor of another dtype.
    """
    check_input(x, format, noise)
    if _is_traced(x):
        return Packed(*_pack_operator(x, *_settings(format), _as_tensor(noise)))
    return _pack(x, format, _as_numbers(noise))


def unpack(packed: Packed, format: BoxFormat, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the values of a packed tensor.

    Args:
        packed: from :func:`pack`, with the same format.
        format: of the codes.
        shape: of the tensor that was packed.
        dtype: fp32, bf16 or fp16, the result's.

    Returns:
        A contiguous tensor of this shape and dtype.

    Raises:
        ValueError: ``packed`` is not of this shape and format.
    """
    check_packed(packed, format, shape)
    if _is_traced(packed.codes):
        values: Tensor = _unpack_operator(*packed, *_settings(format), list(shape), dtype)
        return values
    return _unpack(packed, format, shape, dtype)


def quantize(x: Tensor, format: BoxFormat, noise: Noise | Tensor | None = None, axis: int = -1) -> Tensor:
    """Return what unpacking a packed tensor would, without packing: what the inputs of a quantized GEMM are.

    Args:
        x: fp32, bf16 or fp16 of any shape and strides.
        format: how.
        noise: as in :func:`pack`.
        axis: along which boxes run.

    Returns:
        A contiguous tensor of the dtype and shape of ``x``.

    Raises:
        ValueError: noise that is missing or not wanted.
        IndexError: there is no such axis.
        TypeError: a tensor of another dtype.
    """
    check_input(x, format, noise)
    if not -max(x.ndim, 1) <= axis < max(x.ndim, 1):
        raise IndexError(f"axis={axis} is out of range: a tensor of shape {tuple(x.shape)} has no such axis")
    if _is_traced(x):
        values: Tensor = _quantize_operator(x, *_settings(format), _as_tensor(noise), axis)
        return values
    return _quantize(x, format, _as_numbers(noise), axis)


# ---- the fastest way there is -----------------------------------------------------------------------------------


def _runner(x: Tensor) -> Callable[..., None] | None:
    """Return what treats tensors on the device of ``x``, None for the reference."""
    if block_float_triton.takes(x):
        return block_float_triton.launch
    library = block_float_cpu.load_library() if x.is_cpu else None
    return None if library is None else partial(block_float_cpu.run_compiled, library)


def _pack(x: Tensor, format: BoxFormat, noise: Noise | None) -> Packed:
    run = _runner(x)
    if run is None:
        return pack_reference(x, format, noise)
    rows, columns = matrix_shape(x.shape)
    packed = empty_packed(x, format)
    run(format, (rows, columns, 1), noise, x=x.contiguous(), packed=packed)
    return packed


def _unpack(packed: Packed, format: BoxFormat, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    run = _runner(packed.codes)
    if run is None:
        return unpack_reference(packed, format, shape, dtype)
    packed = Packed(packed.codes.contiguous(), packed.scales.contiguous())
    out = packed.codes.new_empty(tuple(shape), dtype=dtype)
    run(format, (*matrix_shape(shape), 1), None, out=out, packed=packed)
    return out


def _quantize(x: Tensor, format: BoxFormat, noise: Noise | None, axis: int) -> Tensor:
    run = _runner(x)
    if run is None:
        return quantize_reference(x, format, noise, axis)
    shape, last = x.shape, x.ndim - 1
    axis = axis % x.ndim if x.ndim else 0
    inner = 1 if axis >= last else math.prod(shape[axis + 1 :])
    columns = shape[axis] if x.ndim else 1
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    run(format, (math.prod(shape[:axis]) * inner, columns, inner), noise, x=x.contiguous(), out=out)
    return out


# ---- operators for torch.compile --------------------------------------------------------------------------------


def _is_traced(x: Tensor) -> bool:
    """Return whether a compiler is looking; to call an operator takes 0.1 ms, more than packing most tensors."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def _as_tensor(noise: Noise | Tensor | None) -> Tensor | None:
    return torch.tensor(noise, dtype=torch.int64) if isinstance(noise, tuple) else noise


def _as_numbers(noise: Noise | Tensor | None) -> Noise | None:
    if not isinstance(noise, Tensor):
        return noise
    seed, stream, step = noise.tolist()
    return seed, stream, step


def _settings(format: BoxFormat) -> tuple[int, int, bool]:
    return format.bits, format.box, format.kind == "affine"


def _format(bits: int, box: int, affine: bool, stochastic: bool = False) -> BoxFormat:
    return BoxFormat(bits, box, "affine" if affine else "bfp", "stochastic" if stochastic else "nearest")


@torch.library.custom_op("lowbit_lightning::block_float_pack", mutates_args=())
def _pack_operator(x: Tensor, bits: int, box: int, affine: bool, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    packed = _pack(x, _format(bits, box, affine, noise is not None), _as_numbers(noise))
    return packed.codes, packed.scales


@torch.library.custom_op("lowbit_lightning::block_float_unpack", mutates_args=())
def _unpack_operator(
    codes: Tensor, scales: Tensor, bits: int, box: int, affine: bool, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return _unpack(Packed(codes, scales), _format(bits, box, affine), shape, dtype)


@torch.library.custom_op("lowbit_lightning::block_float_quantize", mutates_args=())
def _quantize_operator(x: Tensor, bits: int, box: int, affine: bool, noise: Tensor | None, axis: int) -> Tensor:
    return _quantize(x, _format(bits, box, affine, noise is not None), _as_numbers(noise), axis)


@_pack_operator.register_fake
def _(x: Tensor, bits: int, box: int, affine: bool, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    packed = empty_packed(x, _format(bits, box, affine))
    return packed.codes, packed.scales


@_unpack_operator.register_fake
def _(codes: Tensor, scales: Tensor, bits: int, box: int, affine: bool, shape: list[int], dtype: torch.dtype) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


@_quantize_operator.register_fake
def _(x: Tensor, bits: int, box: int, affine: bool, noise: Tensor | None, axis: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
