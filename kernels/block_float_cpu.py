"""Packing, unpacking and quantizing on CPUs: hands a tensor to ``block_float.cpp``; :mod:`.compiled` builds it."""

import ctypes
from array import array
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .block_float_formats import BoxFormat, Noise, Packed
from .compiled import TYPES, build, load

_TYPES = TYPES | {torch.float16: 2}


def run_compiled(
    library: ctypes.CDLL,
    format: BoxFormat,
    shape: tuple[int, int, int],
    noise: Noise | None,
    *,
    x: Tensor | None = None,
    out: Tensor | None = None,
    packed: Packed | None = None,
) -> None:
    """Pack ``x`` into ``packed``, unpack that to ``out``, or quantize ``x`` to ``out``, bit for bit as the references.

    Args:
        library: from :func:`load_library`.
        format: of the codes.
        shape: (rows, columns, inner) of the values. Boxes run along columns; ``inner`` is 1, or more to quantize along
            an axis that is not the last, whose elements are ``inner`` apart. Rows count what is before and after it.
        noise: where rounding is stochastic.
        x: contiguous fp32, bf16 or fp16.
        out: likewise.
        packed: of contiguous tensors.
    """
    values = out if x is None else x
    assert values is not None
    tensors = x, out, *(packed or (None, None))
    pointers = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    settings = format.bits, format.box, format.kind == "affine", noise is not None
    key = (word & 0xFFFFFFFF for word in noise or (0, 0, 0))
    task = array("q", (*pointers, *shape, _TYPES[values.dtype], *settings, *key))
    library.block_float(task.buffer_info()[0], torch.get_num_threads())


@cache
def load_library() -> ctypes.CDLL | None:
    """Return the library, built if need be, or None where it is not wanted or cannot be had.

    Raises:
        ValueError: LOWBIT_LIGHTNING_CPU_KERNEL has a value that means nothing.
    """
    library = load("DynamicStashing", build_library)
    if library is not None:
        library.block_float.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        library.block_float.restype = None
    return library


def build_library(folder: Path) -> Path:
    """Return the path of the library in ``folder``, compiled unless it is there already."""
    return build("block_float", ("block_float_codec.h", "elements.h", "workers.h"), {}, folder)
