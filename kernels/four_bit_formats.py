"""The 4-bit (and 3- and 2-bit) number formats of FourBitPrecision: grids, scales and their encodings.

A group of numbers shares a scale; each is a code that names a point of the format's grid, in units of the scale.

    format       grid of the symmetric form                         group   scale of the group
    int4/3/2     integers to ±7 / ±3 / ±1                           any     fp32: its largest value is the last point
    fp4          E2M1: 0, ½, 1, 1½, 2, 3, 4, 6 and their negatives  any     fp32, likewise
    fp4_uniform  integers to ±4                                     any     fp32, likewise
    nvfp4        E2M1                                               16      E4M3, times one fp32 scale of the tensor
    mxfp4        E2M1                                               32      E8M0, a power of two

``fp4_uniform`` is what the published code of Stable-SPAM (arXiv 2502.17055) calls FP4: there the exponent has no
effect. The integer formats also have an asymmetric form for weights: ``2**bits`` levels between the group's least and
largest value, and an integer zero point. Both are widened to hold zero; otherwise the zero point of a group that lies
on one side of zero falls out of range, and the published code then returns nearly nothing of the group.
nvfp4 is as in arXiv 2509.25149, mxfp4 as in the OCP Microscaling specification 1.0, section 6.3, with saturation.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .elementary import SMALLEST_NORMAL
from .packing import packed_length

FormatName = Literal["int4", "int3", "int2", "fp4", "fp4_uniform", "nvfp4", "mxfp4"]

#: Magnitudes of E2M1 by code; the highest of the four bits is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST_E4M3 = 448.0
#: Codes of NaN, which is the scale of a group that holds a value not finite.
E4M3_NAN, E8M0_NAN = 0x7F, 0xFF
LARGEST_GROUP = 4096


@dataclass(frozen=True)
class Format:
    """One row of the table above; ``largest`` is the grid's last point, ``group_size`` None where any will do."""

    bits: int
    largest: float
    grid: Literal["uniform", "e2m1"] = "uniform"
    scale: Literal["fp32", "e4m3", "e8m0"] = "fp32"
    group_size: int | None = None


FORMATS: dict[str, Format] = {
    "int4": Format(4, 7.0),
    "int3": Format(3, 3.0),
    "int2": Format(2, 1.0),
    "fp4": Format(4, 6.0, "e2m1"),
    "fp4_uniform": Format(4, 4.0),
    "nvfp4": Format(4, 6.0, "e2m1", "e4m3", 16),
    "mxfp4": Format(4, 6.0, "e2m1", "e8m0", 32),
}


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized along its last axis, in groups of which the last may be short.

    Attributes:
        format: a key of ``FORMATS``.
        group_size: elements that share a scale, a multiple of 8 up to 4096; that of the format where it has its own.
        asymmetric: levels between minimum and maximum, and a zero point; integer formats only.
        outliers: elements of largest magnitude of every group that are kept exact, beside the codes.

    Raises:
        ValueError: one of them is out of range.
    """

    format: str
    group_size: int = 256
    asymmetric: bool = False
    outliers: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format={self.format!r} is unknown; it is one of {', '.join(FORMATS)}")
        own = self.spec.group_size
        if own is not None and self.group_size != own:
            raise ValueError(f"group_size={self.group_size} is out of range: {self.format} has groups of {own}")
        if self.group_size % 8 or not 8 <= self.group_size <= LARGEST_GROUP:
            raise ValueError(f"group_size={self.group_size} is out of range: a multiple of 8 from 8 to {LARGEST_GROUP}")
        if not 0 <= self.outliers < self.group_size:
            raise ValueError(f"outliers={self.outliers} is out of range: from 0 to group_size - 1")
        if self.asymmetric and not self.format.startswith("int"):
            raise ValueError(f"asymmetric=True with format={self.format!r}: only int4, int3 and int2 have a zero point")

    @property
    def spec(self) -> Format:
        """The format's row of the table."""
        return FORMATS[self.format]

    def groups(self, columns: int) -> int:
        """Return the groups of a row."""
        return -(-columns // self.group_size)

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row's codes; every group is whole bytes."""
        full, rest = divmod(columns, self.group_size)
        return full * packed_length(self.group_size, self.spec.bits) + packed_length(rest, self.spec.bits)


class Packed(NamedTuple):
    """A quantized (rows, columns) matrix. What its scheme does not have is a tensor of no elements.

    Attributes:
        codes: (rows, ``row_bytes(columns)``) uint8, packed group by group as in :mod:`.packing`.
        scales: (rows, groups) fp32, or uint8 that hold E4M3 or E8M0; NaN for a group that holds a value not finite.
        zero_points: (rows, groups) uint8.
        tensor_scale: () fp32.
        outlier_values: (rows, groups, outliers), in the dtype that the matrix is dequantized to.
        outlier_indices: (rows, groups, outliers) uint8, int16 where groups are longer than 256: place in the group.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    tensor_scale: Tensor
    outlier_values: Tensor
    outlier_indices: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self)


def empty_packed(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> Packed:
    """Return the tensors of a packed matrix, not filled."""
    groups = scheme.groups(columns)
    outliers = (rows, groups, scheme.outliers) if scheme.outliers else (0,)
    index_dtype = torch.uint8 if scheme.group_size <= 256 else torch.int16
    scale_dtype = torch.float32 if scheme.spec.scale == "fp32" else torch.uint8
    return Packed(
        torch.empty(rows, scheme.row_bytes(columns), dtype=torch.uint8, device=device),
        torch.empty(rows, groups, dtype=scale_dtype, device=device),
        torch.empty((rows, groups) if scheme.asymmetric else (0,), dtype=torch.uint8, device=device),
        torch.empty(() if scheme.spec.scale == "e4m3" else (0,), dtype=torch.float32, device=device),
        torch.empty(outliers, dtype=dtype, device=device),
        torch.empty(outliers, dtype=index_dtype, device=device),
    )


def _divided(values: Tensor, divisor: float) -> Tensor:
    # By a tensor: CUDA turns the division by a number into a multiplication, which rounds differently.
    return values / torch.full_like(values, divisor)


def encode_scale(most: Tensor, scheme: Scheme, tensor_scale: Tensor) -> Tensor:
    """Return the scales, as they are stored, of groups with these largest magnitudes.

    Args:
        most: fp32 of any shape; infinity or NaN for a group that holds such.
        scheme: symmetric.
        tensor_scale: () fp32, for nvfp4.
    """
    spec = scheme.spec
    finite = most.isfinite()
    if spec.scale == "e8m0":
        exponent = (most.view(torch.int32) >> 23) - 2  # E2M1's own largest power of two is 4
        return torch.where(finite, exponent.clamp(0, 254), E8M0_NAN).to(torch.uint8)
    scale = _divided(most, spec.largest)
    if spec.scale == "e4m3":
        finite = finite & tensor_scale.isfinite()
        scale = torch.where(finite, scale / tensor_scale, 0.0).clamp_max(LARGEST_E4M3)
        codes = scale.to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.where(finite, codes, E4M3_NAN)
    return torch.where(finite, scale.clamp_min(SMALLEST_NORMAL), torch.nan)


def decode_scale(stored: Tensor, scheme: Scheme, tensor_scale: Tensor) -> Tensor:
    """Return fp32 scales of stored ones."""
    kind = scheme.spec.scale
    if kind == "e8m0":
        wide = stored.to(torch.int32)
        bits = torch.where(wide == 0, 0x00400000, torch.where(wide == E8M0_NAN, 0x7FC00000, wide << 23))
        return bits.to(torch.int32).view(torch.float32)
    if kind == "e4m3":
        return stored.view(torch.float8_e4m3fn).to(torch.float32) * tensor_scale
    return stored


def tensor_scale_of(most: Tensor) -> Tensor:
    """Return nvfp4's scale of a tensor whose largest magnitude is ``most``, () fp32: its largest group has 448."""
    return torch.where(most.isfinite(), _divided(most, 6.0 * LARGEST_E4M3).clamp_min(SMALLEST_NORMAL), torch.nan)


def rounded(values: Tensor, noise: Tensor | None) -> Tensor:
    """Return integers in fp32: to the nearest with ties to even, or up with the probability of the fraction.

    Args:
        values: fp32.
        noise: fp32 in (0, 1), of the same shape, or None.
    """
    return values.round() if noise is None else (values + noise).floor()


def encode_symmetric(units: Tensor, spec: Format, noise: Tensor | None) -> Tensor:
    """Return uint8 codes of numbers in units of the scale; beyond the grid's ends they saturate."""
    if spec.grid == "uniform":
        return (rounded(units, noise).clamp(-spec.largest, spec.largest) + spec.largest).to(torch.uint8)
    # From 0, 2 and 4 on E2M1 is spaced by ½, 1 and 2. Ties go to even codes, which are IEEE's even mantissas.
    magnitude = units.abs().clamp_max(spec.largest)
    upper, middle = magnitude >= 4, magnitude >= 2
    steps = torch.where(upper, (magnitude - 4) * 0.5, torch.where(middle, magnitude - 2, magnitude * 2))
    first = torch.where(upper, 6.0, torch.where(middle, 4.0, 0.0))
    code = (first + rounded(steps, noise)).clamp_max(7.0).to(torch.uint8)
    return code | (torch.signbit(units).to(torch.uint8) << 3)


def decode_symmetric(codes: Tensor, spec: Format) -> Tensor:
    """Return fp32 numbers in units of the scale."""
    if spec.grid == "uniform":
        return codes.to(torch.float32) - spec.largest
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.to(torch.int32)]
