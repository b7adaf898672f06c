"""The 4-bit formats value by value, and every fast path against the reference bit for bit."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels import four_bit_cpu, four_bit_triton
from lowbit_lightning.kernels.four_bit import (
    Noise,
    dequantize,
    dequantize_reference,
    fake_quantize_fp8,
    quantize,
    quantize_reference,
)
from lowbit_lightning.kernels.four_bit_formats import FORMATS, Packed, Scheme, empty_packed, tensor_scale_of
from lowbit_lightning.kernels.philox import stream_id

NOISE = Noise(seed=3, stream=stream_id("layer", "operand"), step=5)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def values_of(x: Tensor, scheme: Scheme, noise: Noise | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    found, _ = quantize_reference(x, scheme, dtype, noise)
    return found


def row(*values: float, last: float) -> Tensor:
    """A group of 32 whose largest magnitude is ``last``, (1, 32)."""
    group = torch.zeros(1, 32)
    group[0, : len(values)] = torch.tensor(values)
    group[0, -1] = last
    return group


def hard(rows: int = 7, columns: int = 150) -> Tensor:
    """A matrix with groups of zeros, of a constant, of subnormals, near overflow, and with values not finite."""
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    x[1, :128] = 0
    x[2, 5] = torch.inf
    x[3, 30:35] = torch.nan
    x[4] = 2.5
    x[5] *= 1e-40
    x[6, :2] = torch.tensor([3e38, -3e38])
    return x


def schemes(*sizes: int) -> list[Scheme]:
    return list(_schemes(*sizes))


def _schemes(*sizes: int) -> Iterator[Scheme]:
    for name, spec in FORMATS.items():
        for size, outliers in itertools.product((spec.group_size,) if spec.group_size else sizes, (0, 2)):
            yield Scheme(name, size, False, outliers)
            if name.startswith("int"):
                yield Scheme(name, size, True, outliers)


def assert_same(one: Tensor, other: Tensor) -> None:
    """The same bits, but for those of NaN."""
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(one) & ~one.isnan(), torch.signbit(other) & ~other.isnan())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_e2m1_value_is_its_own(sign: float) -> None:
    x = sign * torch.cat([E2M1, torch.zeros(24)])[None]
    assert torch.equal(values_of(x, Scheme("fp4", 32)), x)
    assert torch.equal(values_of(x / 4, Scheme("mxfp4", 32)), x / 4)


def test_e2m1_midpoints_go_to_even_codes_and_their_neighbours_to_the_nearer() -> None:
    midpoints = (E2M1[1:] + E2M1[:-1]) / 2
    even = torch.tensor([0.0, 1, 1, 2, 2, 4, 4])
    for points, expected in (
        (midpoints, even),
        (torch.nextafter(midpoints, torch.tensor(0.0)), E2M1[:-1]),
        (torch.nextafter(midpoints, torch.tensor(9.0)), E2M1[1:]),
    ):
        for sign in (1.0, -1.0):
            x = row(*(sign * points).tolist(), last=6.0)
            assert torch.equal(values_of(x, Scheme("fp4", 32))[0, :7], sign * expected)


@pytest.mark.parametrize(("name", "largest"), [("int4", 7), ("int3", 3), ("int2", 1), ("fp4_uniform", 4)])
def test_symmetric_grids_are_whole_numbers_of_the_scale(name: str, largest: int) -> None:
    grid = torch.arange(-largest, largest + 1).float()
    x = torch.cat([grid, torch.zeros(32 - len(grid))])[None] * 0.25
    assert torch.equal(values_of(x, Scheme(name, 32)), x)
    assert values_of(row(0.5, 1.5, 2.5, last=7.0), Scheme("int4", 32))[0, :3].tolist() == [0.0, 2.0, 2.0]


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_asymmetric_levels_are_those_of_float64(bits: int) -> None:
    x = torch.randn(5, 64) + 0.7
    wide, levels = x.double(), 2**bits - 1
    low, high = wide.amin(1, keepdim=True).clamp_max(0), wide.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / levels
    zero = (-low / scale).round()
    expected = ((wide / scale).round() + zero).clamp(0, levels).sub(zero) * scale
    torch.testing.assert_close(values_of(x, Scheme(f"int{bits}", 64, True)).double(), expected, rtol=1e-6, atol=1e-7)


def test_groups_on_one_side_of_zero_keep_their_values() -> None:
    for constant in (2.5, -2.5):
        x = torch.full((1, 64), constant)
        for scheme in (Scheme("int4", 64, True), Scheme("int2", 64, True), Scheme("int4", 64), Scheme("fp4", 64)):
            torch.testing.assert_close(values_of(x, scheme), x, rtol=1e-6, atol=0)


def test_nvfp4_is_that_of_float64_with_scales_in_e4m3() -> None:
    x = torch.randn(4, 48) * torch.tensor([1.0, 1e-2, 30, 1e-6])[:, None]
    groups = x.double().view(4, 3, 16)
    whole = float(torch.tensor(float(x.abs().max()) / (6 * 448), dtype=torch.float32))
    share = groups.abs().amax(-1, keepdim=True) / 6 / whole
    scale = share.clamp_max(448).float().to(torch.float8_e4m3fn).double() * whole
    units = torch.where(scale > 0, groups / scale, 0.0).clamp(-6, 6)
    distance = (units.abs()[..., None] - E2M1.double()).abs()
    expected = torch.copysign(E2M1.double()[distance.argmin(-1)], units) * scale
    found = values_of(x, Scheme("nvfp4", 16)).double().view(4, 3, 16)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert torch.equal(found[3], torch.zeros(3, 16).double())  # too small beside the others for E4M3


def test_every_e4m3_scale_is_stored_as_itself() -> None:
    """Groups whose scale is k-th of all E4M3 values, in a matrix whose own scale is 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    scales = codes.view(torch.float8_e4m3fn).float()
    x = torch.zeros(127, 16)
    x[:, 0] = 6 * scales
    for quantizes in (quantize_reference, quantize):
        _, packed = quantizes(x, Scheme("nvfp4", 16), torch.float32)
        assert packed is not None
        assert float(packed.tensor_scale) == 1.0
        assert torch.equal(packed.scales[:, 0], codes)
        between = (scales[1:] + scales[:-1]) / 2 * 6
        x[:126, 0] = between
        x[126, 0] = 6 * 448
        _, packed = quantizes(x, Scheme("nvfp4", 16), torch.float32)
        assert packed is not None
        even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
        assert torch.equal(packed.scales[:126, 0], even)
        x[:127, 0] = 6 * scales


@pytest.mark.parametrize("exponent", [-127, -126, -100, 0, 100, 125])
def test_mxfp4_scales_are_powers_of_two(exponent: int) -> None:
    scale = 2.0**exponent
    found, packed = quantize(row(scale, last=4 * scale), Scheme("mxfp4", 32), torch.float32)
    assert packed is not None
    assert packed.scales.tolist() == [[exponent + 127]]
    assert found is not None
    assert found[0, 0] == scale


def test_mxfp4_saturates_above_six_and_its_scale_at_the_smallest() -> None:
    assert values_of(row(1.0, last=7.9), Scheme("mxfp4", 32))[0, -1] == 6.0
    tiny = row(last=2.0**-149)
    _, packed = quantize(tiny, Scheme("mxfp4", 32), torch.float32)
    assert packed is not None
    assert packed.scales.tolist() == [[0]]


@pytest.mark.parametrize("scheme", schemes(64), ids=str)
def test_zero_stays_zero_and_subnormals_stay_finite(scheme: Scheme) -> None:
    x = torch.zeros(3, 72)
    x[1] = torch.linspace(-1, 1, 72) * 1e-39
    found = values_of(x, scheme)
    assert torch.equal(found[0], torch.zeros(72))
    assert found.isfinite().all()
    assert (found - x).abs().max() <= 2.0**-126


@pytest.mark.parametrize(
    "scheme", [Scheme("int4", 64), Scheme("int4", 64, True), Scheme("fp4", 64), Scheme("mxfp4", 32)]
)
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_value_not_finite_spoils_its_group_and_no_other(scheme: Scheme, bad: float) -> None:
    x = torch.randn(2, 128)
    clean = values_of(x, scheme)
    x[0, 70] = bad
    for quantizes in (quantize_reference, quantize):
        found, _ = quantizes(x, scheme, torch.float32)
        assert found is not None
        spoiled = slice(64, 64 + scheme.group_size)
        assert found[0, spoiled].isnan().all()
        found[0, spoiled] = clean[0, spoiled]
        assert torch.equal(found, clean)


def test_a_value_not_finite_among_the_outliers_is_kept() -> None:
    x = torch.randn(1, 64)
    x[0, 7], x[0, 9] = torch.inf, torch.nan
    found = values_of(x, Scheme("int4", 64, outliers=2))
    assert found[0, 7] == torch.inf
    assert found[0, 9].isnan()
    assert found.isfinite().sum() == 62


def test_outliers_are_exact_and_the_first_of_equals() -> None:
    x = row(9.3, 0.2, -9.3, 9.3, 1.0, last=-3.0)
    found, packed = quantize(x, Scheme("fp4", 32, outliers=2), torch.float32)
    assert found is not None
    assert packed is not None
    assert packed.outlier_indices.tolist() == [[[0, 2]]]
    assert found[0, 0] == x[0, 0]
    assert found[0, 2] == x[0, 2]
    assert packed.scales.item() == pytest.approx(9.3 / 6)
    short, _ = quantize(torch.tensor([[0.3, -7.0]]), Scheme("int2", 32, outliers=5), torch.float32)
    assert short is not None
    assert torch.equal(short, torch.tensor([[0.3, -7.0]]))


@pytest.mark.parametrize("scheme", schemes(64, 24), ids=str)
def test_compiled_code_is_the_reference_bit_for_bit(scheme: Scheme) -> None:
    kinds = itertools.product((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16), (None, NOISE))
    for dtype_in, dtype, noise in kinds:
        for x in (hard(), torch.randn(3, 150) * torch.logspace(-6, 3, 3)[:, None]):
            expected, packed = quantize_reference(x.to(dtype_in), scheme, dtype, noise)
            assert four_bit_cpu.takes(x, dtype)
            found, made = quantize(x.to(dtype_in), scheme, dtype, noise)
            assert found is not None
            assert made is not None
            assert_same(expected, found)
            for one, other in zip(packed, made, strict=True):
                assert_same(one, other)
            # Unpacking gives what quantizing gave, by either.
            assert_same(dequantize_reference(packed, scheme, 150), expected)
            assert_same(dequantize(made, scheme, 150), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's arithmetic is numpy's
@pytest.mark.parametrize(
    "scheme", [pytest.param(one, id=str(one), marks=[] if one.outliers else [pytest.mark.long]) for one in schemes(24)]
)
def test_triton_is_the_reference_bit_for_bit(scheme: Scheme) -> None:
    for dtype_in, dtype, noise in ((torch.float32, torch.bfloat16, NOISE), (torch.bfloat16, torch.float32, None)):
        x = torch.cat([hard(columns=70), torch.randn(2, 70)]).to(dtype_in)
        if scheme.format == "nvfp4":
            x = x.nan_to_num(0, 0, 0)[:6]
        expected, packed = quantize_reference(x, scheme, dtype, noise)
        out, made = torch.empty(x.shape, dtype=dtype), empty_packed(*x.shape, scheme, dtype, x.device)
        if scheme.format == "nvfp4":
            made.tensor_scale.copy_(tensor_scale_of(x.abs().amax().float()))
        four_bit_triton.quantize(x, out, made, scheme, noise, store_codes=True)
        assert_same(expected, out)
        for one, other in zip(packed, made, strict=True):
            assert_same(one, other)
        again = torch.empty_like(out)
        four_bit_triton.dequantize(made, again, scheme)
        assert_same(expected, again)


@pytest.mark.parametrize(
    "scheme", [Scheme("int4", 64), Scheme("int3", 64, True), Scheme("fp4", 64), Scheme("mxfp4", 32)]
)
def test_stochastic_rounding_is_right_on_average_and_goes_to_neighbours_only(scheme: Scheme) -> None:
    x = torch.randn(1, 64)
    repeated = x.expand(4000, 64)
    found = values_of(repeated, scheme, NOISE)
    spacing = found.amax(0) - found.amin(0)
    interior = x[0].abs() < 0.9 * x.abs().max()  # saturation beyond mxfp4's last point is no rounding
    error = (found.double().mean(0) - x[0]).abs()
    assert (error[interior] <= 5 * (spacing[interior] / 2) / 4000**0.5 + 1e-4).all()
    assert all(len(column.unique()) <= 2 for column in found.t())


def test_noise_is_a_function_of_the_step_and_leaves_grid_points_alone() -> None:
    scheme, x = Scheme("fp4", 64), torch.randn(8, 200)
    first = values_of(x, scheme, NOISE)
    assert torch.equal(first, values_of(x, scheme, NOISE))
    assert not torch.equal(first, values_of(x, scheme, Noise(NOISE.seed, NOISE.stream, 6)))
    assert not torch.equal(first[0], values_of(x[:1].expand(8, -1), scheme, NOISE)[1])
    # Rows are numbered, so the first ones of a taller matrix are the same.
    assert torch.equal(values_of(torch.cat([x, x]), scheme, NOISE)[:8], first)
    grid = torch.cat([E2M1, -E2M1, torch.zeros(48)])[None]
    assert torch.equal(values_of(grid, scheme, NOISE), grid)


@pytest.mark.parametrize(("scheme", "most"), [(Scheme("int4", 256, outliers=2), 0.27), (Scheme("nvfp4", 16), 0.282)])
def test_packed_bytes(scheme: Scheme, most: float) -> None:
    x = torch.randn(16, 1024, dtype=torch.bfloat16)
    values, packed = quantize(x, scheme, torch.bfloat16, values=False)
    assert values is None
    assert packed is not None
    assert packed.nbytes / x.nbytes <= most


def test_only_what_is_wanted_is_made() -> None:
    x = torch.randn(4, 64)
    values, packed = quantize(x, Scheme("int4", 64), torch.float32, packed=False)
    assert packed is None
    assert torch.equal(values, values_of(x, Scheme("int4", 64)))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 1)])
@pytest.mark.parametrize("name", ["int3", "nvfp4"])
def test_empty_and_tiny_matrices(shape: tuple[int, int], name: str) -> None:
    scheme = Scheme(name, FORMATS[name].group_size or 64)
    found, packed = quantize(torch.ones(shape), scheme, torch.bfloat16)
    assert found is not None
    assert packed is not None
    assert torch.equal(found, torch.ones(shape, dtype=torch.bfloat16))
    assert torch.equal(dequantize(packed, scheme, shape[1]), found)


def test_strided_input_and_dtypes_without_a_fast_path() -> None:
    x, scheme = torch.randn(64, 6).t(), Scheme("fp4", 64, outliers=1)
    found, _ = quantize(x, scheme, torch.float32)
    assert torch.equal(found, values_of(x.contiguous(), scheme))
    wide, packed = quantize(x.double(), scheme, torch.float64)
    assert isinstance(packed, Packed)
    assert wide is not None
    assert wide.dtype == torch.float64
    assert torch.equal(dequantize(packed, scheme, 64), wide)


def test_fp8_is_e4m3_by_group() -> None:
    x = torch.randn(3, 40) * torch.tensor([1.0, 1e3, 1e-5])[:, None]
    found = fake_quantize_fp8(x, 16, torch.float32)
    # Three bits of mantissa: half a unit of the last is 2⁻⁴ of the value, and 2⁻¹⁰ in the scale's units near zero.
    scale = torch.nn.functional.pad(x, (0, 8)).view(3, 3, 16).abs().amax(-1, keepdim=True).expand(3, 3, 16) / 448
    scale = scale.reshape(3, 48)[:, :40]
    assert ((found - x).abs() <= x.abs() * 2.0**-4 + scale * 2.0**-10).all()
    assert torch.equal(fake_quantize_fp8(found, 16, torch.float32).round(decimals=4), found.round(decimals=4))
    x[1, 20] = torch.nan
    assert fake_quantize_fp8(x, 16, torch.float32).isnan().sum() == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp5"}, "format='fp5' is unknown; it is one of int4, int3"),
        ({"format": "int4", "group_size": 12}, "group_size=12 is out of range: a multiple of 8"),
        ({"format": "int4", "group_size": 8192}, "group_size=8192 is out of range"),
        ({"format": "nvfp4", "group_size": 256}, "nvfp4 has groups of 16"),
        ({"format": "int4", "outliers": 256}, "outliers=256 is out of range"),
        ({"format": "fp4", "asymmetric": True}, "only int4, int3 and int2 have a zero point"),
    ],
)
def test_schemes_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**arguments)
