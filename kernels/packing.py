"""Bit packing of 2-, 3-, 4- and 8-bit codes, planar within a block.

With ``n`` codes to a word, code ``j`` of a block of length L shares its word with ``j + L/n``, ``j + 2L/n`` and so on,
the first in the highest bits:

    bits  codes per word  bytes per word   a block of 128 takes
      2         4               1               32 bytes
      3         8               3               48 bytes (three planes of 16, high byte first)
      4         2               1               64 bytes
      8         1               1              128 bytes

Neighbouring elements thus sit in neighbouring bytes, which vector units on CPU and GPU load without shuffling.
"""

import torch
from torch import Tensor

# bits -> (codes per word, bytes per word)
_WORD = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


def packed_length(length: int, bits: int) -> int:
    """Return the bytes that a block of ``length`` codes takes; a length that is no multiple of 8 is padded to one."""
    return -(-length // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis.

    Args:
        codes: (..., L) uint8, each below ``2**bits``.
        bits: 2, 3, 4 or 8.

    Returns:
        (..., packed_length(L, bits)) uint8.
    """
    per_word, bytes_per_word = _WORD[bits]
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    planes = codes.to(torch.int32).unflatten(-1, (per_word, codes.shape[-1] // per_word))
    word = planes[..., 0, :]
    for plane in range(1, per_word):
        word = (word << bits) | planes[..., plane, :]
    parts = [(word >> (8 * byte)) & 0xFF for byte in reversed(range(bytes_per_word))]
    return torch.cat(parts, dim=-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: (..., packed_length(length, bits)) uint8.
        bits: 2, 3, 4 or 8.
        length: L, the number of codes to return.

    Returns:
        (..., length) uint8.
    """
    per_word, bytes_per_word = _WORD[bits]
    planes = packed.to(torch.int32).unflatten(-1, (bytes_per_word, packed.shape[-1] // bytes_per_word))
    word = planes[..., 0, :]
    for byte in range(1, bytes_per_word):
        word = (word << 8) | planes[..., byte, :]
    mask = (1 << bits) - 1
    codes = torch.cat([(word >> (bits * plane)) & mask for plane in reversed(range(per_word))], dim=-1)
    return codes[..., :length].to(torch.uint8)
