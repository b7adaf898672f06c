"""Exact top-k by magnitude within blocks, with ties decided by position.

``torch.topk`` leaves open which of two equal values it takes, and answers differently on CPU and GPU. Here the lower
index wins, so that every path selects the same elements and a resumed or replicated run stays the same bit for bit.
"""

import torch
from torch import Tensor

# An index has to fit the 16 bits that stand for it in a key and in the optimizer's state.
LARGEST_BLOCK = 1 << 16


def top_k(values: Tensor, k: int) -> Tensor:
    """Return where the k largest magnitudes of each row are, the lower index first among equals.

    Args:
        values: (rows, length) fp32 without NaN; length at most 65536.
        k: at most ``length``.

    Returns:
        (rows, k) int64, ascending.
    """
    # Magnitudes are ordered as their bits; with the reversed index below them, all keys of a row differ.
    magnitude = values.abs().view(torch.int32).to(torch.int64)
    reversed_index = torch.arange(LARGEST_BLOCK - 1, LARGEST_BLOCK - 1 - values.shape[1], -1, device=values.device)
    keys = (magnitude << 16) | reversed_index
    chosen = keys.topk(k, dim=1, sorted=False).values
    return (LARGEST_BLOCK - 1 - (chosen & (LARGEST_BLOCK - 1))).sort(dim=1).values
