"""4-bit codes between the least and the greatest element of a block: MicroAdam's error buffer (arXiv 2405.15593).

Sixteen equidistant levels δ + code·u, u = (Δ - δ)/15, lines 7 and 8 of Algorithm 1. The bounds are rounded to bf16, as
which they are kept, *before* elements are coded, so coding and decoding speak of the same levels; an element that
rounding left outside gets the nearest level. A constant block has u = 0 and code 0: no division by zero.

Two codes share a byte, that of the even element in the high half. Blocks run over the flattened tensor, have an even
length, and only the last one may be short.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

LEVELS = 16


def error_bounds(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Return δ and Δ, the least and the greatest element of each block.

    Args:
        values: (n,) fp32, finite.
        block_size: elements in a block.

    Returns:
        Two (blocks,) bf16 tensors, rounded to nearest.
    """
    padding = -len(values) % block_size
    low = pad(values, (0, padding), value=torch.inf).view(-1, block_size).amin(dim=1)
    high = pad(values, (0, padding), value=-torch.inf).view(-1, block_size).amax(dim=1)
    return low.to(torch.bfloat16), high.to(torch.bfloat16)


def encode_error(values: Tensor, low: Tensor, high: Tensor, block_size: int, rounding: Tensor | float = 0.5) -> Tensor:
    """Return packed codes.

    Args:
        values: (n,) fp32, finite.
        low: (blocks,) bf16 δ, from :func:`error_bounds`.
        high: (blocks,) bf16 Δ.
        block_size: elements in a block, even.
        rounding: what is added before the floor: ½ rounds to the nearest level, uniform (n,) fp32 noise in (0, 1)
            rounds stochastically.

    Returns:
        (ceil(n / 2),) uint8.
    """
    delta, level = _levels(low, high, block_size, len(values))
    position = torch.where(level > 0, (values - delta) / level, 0.0)
    codes = torch.floor(position + rounding).clamp(0, LEVELS - 1).to(torch.uint8)
    even, odd = pad(codes, (0, len(codes) % 2)).view(-1, 2).unbind(dim=1)
    return (even << 4) | odd


def decode_error(codes: Tensor, low: Tensor, high: Tensor, block_size: int, length: int) -> Tensor:
    """Undo :func:`encode_error`; returns (length,) fp32."""
    unpacked = torch.stack([codes >> 4, codes & 15], dim=1).flatten()[:length]
    delta, level = _levels(low, high, block_size, length)
    return unpacked.to(torch.float32) * level + delta


def _levels(low: Tensor, high: Tensor, block_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Return δ and u of each element, (length,) fp32."""
    delta = low.float()
    # By a tensor: to divide by a number, CUDA multiplies with its rounded inverse.
    level = (high.float() - delta) / torch.full_like(delta, LEVELS - 1)
    return tuple(values.repeat_interleave(block_size)[:length] for values in (delta, level))  # type: ignore[return-value]
