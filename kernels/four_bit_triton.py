"""Quantizing and dequantizing on CUDA: launches of the kernels in :mod:`.four_bit_triton_kernels`, one for a matrix.

Nothing waits for the device, and step, seed and shape are data: no change of them compiles anything. Not yet run on a
GPU. For a bf16 activation in groups of 256 with two outliers, 2 bytes of an element are read and 2.54 written.

triton is imported at the first launch, not with this file.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .four_bit_formats import Packed, Scheme
from .solo_triton import is_available

if TYPE_CHECKING:
    from .four_bit import Noise

_DTYPES = (torch.float32, torch.bfloat16)
# Elements of a program's tile: eight lanes of 128 positions, four to a thread of one warp.
_TILE_ELEMENTS = 1024
_FORMS = {"uniform": 0, "e2m1": 1}
_ASYMMETRIC = 2
_SCALES = {"fp32": 0, "e4m3": 1, "e8m0": 2}


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the kernels can treat this matrix, or these codes, and give values of ``dtype``."""
    return x.is_cuda and dtype in _DTYPES and (x.dtype in _DTYPES or x.dtype == torch.uint8) and is_available()


def quantize(
    x: Tensor, out: Tensor | None, packed: Packed, scheme: Scheme, noise: "Noise | None", *, store_codes: bool
) -> None:
    """Fill ``out`` and ``packed``, bit for bit as :func:`.four_bit.quantize_reference`; see :mod:`.four_bit_cpu`."""
    from . import four_bit_triton_kernels as kernels

    x = x.contiguous()
    rows, columns = x.shape
    groups = rows * scheme.groups(columns)
    tile, calls = _tile(scheme)
    key = (noise.seed, noise.stream, noise.step) if noise is not None else (0, 0, 0)
    kernels.quantize[(-(-groups // tile),)](
        _bits(x), _bits(x if out is None else out), *map(_bits, packed), groups, columns, *map(_signed, key),
        **_settings(scheme), NOISE=noise is not None, IN_BF16=x.dtype == torch.bfloat16,
        OUT_BF16=packed.outlier_values.dtype == torch.bfloat16, HAS_OUT=out is not None, HAS_CODES=store_codes,
        TILE=tile, CALLS=calls, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def dequantize(packed: Packed, out: Tensor, scheme: Scheme) -> None:
    """Fill ``out``, contiguous and not empty, bit for bit as :func:`.four_bit.dequantize_reference`."""
    from . import four_bit_triton_kernels as kernels

    rows, columns = out.shape
    groups = rows * scheme.groups(columns)
    tile, calls = _tile(scheme)
    parts = Packed(*(part.contiguous() for part in packed))
    kernels.dequantize[(-(-groups // tile),)](
        _bits(out), *map(_bits, parts), groups, columns, **_settings(scheme),
        OUT_BF16=out.dtype == torch.bfloat16, TILE=tile, CALLS=calls, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def _settings(scheme: Scheme) -> dict[str, int | float]:
    spec = scheme.spec
    return {
        "GROUP": scheme.group_size,
        "BITS": spec.bits,
        "FORM": _ASYMMETRIC if scheme.asymmetric else _FORMS[spec.grid],
        "LARGEST": float(2**spec.bits - 1) if scheme.asymmetric else spec.largest,
        "KIND": _SCALES[spec.scale],
        "OUTLIERS": scheme.outliers,
    }


def _tile(scheme: Scheme) -> tuple[int, int]:
    """Return groups and calls (a power of two) of a program."""
    calls = 1 << (scheme.group_size // 8 - 1).bit_length()
    return max(1, _TILE_ELEMENTS // (8 * calls)), calls


def _bits(part: Tensor) -> Tensor:
    # As integers, because values must not be cast to bf16 in the kernel.
    return part.view(torch.int16) if part.dtype == torch.bfloat16 else part


def _signed(word: int) -> int:
    """Return a 32-bit word as the signed number that Triton takes for one."""
    word &= 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word
