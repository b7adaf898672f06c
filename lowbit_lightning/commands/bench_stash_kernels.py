"""The part of ``bench stash`` about packing alone: its bandwidth against ``copy_``, and plain PyTorch's."""

from statistics import median
from typing import Any

import torch
from torch import Tensor

from lowbit_lightning.kernels.block_float import BoxFormat, pack, unpack

from .bench_measure import Copy, Step, seconds

BITS = (8, 4, 2)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_COLUMNS = 2048


def measure(elements: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each dtype and number of bits: seconds of packing, unpacking and of ``copy_`` in the same round.

    Args:
        elements: of the tensor, rounded up to whole rows.
        device: where.
        repeats: rounds, of which the median is taken.
    """
    rows = []
    for dtype_name, dtype in _DTYPES.items():
        x = torch.randn(-(-elements // _COLUMNS), _COLUMNS, device=device).to(dtype)
        for bits in BITS:
            samples = _measure(x, bits, device, repeats)
            row: dict[str, Any] = {"dtype": dtype_name, "bits": bits, "elements": x.numel(), "samples": samples}
            row |= {name: median(values) for name, values in samples.items()}
            rows.append(row)
    return rows


def _measure(x: Tensor, bits: int, device: str, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each operation in each round, every one with cold caches."""
    format, out, cold = BoxFormat(bits), torch.empty_like(x), Copy(device)
    packed, plain = pack(x, format, (0, 0, 0)), eager_pack(x, bits)
    operations: dict[str, Step] = {
        "copy": lambda: out.copy_(x),
        "pack": lambda: pack(x, format, (0, 0, 0)),
        "unpack": lambda: unpack(packed, format, x.shape, x.dtype),
        "eager_pack": lambda: eager_pack(x, bits),
        "eager_unpack": lambda: eager_unpack(*plain, bits, x.dtype),
    }
    operations["eager_unpack"]()
    samples: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(repeats):
        for name, operation in operations.items():
            cold()
            samples[name].append(seconds(operation, device))
    return samples


def eager_pack(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack as one would with torch's own operations: the same format, torch's own noise, another order of codes.

    Args:
        x: (rows, columns), columns a multiple of 16.
        bits: 2, 4 or 8.

    Returns:
        Codes, 8 / bits in a byte, and exponents, both uint8.
    """
    boxes = x.reshape(-1, 16).float()
    exponents = torch.frexp(boxes.abs().amax(1, keepdim=True))[1]
    most = 2 ** (bits - 1) - 1
    levels = torch.floor(torch.ldexp(boxes, bits - 1 - exponents) + torch.rand_like(boxes))
    codes = (levels.clamp_(-most, most) + most).to(torch.uint8)
    if bits < 8:
        parts = codes.view(-1, 16 * bits // 8, 8 // bits).unbind(-1)
        codes = parts[0]
        for place, part in enumerate(parts[1:], 1):
            codes = codes | part << place * bits
    return codes, (exponents + 128).to(torch.uint8)


def eager_unpack(codes: Tensor, exponents: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Undo :func:`eager_pack`, (boxes, 16)."""
    if bits < 8:
        mask = 2**bits - 1
        codes = torch.stack([codes >> place & mask for place in range(0, 8, bits)], dim=-1)
    mantissas = codes.view(-1, 16).float() - (2 ** (bits - 1) - 1)
    return torch.ldexp(mantissas, exponents.int() - (127 + bits)).to(dtype)
