"""What bits each kind of saved tensor gets now: the one place that a schedule of precision has to write to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit_lightning.errors import InvalidArgumentError
from lowbit_lightning.kernels.block_float import AFFINE_BITS, BFP_BITS, BOXES, BoxFormat

Kind = Literal["linear", "attention", "activation", "norm", "convolution", "loss", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Kinds that lose too much below so many bits. What generic hooks pack ("other") comes from operations whose backward
#: formulas may assume identities between the tensors they saved, which hold after rounding to 8 bits but not to 4.
FLOORS: Mapping[Kind, int] = {"norm": 8, "loss": 8, "other": 8}


@dataclass
class StashPrecision:
    """Bits of the stash, by kind of tensor.

    Args:
        bits: what every kind gets, or its floor where that is higher: 4 bits for inputs of norms, 8 for the hidden
            states that the loss recomputes logits from and for what generic hooks pack.
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
        allowed = BFP_BITS if self.format == "bfp" else AFFINE_BITS
        _check("bits", self.bits, allowed, f" for format={self.format!r}")
        for kind, bits in self.by_kind.items():
            _check("kind", kind, KINDS)
            _check(f"bits of {kind}", bits, allowed, f" for format={self.format!r}")

    def of(self, kind: Kind) -> BoxFormat:
        """Return the format that tensors of a kind are packed in from now on."""
        bits = max(self.by_kind.get(kind, self.bits), FLOORS.get(kind, 0))
        return BoxFormat(bits, self.box, self.format, self.rounding)

    def describe(self) -> str:
        """Return it in a few words."""
        bits = {kind: self.of(kind).bits for kind in KINDS}
        others = ", ".join(f"{kind} {count}" for kind, count in bits.items() if count != self.bits)
        rest = f" ({others})" if others else ""
        return f"{self.bits} bits{rest}, {self.format}, boxes of {self.box}, {self.rounding} rounding"


def _check(name: str, value: object, allowed: tuple[object, ...], where: str = "") -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name}={value!r} is out of range: one of {', '.join(map(repr, allowed))}{where}")
