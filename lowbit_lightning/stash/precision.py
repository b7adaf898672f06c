"""What bits each kind of saved tensor gets now: the one place that a schedule of precision has to write to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.block_float import AFFINE_BITS, BFP_BITS, BOXES, BoxFormat

Kind = Literal["linear", "attention", "activation", "norm", "dropout", "convolution", "loss", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: The number of bits that means: not packed.
OFF = 32

#: Kinds that lose too much below so many bits. What generic hooks pack ("other") comes from operations whose backward
#: formulas may assume identities between the tensors they saved, which hold after rounding to 8 bits but not to 4.
FLOORS: Mapping[Kind, int] = {"norm": 8, "loss": 8, "other": 8}


@dataclass
class StashPrecision:
    """Bits of the stash, by kind of tensor.

    Args:
        bits: what every kind gets, 32 being not packed, or its floor where that is higher: 8 bits for inputs of norms,
            of which those of linear layers are recomputed, for hidden states, of which the loss recomputes logits, and
            for what generic hooks pack.
        format: ``bfp`` or ``affine``, see :mod:`lowbit_lightning.kernels.block_float`.
        box: elements that share a scale.
        rounding: ``nearest`` or ``stochastic``.
        by_kind: bits of single kinds in place of ``bits``.

    Raises:
        InvalidArgumentError: bits, a box, a format or a rounding that does not exist.
    """

    bits: int
    format: Literal["bfp", "affine"] = "bfp"
    box: int = 16
    rounding: Literal["nearest", "stochastic"] = "stochastic"
    by_kind: dict[Kind, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check("format", self.format, ("bfp", "affine"))
        _check("box", self.box, BOXES)
        _check("rounding", self.rounding, ("nearest", "stochastic"))
        allowed = (*BFP_BITS, OFF)
        _check("bits", self.bits, allowed)
        for kind, bits in self.by_kind.items():
            _check("kind", kind, KINDS)
            _check(f"bits of {kind}", bits, allowed)

    def of(self, kind: Kind) -> BoxFormat | None:
        """Return the format that tensors of a kind are packed in from now on; None leaves them as they are."""
        bits = max(self.by_kind.get(kind, self.bits), FLOORS.get(kind, 0))
        if bits == OFF:
            return None
        # There is no affine code of 16 bits.
        return BoxFormat(bits, self.box, self.format if bits in AFFINE_BITS else "bfp", self.rounding)

    def describe(self) -> str:
        """Return it in a few words."""
        formats = {kind: self.of(kind) for kind in KINDS if kind != "dropout"}
        bits = {kind: OFF if chosen is None else chosen.bits for kind, chosen in formats.items()}
        others = ", ".join(f"{kind} {count}" for kind, count in bits.items() if count != self.bits)
        rest = f" ({others})" if others else ""
        return f"{self.bits} bits{rest}, {self.format}, boxes of {self.box}, {self.rounding} rounding"


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name}={value!r} is out of range: one of {', '.join(map(repr, allowed))}")
