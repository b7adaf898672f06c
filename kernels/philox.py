"""Philox-4x32-10, the counter-based generator behind all noise of this project.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). A random number is a function of
(seed, stream, step, position), not of a generator's history: a resumed run, every replica of a data-parallel run, a
shard and a chunk all compute the same bits. This is the torch twin, in int64 arithmetic because torch has no 32-bit
multiply-high; ``tl.philox`` gives the same words for ``seed | stream << 32``.

One call yields 128 bits: 8 draws of 16 bits. Draws are laid out planar (draw ``lane`` of call ``i`` belongs to element
``lane * calls + i`` of its block), so that a vector unit needs no shuffles.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor

Purpose = Literal["state", "weight", "error", "stash", "sign", "operand"]

# Multipliers and Weyl key increments of the paper.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10

DRAWS_PER_CALL = 8
# Elements that share their planar draws where a tensor has no rows or blocks of its own to number draws by.
NOISE_BLOCK = 128


def stream_id(name: str, purpose: Purpose) -> int:
    """Return the 32-bit stream of one use of randomness, stable across processes and versions.

    Args:
        name: the parameter's fully qualified name, or its index in the optimizer when it has no name.
        purpose: what the bits are for; two purposes never share bits.
    """
    return int.from_bytes(hashlib.blake2s(f"{purpose}:{name}".encode(), digest_size=4).digest(), "little")


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words for each counter.

    Args:
        counter: four int64 tensors of one (broadcastable) shape holding 32-bit words.
        key: two 32-bit words.

    Returns:
        Four int64 tensors with values in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product's low 64 bits are right in two's complement, so masking the halves is enough.
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c2 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def draw_16bit(seed: int, stream: int, step: int, calls: Tensor) -> Tensor:
    """Return 16-bit draws, eight for each call.

    Args:
        seed: the run's seed; its low 32 bits are used.
        stream: from :func:`stream_id`.
        step: the optimizer step (or any other clock), a 32-bit word of the counter.
        calls: (..., n) int64, the global index of each call; unique among all calls of this (seed, stream, step).

    Returns:
        (..., 8 n) int32 in [0, 65536), draw ``lane`` of call ``i`` at ``[..., lane * n + i]``.
    """
    zero = torch.zeros((), dtype=torch.int64, device=calls.device)
    words = philox_4x32((calls & _MASK, (calls >> 32) & _MASK, zero + (step & _MASK), zero), (seed & _MASK, stream))
    return torch.cat([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1).to(torch.int32)


def block_calls(first_block: int, blocks: int, calls_per_block: int, device: torch.device) -> Tensor:
    """Return the call indices of consecutive equal blocks, (blocks, calls_per_block) int64, row-major."""
    calls = torch.arange(first_block * calls_per_block, (first_block + blocks) * calls_per_block, device=device)
    return calls.view(blocks, calls_per_block)


def element_draws(seed: int, stream: int, step: int, start: int, stop: int, device: torch.device) -> Tensor:
    """Return the draws of elements ``start`` to ``stop`` of a flattened tensor, (stop - start,) int32."""
    first, calls = start // NOISE_BLOCK, NOISE_BLOCK // DRAWS_PER_CALL
    draws = draw_16bit(seed, stream, step, block_calls(first, -(-stop // NOISE_BLOCK) - first, calls, device))
    return draws.flatten()[start - first * NOISE_BLOCK : stop - first * NOISE_BLOCK]
