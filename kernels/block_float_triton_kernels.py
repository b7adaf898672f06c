# ruff: noqa: SIM108
# Triton's compiler knows no conditional expressions of tensors.
"""Packing, unpacking and quantizing on CUDA: what the references of block floats mean, bit for bit, as one kernel.

:mod:`.block_float_triton` launches it; this file imports triton, that one does not.

Layout. A program treats BOXES boxes as tensors (BOXES, BOX / 8, 8): the eight elements of one unit are neighbours in
memory, lie in one thread, share a call of Philox, and their codes are BITS whole bytes.

Launches must not contract to fused multiply-add (``enable_fp_fusion=False``), and nothing is cast to bf16: Triton's
interpreter would truncate.
"""

import triton
import triton.language as tl

from .triton_arithmetic import philox, round_to_bf16

_NON_FINITE = tl.constexpr(255)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_LARGEST_BF16 = tl.constexpr(3.3895313892515355e38)
_LARGEST_FP32 = tl.constexpr(3.4028234663852886e38)
_LARGEST_FP16 = tl.constexpr(65504.0)
_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
_ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds to the nearest integer, ties to even


@triton.jit
def _number(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _extreme(keys, MOST: tl.constexpr):
    """Return the largest (or smallest) integer of each box, (BOXES,)."""
    if MOST:
        return tl.max(tl.max(keys, axis=2), axis=1)
    return tl.min(tl.min(keys, axis=2), axis=1)


@triton.jit
def _draws(box, unit, lane, seed, stream, step, UNITS: tl.constexpr):
    """Return a 16-bit draw of each element as int32."""
    calls = (box * UNITS)[:, None, None] + unit
    words = philox(seed.to(tl.uint32), stream.to(tl.uint32), step.to(tl.uint32), calls)
    low = tl.where(lane < 2, words[0], words[1])
    high = tl.where(lane < 6, words[2], words[3])
    word = tl.where(lane < 4, low, high)
    return ((word >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def _scales(x, BITS: tl.constexpr, AFFINE: tl.constexpr):
    """Return of each box: whether it is finite, its exponent (or bits of minimum and step), half a minimum, 2/step."""
    bits = x.to(tl.int32, bitcast=True)
    if AFFINE:
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # ordered as the numbers are
        most, fewest = _extreme(key, True), _extreme(key, False)
        finite = (most < _INFINITY_BITS) & (fewest > -1 - _INFINITY_BITS)
        low = fewest ^ ((fewest >> 31) & 0x7FFFFFFF)
        minimum = tl.maximum(_number((low + ((low >> 31) & 0xFFFF)) & -65536), -_LARGEST_BF16)
        minimum = tl.where(minimum == 0.0, 0.0, minimum)  # no negative zero
        maximum = _number(most ^ ((most >> 31) & 0x7FFFFFFF))
        LEVELS: tl.constexpr = (1 << BITS) - 1
        width = maximum * (1.0 / LEVELS) - minimum * (1.0 / LEVELS)
        step = tl.maximum(_number((width.to(tl.int32, bitcast=True) + 0xFFFF) & -65536), _SMALLEST_NORMAL)
        inverse = tl.div_rn(step * 0.0 + 2.0, step)
        first = tl.where(finite, minimum.to(tl.int32, bitcast=True), _NAN_BITS)
        second = tl.where(finite, step, _SMALLEST_NORMAL).to(tl.int32, bitcast=True)
        return finite, first, second, minimum * 0.5, inverse
    exponent = tl.maximum(_extreme(bits & 0x7FFFFFFF, True) >> 23, BITS - 1)
    inverse = _number((253 + BITS - exponent) << 23)
    return exponent != _NON_FINITE, exponent, exponent, inverse * 0.0, inverse


@triton.jit
def _value(code, first, second, BITS: tl.constexpr, AFFINE: tl.constexpr, DTYPE: tl.constexpr):
    """Return fp32 values of int32 codes and what :func:`_scales` says of their boxes."""
    if AFFINE:
        value = _number(first)[:, None, None] + code.to(tl.float32) * _number(second)[:, None, None]
        if DTYPE == 0:
            LARGEST: tl.constexpr = _LARGEST_FP32
        elif DTYPE == 1:
            LARGEST: tl.constexpr = _LARGEST_BF16
        else:
            LARGEST: tl.constexpr = _LARGEST_FP16
        value = tl.where(value > LARGEST, LARGEST, value)  # keeps NaN
        return tl.where(value < -LARGEST, -LARGEST, value)
    step = tl.where(first == _NON_FINITE, _NAN_BITS, (first + 2 - BITS) << 23)
    return code.to(tl.float32) * _number(step)[:, None, None]


@triton.jit
def _whole(codes, BITS: tl.constexpr):
    """Return pointers to the codes of eight elements, which no boundary of a row cuts."""
    if BITS == 2:
        return codes.to(tl.pointer_type(tl.uint16))
    elif BITS == 4:
        return codes.to(tl.pointer_type(tl.uint32))
    else:
        return codes.to(tl.pointer_type(tl.uint64))


@triton.jit(do_not_specialize=["seed", "stream", "step"])
def block_float(
    x, out, codes, scales, rows, columns, inner, boxes_per_row, row_bytes, seed, stream, step,
    READS: tl.constexpr, PACKED: tl.constexpr, STOCHASTIC: tl.constexpr, AFFINE: tl.constexpr, BITS: tl.constexpr,
    BOX: tl.constexpr, BOXES: tl.constexpr, DTYPE: tl.constexpr, STRIDED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Pack (READS and PACKED), unpack (PACKED) or quantize (READS).

    DTYPE is 0 for fp32, 1 for bf16 (pointers to int16), 2 for fp16. EVEN: no box is short. Row ``r`` begins at element
    ``r // inner * columns * inner + r % inner``, with its elements ``inner`` apart; STRIDED: inner > 1.
    """
    UNITS: tl.constexpr = BOX // 8
    WHOLE: tl.constexpr = EVEN and (BITS == 2 or BITS == 4 or BITS == 8)
    program = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, UNITS)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]

    # Where the boxes are.
    if STRIDED:
        row = program // boxes_per_row * BOXES + tl.arange(0, BOXES)
        index = row * 0 + program % boxes_per_row
        exists = row < rows
        box = row * boxes_per_row + index
    else:
        box = program * BOXES + tl.arange(0, BOXES)
        row, index = box // boxes_per_row, box % boxes_per_row
        exists = row < rows
    column = (index * BOX)[:, None, None] + unit * 8 + lane
    inside = exists[:, None, None] & (column < columns)
    if STRIDED:
        elements = (row // inner * columns * inner + row % inner)[:, None, None] + column * inner
    elif EVEN:
        elements = (box * BOX)[:, None, None] + unit * 8 + lane
    else:
        elements = (row * columns)[:, None, None] + column
    byte = (index * (UNITS * BITS))[:, None, None] + unit * BITS
    stream_start = (row * row_bytes)[:, None, None]
    places = (lane * BITS).to(tl.uint64)

    if READS:
        # Phase 1: fp32. Short boxes are filled up with their last element, which changes no scale.
        beyond = tl.maximum(column - (columns - 1), 0)
        if EVEN:
            read = elements
        else:
            read = elements - beyond * inner
        loaded = tl.load(x + read, mask=exists[:, None, None], other=0)
        if DTYPE == 1:
            value = _number(loaded.to(tl.int32) << 16)
        else:
            value = loaded.to(tl.float32)
        # Phase 2: what is stored of each box.
        finite, first, second, half_minimum, inverse = _scales(value, BITS, AFFINE)
        # Phase 3: codes.
        level = value * 0.5
        if AFFINE:
            level = level - half_minimum[:, None, None]
        level = level * inverse[:, None, None]
        level = tl.where(finite[:, None, None], level, 0.0)
        if STOCHASTIC:
            draw = _draws(box, unit, lane, seed, stream, step, UNITS)
            if BITS == 16:
                level = tl.floor(level + ((draw >> 8).to(tl.float32) + 0.5) * 0.00390625)
            else:
                level = tl.floor(level + (draw.to(tl.float32) + 0.5) * 1.52587890625e-05)
        else:
            level = (level + _ROUNDER) - _ROUNDER
        MOST: tl.constexpr = (1 << BITS) - 1 if AFFINE else (1 << (BITS - 1)) - 1
        FEWEST: tl.constexpr = 0 if AFFINE else -MOST
        code = tl.minimum(tl.maximum(level.to(tl.int32), FEWEST), MOST)
    else:
        # Phase 3 back: codes of the stream of bits.
        if BITS == 16:
            code = tl.load(codes + (row * columns)[:, None, None] + column, mask=inside, other=0).to(tl.int32)
        else:
            if WHOLE:
                whole = _whole(codes, BITS) + box[:, None, None] * UNITS + unit
                word = tl.load(whole, mask=exists[:, None, None], other=0).to(tl.uint64)
            else:
                word = tl.zeros([BOXES, UNITS, 1], tl.uint64)
                for i in tl.static_range(BITS):
                    some = exists[:, None, None] & (byte + i < row_bytes)
                    loaded = tl.load(codes + stream_start + byte + i, mask=some, other=0)
                    word = word | (loaded.to(tl.uint64) << (8 * i))
            code = ((word >> places) & ((1 << BITS) - 1)).to(tl.int32)
            if not AFFINE:
                code = (code ^ (1 << (BITS - 1))) - (1 << (BITS - 1))  # two's complement
        # Phase 2 back.
        if AFFINE:
            first = tl.load(scales + 2 * box, mask=exists, other=0).to(tl.int32) << 16
            second = tl.load(scales + 2 * box + 1, mask=exists, other=0).to(tl.int32) << 16
        else:
            first = tl.maximum(tl.load(scales + box, mask=exists, other=0).to(tl.int32), BITS - 1)
            second = first

    if READS and PACKED:
        # Phase 4: scales and the stream of bits.
        if AFFINE:
            tl.store(scales + 2 * box, (first >> 16).to(tl.int16), mask=exists)
            tl.store(scales + 2 * box + 1, (second >> 16).to(tl.int16), mask=exists)
        else:
            tl.store(scales + box, first.to(tl.uint8), mask=exists)
        if BITS == 16:
            tl.store(codes + (row * columns)[:, None, None] + column, code.to(tl.int16), mask=inside)
        else:
            field = (code & ((1 << BITS) - 1)).to(tl.uint64) << places
            word = tl.sum(field, axis=2)[:, :, None]
            if WHOLE:
                whole = _whole(codes, BITS) + box[:, None, None] * UNITS + unit
                tl.store(whole, word.to(whole.dtype.element_ty), mask=exists[:, None, None])
            else:
                for i in tl.static_range(BITS):
                    some = exists[:, None, None] & (byte + i < row_bytes)
                    tl.store(codes + stream_start + byte + i, (word >> (8 * i)).to(tl.uint8), mask=some)
    else:
        # Phase 4 back: values in the tensor's type.
        result = _value(code, first, second, BITS, AFFINE, DTYPE)
        if DTYPE == 1:
            tl.store(out + elements, round_to_bf16(result, 0, False), mask=inside)
        elif DTYPE == 2:
            tl.store(out + elements, result.to(tl.float16), mask=inside)
        else:
            tl.store(out + elements, result, mask=inside)
