"""Quantizing and dequantizing on CPUs: hands a matrix to ``four_bit.cpp``; :mod:`.compiled` builds it."""

import ctypes
from array import array
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .compiled import TYPES, build, constants_header, load
from .elementary import SMALLEST_NORMAL
from .four_bit_formats import E4M3_NAN, E8M0_NAN, LARGEST_E4M3, LARGEST_GROUP, Packed, Scheme

if TYPE_CHECKING:
    from .four_bit import Noise

_FORMS = {"uniform": 0, "e2m1": 1}
_ASYMMETRIC = 2
_SCALES = {"fp32": 0, "e4m3": 1, "e8m0": 2}


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the library can treat this matrix, or these codes, and give values of ``dtype``."""
    if not x.is_cpu or dtype not in TYPES or not (x.dtype in TYPES or x.dtype == torch.uint8):
        return False
    return load_library() is not None


def quantize(
    x: Tensor, out: Tensor | None, packed: Packed, scheme: Scheme, noise: "Noise | None", *, store_codes: bool
) -> None:
    """Fill ``out`` and ``packed``, bit for bit as :func:`.four_bit.quantize_reference`.

    Args:
        x: (rows, columns) such as :func:`takes` accepts, not empty.
        out: contiguous, or None.
        packed: of nvfp4, ``tensor_scale`` is there already. Its codes are written only if ``store_codes``.
        scheme: the format and its groups.
        noise: for stochastic rounding.
        store_codes: whether the codes are wanted.
    """
    x = x.contiguous()
    bits = (1, noise.seed & 0xFFFFFFFF, noise.stream, noise.step & 0xFFFFFFFF) if noise is not None else (0, 0, 0, 0)
    table = _table(x, out, packed, scheme, x.shape[1], TYPES[x.dtype], (int(store_codes), *bits))
    _library().four_bit_quantize(table.buffer_info()[0], torch.get_num_threads())


def dequantize(packed: Packed, out: Tensor, scheme: Scheme) -> None:
    """Fill ``out``, contiguous and not empty, bit for bit as :func:`.four_bit.dequantize_reference`."""
    parts = Packed(*(part.contiguous() for part in packed))
    table = _table(None, out, parts, scheme, out.shape[1], 0, (0, 0, 0, 0, 0))
    _library().four_bit_dequantize(table.buffer_info()[0], torch.get_num_threads())


def _table(
    x: Tensor | None,
    out: Tensor | None,
    packed: Packed,
    scheme: Scheme,
    columns: int,
    in_type: int,
    rounding: tuple[int, ...],
) -> "array[int]":
    spec = scheme.spec
    form = _ASYMMETRIC if scheme.asymmetric else _FORMS[spec.grid]
    largest = 2**spec.bits - 1 if scheme.asymmetric else int(spec.largest)
    pointers = [0 if one is None else one.data_ptr() for one in (x, out, *packed)]
    matrix = packed.codes.shape[0], columns, in_type, TYPES[packed.outlier_values.dtype]
    wide = int(packed.outlier_indices.dtype == torch.int16)
    kind = scheme.group_size, spec.bits, form, largest, _SCALES[spec.scale], scheme.outliers, wide
    return array("q", (*pointers, *matrix, *kind, *rounding))


def _library() -> ctypes.CDLL:
    library = load_library()
    assert library is not None  # takes() has asked
    return library


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, built if need be, or None where it is not wanted or cannot be had.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    library = load("FourBitPrecision", build_library)
    if library is not None:
        for function in (library.four_bit_quantize, library.four_bit_dequantize):
            function.argtypes = (ctypes.c_void_p, ctypes.c_int64)
            function.restype = None
    return library


def build_library(folder: Path) -> Path:
    """Return the path of the library in ``folder``, compiled unless it is there already."""
    constants = constants_header(
        {"SMALLEST_NORMAL": SMALLEST_NORMAL, "LARGEST_E4M3": LARGEST_E4M3},
        {"LARGEST_GROUP": LARGEST_GROUP, "E4M3_NAN": E4M3_NAN, "E8M0_NAN": E8M0_NAN},
        {},
    )
    return build("four_bit", ("packing.h", "elements.h", "workers.h"), {"four_bit_constants.h": constants}, folder)
