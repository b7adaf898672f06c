"""What packed tensors look like, and what may be packed; :mod:`.block_float` says what the codes mean."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BFP_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
AFFINE_BITS = (2, 3, 4, 5, 6, 7, 8)
BOXES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (seed, stream, step) of .philox.
Noise = tuple[int, int, int]


@dataclass(frozen=True)
class BoxFormat:
    """How a tensor is quantized.

    Args:
        bits: of a code; 2 to 8, for ``bfp`` also 16.
        box: elements that share an exponent (``bfp``) or a minimum and a step (``affine``): 16, 32, 64 or 128.
        kind: ``bfp`` or ``affine``.
        rounding: ``nearest`` (ties to even) or ``stochastic``.

    Raises:
        ValueError: an argument outside its set.
    """

    bits: int
    box: int = 16
    kind: Literal["bfp", "affine"] = "bfp"
    rounding: Literal["nearest", "stochastic"] = "stochastic"

    def __post_init__(self) -> None:
        _check("kind", self.kind, ("bfp", "affine"))
        _check("rounding", self.rounding, ("nearest", "stochastic"))
        _check("box", self.box, BOXES)
        _check("bits", self.bits, BFP_BITS if self.kind == "bfp" else AFFINE_BITS, f" for kind={self.kind!r}")

    @property
    def stochastic(self) -> bool:
        """Whether rounding takes noise."""
        return self.rounding == "stochastic"

    def row_bytes(self, columns: int) -> int:
        """Return the bytes that the codes of a row of ``columns`` elements take."""
        return -(-columns * self.bits // 8)

    def boxes(self, columns: int) -> int:
        """Return the boxes of a row of ``columns`` elements."""
        return -(-columns // self.box)

    def packed_bytes(self, shape: Sequence[int]) -> int:
        """Return the bytes that a tensor of this shape takes packed, codes and scales."""
        rows, columns = matrix_shape(shape)
        return rows * (self.row_bytes(columns) + self.boxes(columns) * (1 if self.kind == "bfp" else 4))


class Packed(NamedTuple):
    """A packed tensor.

    Attributes:
        codes: (rows, bytes of a row) uint8.
        scales: ``bfp``: (rows, boxes) uint8 exponents; ``affine``: (rows, boxes, 2) bf16, minimum and step.
    """

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.codes.nbytes + self.scales.nbytes


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor seen as a matrix of its last axis; a 0-d tensor is one element."""
    return math.prod(shape[:-1]), (shape[-1] if len(shape) else 1)


def empty_packed(x: Tensor, format: BoxFormat) -> Packed:
    """Return room for a tensor that is going to be packed, beside it."""
    rows, columns = matrix_shape(x.shape)
    codes = x.new_empty((rows, format.row_bytes(columns)), dtype=torch.uint8)
    if format.kind == "bfp":
        return Packed(codes, x.new_empty((rows, format.boxes(columns)), dtype=torch.uint8))
    return Packed(codes, x.new_empty((rows, format.boxes(columns), 2), dtype=torch.bfloat16))


def _check(name: str, value: object, allowed: tuple[object, ...], where: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is out of range: one of {', '.join(map(repr, allowed))}{where}")


def check_input(x: Tensor, format: BoxFormat, noise: "Noise | Tensor | None") -> None:
    """Raise the errors of :func:`.block_float.pack`."""
    if x.dtype not in DTYPES:
        raise TypeError(f"cannot quantize a tensor of {x.dtype}: it must be one of {', '.join(map(str, DTYPES))}")
    if format.rounding == "stochastic" and noise is None:
        raise ValueError("noise=None is out of range for stochastic rounding: give (seed, stream, step)")
    if format.rounding == "nearest" and noise is not None:
        raise ValueError(f"noise={noise} has no use when rounding to nearest: leave it out")


def check_packed(packed: Packed, format: BoxFormat, shape: Sequence[int]) -> None:
    """Raise the error of :func:`.block_float.unpack`: what is of another size would be read beyond its end."""
    rows, columns = matrix_shape(shape)
    codes, boxes = (rows, format.row_bytes(columns)), (rows, format.boxes(columns))
    scales = boxes if format.kind == "bfp" else (*boxes, 2)
    scale_dtype = torch.uint8 if format.kind == "bfp" else torch.bfloat16
    found = tuple(packed.codes.shape), tuple(packed.scales.shape), packed.codes.dtype, packed.scales.dtype
    if found != (codes, scales, torch.uint8, scale_dtype):
        raise ValueError(
            f"packed tensors of shapes {found[0]} and {found[1]}, {found[2]} and {found[3]}, are not what a tensor of "
            f"shape {tuple(shape)} becomes with {format}: shapes {codes} and {scales}, torch.uint8 and {scale_dtype}"
        )
