"""Bits for every kind of tensor so that a batch's stash stays within so many bytes, with the least error of gradients.

Where one kind alone is packed, the squared relative error of the whole gradient is about ``sensitivity · 4^-bits``. The
sensitivities below were measured so on small Llama and GPT-2 models at 4 and 8 bits, which agree. So a bit more for a
kind is worth ``¾ · sensitivity · 4^-bits`` and costs an eighth of a byte an element, and bits go where that is best.
"""

from collections.abc import Mapping

from lowbit_lightning.stash.precision import FLOORS, Kind

#: Of kinds whose bits are chosen; the others have a floor of 8 bits, which is as much as is ever chosen.
SENSITIVITY: Mapping[Kind, float] = {"linear": 2.5, "attention": 0.01, "activation": 1.9, "convolution": 2.5}
LOWEST_BITS, HIGHEST_BITS = 2, 8


def lowest_bits() -> dict[Kind, int]:
    """Return the bits that a run starts with, before it is known what it keeps."""
    return dict.fromkeys(SENSITIVITY, LOWEST_BITS)


def bits_within(budget: float, kept: float, elements: Mapping[Kind, int], now: Mapping[Kind, int]) -> dict[Kind, int]:
    """Choose bits.

    Args:
        budget: bytes that a batch may keep.
        kept: bytes that it kept with the present bits.
        elements: by kind, how many were packed.
        now: the present bits, by kind.

    Returns:
        Bits by kind, at least 2 and at most 8; all 2 where not even that is within the budget.
    """
    bits = lowest_bits()
    left = 8 * (budget - kept) + sum(elements.get(kind, 0) * (now[kind] - low) for kind, low in bits.items())

    def worth(kind: Kind) -> float:
        count = elements.get(kind, 0)
        return SENSITIVITY[kind] * 4.0 ** -bits[kind] / count if count else 0.0

    open_kinds = set(bits)
    while open_kinds:
        kind = max(sorted(open_kinds), key=worth)
        cost = elements.get(kind, 0)
        if bits[kind] == HIGHEST_BITS or cost > left:
            open_kinds.discard(kind)
            continue
        bits[kind] += 1
        left -= cost
    assert not bits.keys() & FLOORS.keys()
    return bits
