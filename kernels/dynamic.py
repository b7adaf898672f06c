"""The signed dynamic-exponent format, for first moments.

A block is scaled by its largest magnitude and every element takes the nearest entry of a fixed map whose steps shrink
tenfold from one exponent to the next (Dettmers et al., arXiv 2110.02861). SOLO (arXiv 2505.00347) uses it for the
first moment at 2 to 8 bits with all bits but the sign given to the exponent. A value exactly between two entries takes
the upper one, as in the authors' code.
"""

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .stochastic_rounding import round_scale


@lru_cache
def dynamic_map(bits: int) -> tuple[float, ...]:
    """Return the ascending map of a ``bits``-bit signed dynamic format, ``2**bits`` entries in [-1, 1].

    Exponent ``e`` of ``bits - 1`` holds ``2**e`` midpoints of equal parts of [0.1, 1], scaled by
    ``10**(e - bits + 2)``; to these and their negatives come 0 and 1 (there is no -1).
    """
    exponents = bits - 1
    positive = [
        10.0 ** (exponent - exponents + 1) * (0.1 + 0.9 * (index + 0.5) / 2**exponent)
        for exponent in range(exponents)
        for index in range(2**exponent)
    ]
    return tuple(sorted([-value for value in positive] + [0.0] + positive + [1.0]))


@lru_cache
def dynamic_midpoints(bits: int) -> tuple[float, ...]:
    """Return the ``2**bits - 1`` values from which on the next entry of the map is taken."""
    entries = dynamic_map(bits)
    return tuple((low + high) / 2 for low, high in pairwise(entries))


def dynamic_resolution(bits: int) -> float:
    """Return the median half-gap between neighbouring entries, SOLO's measure r(b) of a format's rounding noise."""
    entries = dynamic_map(bits)
    gaps = sorted(high - low for low, high in pairwise(entries))
    return gaps[len(gaps) // 2] / 2


def encode_dynamic(values: Tensor, bits: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Quantize blocks to the nearest map entry.

    Args:
        values: (blocks, L) fp32, finite.
        bits: 2 to 8.
        scale_dtype: of the scale, fp32 or bf16; codes are relative to the rounded one.

    Returns:
        codes (blocks, L) uint8 and scale (blocks,), the block's largest magnitude. A zero block has scale 0.
    """
    scale = round_scale(values.abs().amax(dim=-1), scale_dtype)
    # A zero block multiplies by a finite number, so its elements stay 0 and take the code of the map's 0.
    normalized = values * (1.0 / scale.float().clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    midpoints = torch.tensor(dynamic_midpoints(bits), dtype=torch.float32, device=values.device)
    codes = torch.bucketize(normalized, midpoints, right=True, out_int32=True)
    return codes.to(torch.uint8), scale


def decode_dynamic(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return (blocks, L) fp32 values of codes (blocks, L) uint8 with scale (blocks,)."""
    entries = torch.tensor(dynamic_map(bits), dtype=torch.float32, device=codes.device)
    return entries[codes.int()] * scale.unsqueeze(-1).to(torch.float32)
