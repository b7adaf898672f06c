"""Block floats: the reference against a scalar twin in exact arithmetic, and what may be relied on at the edges."""

import math

import pytest
import torch
from torch import Tensor

from lowbit_lightning.kernels.block_float import (
    AFFINE_BITS,
    BFP_BITS,
    DTYPES,
    BoxFormat,
    Packed,
    pack_reference,
    quantize_reference,
    unpack_reference,
)
from lowbit_lightning.kernels.philox import draw_16bit

FORMATS = [BoxFormat(bits, 16, "bfp", "nearest") for bits in BFP_BITS]
FORMATS += [BoxFormat(bits, 16, "affine", "nearest") for bits in AFFINE_BITS]
LARGEST = torch.finfo(torch.float32).max


def stochastic(format: BoxFormat) -> BoxFormat:
    return BoxFormat(format.bits, format.box, format.kind, "stochastic")


def there_and_back(x: Tensor, format: BoxFormat, step: int = 0) -> Tensor:
    noise = (1, 2, step) if format.rounding == "stochastic" else None
    return unpack_reference(pack_reference(x, format, noise), format, x.shape, x.dtype)


def floor_bf16(value: float) -> float:
    """The largest number of eight significant bits that is not above; for normal magnitudes."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 256), exponent - 8)


def scalar_box(box: list[float], format: BoxFormat, draws: list[int] | None) -> tuple[list[int], list[float]]:
    """Codes and values of one box, from the formulas of the docstring in double precision."""
    halves = [0.5] * len(box) if draws is None else [(draw + 0.5) / 65536 for draw in draws]
    if format.bits == 16 and draws is not None:
        halves = [((draw >> 8) + 0.5) / 256 for draw in draws]

    def rounded(level: float, half: float) -> int:
        return round(level) if draws is None else math.floor(level + half)

    if format.kind == "bfp":
        most = 2 ** (format.bits - 1) - 1
        step = math.ldexp(1.0, math.frexp(max(map(abs, box)))[1] - (format.bits - 1))
        codes = [max(-most, min(most, rounded(x / step, half))) for x, half in zip(box, halves, strict=True)]
        return codes, [code * step for code in codes]
    most = 2**format.bits - 1
    least = floor_bf16(min(box))
    step = -floor_bf16(-((max(box) - least) / most))
    codes = [max(0, min(most, rounded((x - least) / step, half))) for x, half in zip(box, halves, strict=True)]
    return codes, [least + code * step for code in codes]


@pytest.mark.parametrize("noise", [None, (2**33 + 7, 2**32 - 5, 9)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_stream_and_values_are_those_of_the_formulas(
    format: BoxFormat, noise: tuple[int, int, int] | None
) -> None:
    if noise is not None:
        format = stochastic(format)
    rows, columns = 3, 40  # the last box has 8 elements
    x = torch.randn(rows, columns) * torch.exp(3 * torch.randn(rows, columns))
    packed = pack_reference(x, format, noise)
    values = unpack_reference(packed, format, x.shape, x.dtype)
    draws = None if noise is None else draw_16bit(*noise, torch.arange(rows * 48 // 8)[:, None]).view(rows, 48).tolist()
    for row in range(rows):
        stream = int.from_bytes(bytes(packed.codes[row].tolist()), "little")
        for first in range(0, columns, 16):
            box = x[row, first : first + 16].tolist()
            own = None if draws is None else draws[row][first : first + len(box)]
            codes, expected = scalar_box(box, format, own)
            mask = 2**format.bits - 1
            assert [stream >> (first + i) * format.bits & mask for i in range(len(box))] == [c & mask for c in codes]
            torch.testing.assert_close(values[row, first : first + len(box)], torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7, 100), (2, 64), (0, 4), (4, 0), (130, 3)])
@pytest.mark.parametrize("format", [BoxFormat(3, 32), BoxFormat(16, 16), BoxFormat(5, 128, "affine")], ids=str)
def test_every_shape_comes_back_and_takes_the_bytes_announced(
    format: BoxFormat, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    packed = pack_reference(x, format, (0, 0, 0))
    assert packed.nbytes == format.packed_bytes(shape)
    values = unpack_reference(packed, format, shape, dtype)
    assert values.shape == x.shape
    assert values.dtype == dtype
    assert torch.equal(values, quantize_reference(x, format, (0, 0, 0)))


@pytest.mark.parametrize("box", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", BFP_BITS)
def test_bytes_of_bfp_are_its_bits_and_a_byte_for_every_box(bits: int, box: int) -> None:
    share = BoxFormat(bits, box).packed_bytes((8, 512, 688)) / (8 * 512 * 688 * 4)
    assert share == pytest.approx((bits + 8 / box) / 32, rel=0.01)


@pytest.mark.parametrize("format", [*FORMATS, *map(stochastic, FORMATS)], ids=str)
def test_zero_boxes_stay_zero_and_levels_stay_themselves(format: BoxFormat) -> None:
    assert torch.equal(there_and_back(torch.tensor([[0.0, -0.0] * 20]), format), torch.zeros(1, 40))
    x = there_and_back(torch.randn(2, 48), format)
    if format.kind == "bfp":  # affine chooses other levels from what it made of the extremes
        assert torch.equal(there_and_back(x, format), x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_value_that_is_not_finite_shows_in_all_of_its_box_and_in_no_other(format: BoxFormat, value: float) -> None:
    x = torch.randn(2, 40)
    exact = there_and_back(x, format)
    x[1, 20] = value
    values = there_and_back(x, format)
    assert values[1, 16:32].isnan().all()
    assert torch.equal(values[0], exact[0])
    assert torch.equal(values[1, :16], exact[1, :16])
    assert torch.equal(values[1, 32:], exact[1, 32:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [*FORMATS, *map(stochastic, FORMATS)], ids=str)
def test_the_largest_and_the_smallest_numbers_stay_finite(format: BoxFormat, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    x = torch.tensor([[info.max, info.min, 1.0, 0.0] * 4, [info.smallest_normal / 4, 0.0, -info.tiny, info.tiny] * 4])
    values = there_and_back(x.to(dtype), format)
    assert values.isfinite().all()
    # At 2 bits the largest mantissa is half of the power of two above, which is up to a quarter of the magnitude.
    assert (values[0, :2].float() / x[0, :2]).min() > (0.49 if format.bits == 2 else 0.7)
    assert values[1].float().abs().max() <= 2 * info.tiny


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_error_is_at_most_half_a_step_where_nothing_is_clipped(format: BoxFormat) -> None:
    x = torch.randn(20, 64).clamp(-3.9, 3.9)
    x[:, ::16], x[:, 1::16] = 2.0, -2.0  # all boxes have steps of 2^(2 - bits) * 2 or, affine, at least 4 / levels
    if format.kind == "bfp":
        x = x.clamp(-4 + 2.0 ** (3 - format.bits), 4 - 2.0 ** (3 - format.bits))
        half = 2.0 ** (3 - format.bits) / 2
        half *= 1 + (x.abs().amax() < 2)
    else:
        half = 8.2 / (2**format.bits - 1) / 2
    assert (there_and_back(x, format) - x).abs().max() <= half


@pytest.mark.parametrize("format", [stochastic(format) for format in FORMATS], ids=str)
def test_stochastic_rounding_is_unbiased_where_it_does_not_clip(format: BoxFormat) -> None:
    x = torch.randn(8, 512)
    step = 2.0 ** (torch.frexp(x.view(-1, 16).abs().amax(-1))[1] - format.bits + 1)
    largest = (step * (2 ** (format.bits - 1) - 1))[:, None].expand(-1, 16).reshape(x.shape)
    inside = x.abs() <= largest if format.kind == "bfp" else torch.ones_like(x, dtype=torch.bool)
    total, errors = torch.zeros_like(x), {}
    for k in range(1, 401):
        values = there_and_back(x, format, k)
        total += values
        if k in (4, 400):
            errors[k] = float((total / k - x)[inside].norm())
        # What is clipped is not rounded at all.
        assert torch.equal(values[~inside], (largest.copysign(x))[~inside])
    expected = errors[4] / 10  # as 1/sqrt(k)
    # The draws of 16-bit mantissas have eight bits, which shows at last.
    assert 0.85 * expected < errors[400] < (1.15 if format.bits < 16 else 1.3) * expected


def test_textbook_bfp_of_two_bits_is_biased_and_affine_is_not() -> None:
    x = torch.randn(64, 256)
    biased, unbiased = (
        sum((there_and_back(x, BoxFormat(2, 16, kind), k) for k in range(200)), torch.zeros_like(x)) / 200 - x
        for kind in ("bfp", "affine")
    )
    assert biased.norm() / x.norm() > 0.15
    assert unbiased.norm() / x.norm() < 0.05


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_quantizing_along_an_axis_is_quantizing_its_lines(axis: int) -> None:
    x, format = torch.randn(20, 35, 6), BoxFormat(4, 16, "bfp", "nearest")
    moved = x.movedim(axis, -1).contiguous()
    assert torch.equal(quantize_reference(x, format, axis=axis).movedim(axis, -1), quantize_reference(moved, format))


def test_unpacking_may_ask_for_another_dtype() -> None:
    x, format = torch.randn(3, 40), BoxFormat(8)
    packed = pack_reference(x, format, (1, 2, 3))
    values = unpack_reference(packed, format, x.shape, torch.float32)
    assert torch.equal(unpack_reference(packed, format, x.shape, torch.bfloat16), values.to(torch.bfloat16))


def test_codes_of_zeros_are_zeros_whatever_the_exponent() -> None:
    format = BoxFormat(4, 16, "bfp", "nearest")
    empty = Packed(torch.zeros(1, 8, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert torch.equal(unpack_reference(empty, format, (1, 16), torch.float32), torch.zeros(1, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, r"bits=9 is out of range: one of 2, 3, 4, 5, 6, 7, 8, 16 for kind='bfp'"),
        ({"bits": 16, "kind": "affine"}, r"bits=16 is out of range: one of 2, .* 8 for kind='affine'"),
        ({"bits": 4, "box": 24}, r"box=24 is out of range: one of 16, 32, 64, 128"),
        ({"bits": 4, "kind": "fp"}, r"kind='fp' is out of range: one of 'bfp', 'affine'"),
        ({"bits": 4, "rounding": "up"}, r"rounding='up' is out of range: one of 'nearest', 'stochastic'"),
    ],
)
def test_a_format_that_does_not_exist_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoxFormat(**arguments)  # type: ignore[arg-type]
