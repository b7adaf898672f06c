# ruff: noqa: RUF005, SIM108
# Triton's compiler knows neither starred tuples nor conditional expressions of tensors.
"""Quantizing, packing and unpacking a matrix on CUDA: what four_bit.py's references mean, bit for bit.

One program holds a tile of whole groups, in eight lanes as :mod:`.solo_triton_arithmetic` has them; everything but the
reductions over a group happens inside a thread. Arithmetic is as in :mod:`.solo_triton_kernels`: IEEE operations in the
reference's order, no contraction, no cast to bf16.
"""

import triton
import triton.language as tl

from .solo_triton_arithmetic import code_of, draw_of, load_words, store_words
from .triton_arithmetic import philox, round_to_bf16

_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x00800000)
_NOWHERE = tl.constexpr(0x7FFFFFFF)
#: The forms of a grid, and the kinds of scale.
UNIFORM, E2M1, ASYMMETRIC = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCALE_FP32, SCALE_E4M3, SCALE_E8M0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _nearest(x):
    """Return integers in fp32, ties to even, for magnitudes below 2²²."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_e4m3(value):
    """Return int32 codes of fp32 values from 0 to 448."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = _nearest(value * 512.0).to(tl.int32)
    return tl.where(value < 0.015625, subnormal, normal)


@triton.jit
def _scale(stored, tensor_scale, KIND: tl.constexpr):
    """Return fp32 scales of stored ones: their bits, or the codes of E4M3 or E8M0 as int32."""
    if KIND == 0:
        scale = stored.to(tl.float32, bitcast=True)
    elif KIND == 2:
        bits = tl.where(stored == 0, 0x00400000, tl.where(stored == 0xFF, _NAN_BITS, stored << 23))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        subnormal = stored.to(tl.float32) * 0.001953125
        bits = tl.where(stored == 0x7F, _NAN_BITS, (stored + 960) << 20)
        scale = tl.where(stored < 8, subnormal, bits.to(tl.float32, bitcast=True)) * tensor_scale
    return scale


@triton.jit
def _decode(code, scale, zero, FORM: tl.constexpr):
    """Return fp32 values of int32 codes."""
    if FORM == 1:
        magnitude = code & 7
        whole = magnitude.to(tl.float32)
        units = tl.where(magnitude < 4, whole * 0.5, tl.where(magnitude < 6, whole - 2.0, whole * 2.0 - 8.0))
        bits = units.to(tl.int32, bitcast=True) | ((code & 8) << 28)
        value = bits.to(tl.float32, bitcast=True) * scale
    else:
        value = (code.to(tl.float32) - zero) * scale
    return value


@triton.jit
def _encode(units, uniform, zero, LARGEST: tl.constexpr, FORM: tl.constexpr, NOISE: tl.constexpr):
    """Return int32 codes of numbers in units of the scale."""
    if FORM == 1:
        bits = units.to(tl.int32, bitcast=True)
        magnitude = tl.minimum((bits & 0x7FFFFFFF).to(tl.float32, bitcast=True), LARGEST)
        upper, middle = magnitude >= 4.0, magnitude >= 2.0
        steps = tl.where(upper, (magnitude - 4.0) * 0.5, tl.where(middle, magnitude - 2.0, magnitude * 2.0))
        first = tl.where(upper, 6.0, tl.where(middle, 4.0, 0.0))
        if NOISE:
            whole = tl.floor(steps + uniform)
        else:
            whole = _nearest(steps)
        code = tl.minimum(first + whole, 7.0).to(tl.int32) | ((bits >> 28) & 8)
    else:
        if NOISE:
            whole = tl.floor(units + uniform)
        else:
            whole = _nearest(units)
        if FORM == 2:
            code = tl.minimum(tl.maximum(whole + zero, 0.0), LARGEST).to(tl.int32)
        else:
            code = (tl.minimum(tl.maximum(whole, -LARGEST), LARGEST) + LARGEST).to(tl.int32)
    return code


@triton.jit
def _load_element(pointer, offsets, inside, IS_BF16: tl.constexpr):
    """Return the int32 bits of fp32 values of fp32 or bf16 elements."""
    if IS_BF16:
        bits = tl.load(pointer + offsets, mask=inside, other=0).to(tl.int32) << 16
    else:
        bits = tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _store_element(pointer, offsets, value, inside, IS_BF16: tl.constexpr):
    if IS_BF16:
        tl.store(pointer + offsets, round_to_bf16(value, 0, False), mask=inside)
    else:
        tl.store(pointer + offsets, value, mask=inside)


@triton.jit
def _place(groups, columns, GROUP: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr, CALLS: tl.constexpr):
    """Return, for the program's groups, as (TILE, 1): number, row, first column, length, first byte, existence; i."""
    number = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None].to(tl.int64)
    per_row = (columns + GROUP - 1) // GROUP
    row, index = number // per_row, number % per_row
    length = tl.minimum(columns - index * GROUP, GROUP).to(tl.int32)
    rest = columns % GROUP
    row_bytes = (columns // GROUP * (GROUP // 8) + (rest + 7) // 8) * BITS
    byte = row * row_bytes + index * (GROUP // 8 * BITS)
    return number, row, index * GROUP, length, byte, number < groups, tl.arange(0, CALLS)[None, :]


@triton.jit
def quantize(
    x, out, codes, scales, zero_points, tensor_scale, outlier_values, outlier_indices,
    groups, columns, seed, stream, step,
    GROUP: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr,
    OUTLIERS: tl.constexpr, NOISE: tl.constexpr, IN_BF16: tl.constexpr, OUT_BF16: tl.constexpr,
    HAS_OUT: tl.constexpr, HAS_CODES: tl.constexpr, TILE: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """Quantize TILE groups; CALLS is the power of two at or above an eighth of a group."""
    number, row, column, length, byte, exists, i = _place(groups, columns, GROUP, BITS, TILE, CALLS)
    calls = (length + 7) // 8
    element = row * columns + column
    insides, values = (), ()
    for lane in tl.static_range(8):
        position = lane * calls + i
        inside = exists & (i < calls) & (position < length)
        bits = _load_element(x, element + position, inside, IN_BF16)
        insides = insides + (inside,)
        values = values + (bits,)

    # Phase 1: the outliers leave the group, the first of equal magnitudes first.
    places, kept = (), ()
    for k in tl.static_range(OUTLIERS):
        most = tl.where(insides[0], values[0] & 0x7FFFFFFF, 0)
        for lane in tl.static_range(1, 8):
            most = tl.maximum(most, tl.where(insides[lane], values[lane] & 0x7FFFFFFF, 0))
        most = tl.max(most, axis=1)[:, None]
        place = tl.where(insides[0] & ((values[0] & 0x7FFFFFFF) == most), i, _NOWHERE)
        for lane in tl.static_range(1, 8):
            found = insides[lane] & ((values[lane] & 0x7FFFFFFF) == most)
            place = tl.minimum(place, tl.where(found, lane * calls + i, _NOWHERE))
        place = tl.min(place, axis=1)[:, None]
        exact = _load_element(x, element + place, exists, IN_BF16)
        remaining = ()
        for lane in tl.static_range(8):
            remaining = remaining + (tl.where(lane * calls + i == place, 0, values[lane]),)
        values = remaining
        slot = number * OUTLIERS + k
        _store_element(outlier_values, slot, exact.to(tl.float32, bitcast=True), exists, OUT_BF16)
        tl.store(outlier_indices + slot, place, mask=exists)
        places = places + (place,)
        kept = kept + (exact,)

    # Phase 2: scale and zero point.
    most = values[0] & 0x7FFFFFFF
    for lane in tl.static_range(1, 8):
        most = tl.maximum(most, values[lane] & 0x7FFFFFFF)
    most = tl.max(most, axis=1)[:, None]
    finite = most < _INFINITY_BITS
    largest_bits = tl.where(finite, most, 0)
    zero = largest_bits.to(tl.float32) * 0.0
    whole_scale = 1.0
    if KIND == 1:
        whole_scale = tl.load(tensor_scale)
    if FORM == 2:
        low, high = zero, zero
        for lane in tl.static_range(8):
            value = tl.where(finite, values[lane], 0).to(tl.float32, bitcast=True)
            low = tl.minimum(low, tl.min(value, axis=1)[:, None])
            high = tl.maximum(high, tl.max(value, axis=1)[:, None])
        levels = low * 0.0 + LARGEST
        span = tl.div_rn(high, levels) - tl.div_rn(low, levels)
        bits = tl.maximum(span.to(tl.int32, bitcast=True), _SMALLEST_NORMAL_BITS)
        inverse = tl.div_rn(levels * 0.0 + 1.0, bits.to(tl.float32, bitcast=True))
        zero = tl.minimum(_nearest((0.0 - low) * inverse), LARGEST)
        tl.store(zero_points + number, zero.to(tl.uint8), mask=exists)
        stored = tl.where(finite, bits, _NAN_BITS)
        inverse = tl.where(finite, inverse, 0.0)
    else:
        scale = largest_bits.to(tl.float32, bitcast=True)
        scale = tl.div_rn(scale, scale * 0.0 + LARGEST)
        if KIND == 0:
            bits = tl.maximum(scale.to(tl.int32, bitcast=True), _SMALLEST_NORMAL_BITS)
            stored = tl.where(finite, bits, _NAN_BITS)
        elif KIND == 2:
            exponent = tl.minimum(tl.maximum((most >> 23) - 2, 0), 254)
            stored = tl.where(finite, exponent, 0xFF)
        else:
            whole_bits = whole_scale.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            divisor = tl.where(whole_bits < _INFINITY_BITS, whole_scale, 1.0)
            share = tl.minimum(tl.div_rn(scale, scale * 0.0 + divisor), 448.0)
            stored = tl.where(finite & (whole_bits < _INFINITY_BITS), _to_e4m3(share), 0x7F)
        unit = _scale(stored, whole_scale, KIND)
        divisor = tl.where(unit > 0.0, tl.maximum(unit, 5.877471754111438e-39), 1.0)
        inverse = tl.where(unit > 0.0, tl.div_rn(divisor * 0.0 + 1.0, divisor), 0.0)
        zero += LARGEST
    if KIND == 0:
        tl.store(scales + number, stored.to(tl.float32, bitcast=True), mask=exists)
    else:
        tl.store(scales + number, stored.to(tl.uint8), mask=exists)

    # Phase 3: codes.
    if NOISE:
        call = row * ((columns + 7) // 8) + column // 8 + i
        words = philox(seed.to(tl.uint32), stream.to(tl.uint32), step.to(tl.uint32), call)
    scale = _scale(stored, whole_scale, KIND)
    lanes = ()
    for lane in tl.static_range(8):
        value = tl.where(finite, values[lane], 0).to(tl.float32, bitcast=True)
        uniform = 0.0
        if NOISE:
            uniform = (draw_of(words, lane).to(tl.float32) + 0.5) * 0.0000152587890625
        code = _encode(value * inverse, uniform, zero, LARGEST, FORM, NOISE)
        lanes = lanes + (tl.where(insides[lane], code, 0),)

        # Phase 4: what the codes stand for.
        if HAS_OUT:
            position = lane * calls + i
            result = _decode(code, scale, zero, FORM)
            for k in tl.static_range(OUTLIERS):
                result = tl.where(position == places[k], kept[k].to(tl.float32, bitcast=True), result)
            _store_element(out, element + position, result, insides[lane], OUT_BF16)
    if HAS_CODES:
        store_words(codes, byte, calls, i, exists & (i < calls), lanes, BITS, 1)


@triton.jit
def dequantize(
    out, codes, scales, zero_points, tensor_scale, outlier_values, outlier_indices,
    groups, columns,
    GROUP: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr, LARGEST: tl.constexpr, KIND: tl.constexpr,
    OUTLIERS: tl.constexpr, OUT_BF16: tl.constexpr, TILE: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """Write the values of TILE groups."""
    number, row, column, length, byte, exists, i = _place(groups, columns, GROUP, BITS, TILE, CALLS)
    calls = (length + 7) // 8
    element = row * columns + column
    whole_scale = 1.0
    if KIND == 1:
        whole_scale = tl.load(tensor_scale)
    if KIND == 0:
        stored = tl.load(scales + number, mask=exists, other=0.0).to(tl.int32, bitcast=True)
    else:
        stored = tl.load(scales + number, mask=exists, other=0).to(tl.int32)
    scale = _scale(stored, whole_scale, KIND)
    zero = scale * 0.0 + LARGEST
    if FORM == 2:
        zero = tl.load(zero_points + number, mask=exists, other=0).to(tl.float32)
    words = load_words(codes, byte, calls, i, exists & (i < calls), BITS, 1)
    for lane in tl.static_range(8):
        position = lane * calls + i
        result = _decode(code_of(words, lane, BITS), scale, zero, FORM)
        for k in tl.static_range(OUTLIERS):
            slot = number * OUTLIERS + k
            place = tl.load(outlier_indices + slot, mask=exists, other=0).to(tl.int32)
            kept = _load_element(outlier_values, slot, exists, OUT_BF16)
            result = tl.where(position == place, kept.to(tl.float32, bitcast=True), result)
        inside = exists & (i < calls) & (position < length)
        _store_element(out, element + position, result, inside, OUT_BF16)
