"""Packing, unpacking and quantizing on CUDA: launches of the kernels in :mod:`.block_float_triton_kernels`.

Nothing waits for the device, and another step or seed compiles nothing. triton is imported at the first launch, not
with this file.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .block_float_formats import BoxFormat, Noise, Packed

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# That a program treats: eight for each of 128 threads.
_ELEMENTS = 1024


@cache
def is_available() -> bool:
    """Return whether triton is installed, without importing it."""
    return find_spec("triton") is not None


def takes(x: Tensor) -> bool:
    """Return whether the kernels can treat this tensor: on CUDA, and triton is there."""
    return x.is_cuda and is_available()


def launch(
    format: BoxFormat,
    shape: tuple[int, int, int],
    noise: Noise | None,
    *,
    x: Tensor | None = None,
    out: Tensor | None = None,
    packed: Packed | None = None,
) -> None:
    """Pack, unpack or quantize, see :func:`.block_float_cpu.run_compiled`, bit for bit as the references."""
    from .block_float_triton_kernels import block_float

    rows, columns, inner = shape
    values = out if x is None else x
    assert values is not None
    boxes_per_row = format.boxes(columns)
    if not rows * columns:
        return
    boxes_at_a_time = _ELEMENTS // format.box
    programs = -(-rows * boxes_per_row // boxes_at_a_time)
    if inner > 1:  # programs treat the same box of neighbouring rows, which lie beside each other in memory
        programs = -(-rows // boxes_at_a_time) * boxes_per_row
    codes, scales = packed or (values, values)
    if packed is not None and format.bits == 16:
        codes = codes.view(torch.int16)
    block_float[(programs,)](
        _bits(values if x is None else x), _bits(values if out is None else out), codes, _bits(scales),
        rows, columns, inner, boxes_per_row, format.row_bytes(columns), *map(_signed, noise or (0, 0, 0)),
        READS=x is not None, PACKED=packed is not None, STOCHASTIC=noise is not None, AFFINE=format.kind == "affine",
        BITS=format.bits, BOX=format.box, BOXES=boxes_at_a_time, DTYPE=_DTYPES[values.dtype], STRIDED=inner > 1,
        EVEN=columns % format.box == 0, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _bits(tensor: Tensor) -> Tensor:
    """Return bf16 as int16: Triton's interpreter has no bf16 arithmetic."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _signed(word: int) -> int:
    """Return a 32-bit word as the int32 of its bits: larger arguments would be compiled for as 64-bit ones."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
