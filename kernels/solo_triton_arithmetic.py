# ruff: noqa: RUF005, SIM108
# Triton's compiler knows neither starred tuples nor conditional expressions of tensors.
"""What a SOLO step on CUDA computes element by element and block by block, for :mod:`.solo_triton_kernels`.

Each part means what the file of its heading means, bit for bit. Tensors are (blocks, c): of a block's eight lanes one,
see there.
"""

import torch
import triton
import triton.language as tl

from . import dynamic, elementary, logarithmic


def fp32(values: object) -> tl.constexpr:
    """Return numbers rounded as the reference's tensors are."""
    return tl.constexpr(torch.tensor(values, dtype=torch.float32).tolist())


def fp32_bits(value: float) -> tl.constexpr:
    """Return the bits of a number rounded to fp32."""
    return tl.constexpr(int(torch.tensor(value, dtype=torch.float32).view(torch.int32)))


SMALLEST_NORMAL_BITS = fp32_bits(elementary.SMALLEST_NORMAL)
_SQRT_HALF_BITS = tl.constexpr(elementary.SQRT_HALF_BITS)
_LOG2_COEFFICIENTS = tl.constexpr(tuple(fp32(c).value for c in reversed(elementary.LOG2_COEFFICIENTS)))
_LOG2_TERMS = tl.constexpr(len(elementary.LOG2_COEFFICIENTS))
_EXP2_COEFFICIENTS = tl.constexpr(tuple(fp32(c).value for c in reversed(elementary.EXP2_COEFFICIENTS)))
_EXP2_TERMS = tl.constexpr(len(elementary.EXP2_COEFFICIENTS))
_LARGEST_ZERO = fp32(logarithmic.LARGEST_ZERO)
_MAP_2 = tl.constexpr(tuple(fp32(m).value for m in dynamic.dynamic_map(2)))
_MAP_3 = tl.constexpr(tuple(fp32(m).value for m in dynamic.dynamic_map(3)))
_MAP_4 = tl.constexpr(tuple(fp32(m).value for m in dynamic.dynamic_map(4)))
_MIDPOINTS_2 = tl.constexpr(tuple(fp32(m).value for m in dynamic.dynamic_midpoints(2)))
_MIDPOINTS_3 = tl.constexpr(tuple(fp32(m).value for m in dynamic.dynamic_midpoints(3)))
_MIDPOINTS_4 = tl.constexpr(tuple(fp32(m).value for m in dynamic.dynamic_midpoints(4)))
# An 8-bit code is looked up by sign, exponent and six bits of mantissa; no two midpoints share such a cell.
CELL_SHIFT = 17
_CELL_SHIFT = tl.constexpr(CELL_SHIFT)
NO_VALUE = tl.constexpr(0x7FFFFFFF)


# ---- memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def pointers_to(address, offsets, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Return pointers to (blocks, positions) whose runs begin at multiples of ALIGN elements."""
    pointers = address.to(tl.pointer_type(DTYPE)) + offsets
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, [1, ALIGN * DTYPE.primitive_bitwidth // 8])
    return pointers


@triton.jit
def load_bits(address, offsets, inside, IS_BF16: tl.constexpr, ALIGN: tl.constexpr):
    """Return the bits of fp32 or bf16 elements as those of fp32."""
    if IS_BF16:
        bits = tl.load(pointers_to(address, offsets, tl.int16, ALIGN), mask=inside, other=0).to(tl.int32) << 16
    else:
        bits = tl.load(pointers_to(address, offsets, tl.int32, ALIGN), mask=inside, other=0)
    return bits


# ---- elementary.py --------------------------------------------------------------------------------------------------


@triton.jit
def log2(x):
    """Return log₂ of fp32 values that are not negative."""
    bits = tl.maximum(x.to(tl.int32, bitcast=True), SMALLEST_NORMAL_BITS)  # x is not negative
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    polynomial = t * _LOG2_COEFFICIENTS[0] + _LOG2_COEFFICIENTS[1]
    for k in tl.static_range(2, _LOG2_TERMS):
        polynomial = polynomial * t + _LOG2_COEFFICIENTS[k]
    return polynomial * t + exponent.to(tl.float32)


@triton.jit
def exp2(y):
    """Return 2 to the power of fp32 values."""
    whole = tl.floor(y)
    t = y - whole
    polynomial = t * _EXP2_COEFFICIENTS[0] + _EXP2_COEFFICIENTS[1]
    for k in tl.static_range(2, _EXP2_TERMS):
        polynomial = polynomial * t + _EXP2_COEFFICIENTS[k]
    return (polynomial * t + 1.0) * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


# ---- packing.py -----------------------------------------------------------------------------------------------------


@triton.jit
def load_words(address, first, calls, i, inside, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Return int32 words of one byte each, or one of three for 3 bits; lane l is in word l modulo their number."""
    words = ()
    for place in tl.static_range(BITS):
        pointers = pointers_to(address, first + place * calls + i, tl.uint8, ALIGN)
        words = words + (tl.load(pointers, mask=inside, other=0).to(tl.int32),)
    if BITS == 3:
        words = ((words[0] << 16) | (words[1] << 8) | words[2],)
    return words


@triton.jit
def code_of(words, LANE: tl.constexpr, BITS: tl.constexpr):
    """Return the int32 codes of a lane."""
    WORDS: tl.constexpr = 1 if BITS == 3 else BITS
    return (words[LANE % WORDS] >> (BITS * (8 // WORDS - 1 - LANE // WORDS))) & ((1 << BITS) - 1)


@triton.jit
def store_words(address, first, calls, i, inside, lanes, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Store the codes of eight lanes in the words that load_words reads."""
    WORDS: tl.constexpr = 1 if BITS == 3 else BITS
    words = ()
    for place in tl.static_range(WORDS):
        word = lanes[place]
        for plane in tl.static_range(1, 8 // WORDS):
            word = (word << BITS) | lanes[place + plane * WORDS]
        words = words + (word,)
    if BITS == 3:
        words = (words[0] >> 16, words[0] >> 8, words[0])
    for place in tl.static_range(BITS):
        pointers = pointers_to(address, first + place * calls + i, tl.uint8, ALIGN)
        tl.store(pointers, (words[place] & 0xFF).to(tl.uint8), mask=inside)


# ---- dynamic.py -----------------------------------------------------------------------------------------------------


@triton.jit
def map_entry(code, map_8, BITS: tl.constexpr):
    """Return the map's entry of a code. Few bits choose by selections: a gather's layout would be another one."""
    if BITS == 8:
        entry = tl.load(map_8 + code)
    else:
        entries: tl.constexpr = _MAP_2 if BITS == 2 else _MAP_3 if BITS == 3 else _MAP_4
        candidates = ()
        for k in tl.static_range(1 << (BITS - 1)):
            candidates = candidates + (tl.where((code & 1) == 1, entries[2 * k + 1], entries[2 * k]),)
        for bit in tl.static_range(1, BITS):
            halved = ()
            for k in tl.static_range(1 << (BITS - 1 - bit)):
                halved = halved + (tl.where(((code >> bit) & 1) == 1, candidates[2 * k + 1], candidates[2 * k]),)
            candidates = halved
        entry = candidates[0]
    return entry


@triton.jit
def midpoint(midpoints: tl.constexpr, above, BITS: tl.constexpr, LEVEL: tl.constexpr):
    """Return the midpoint to compare with after LEVEL comparisons of a binary search, chosen by selections."""
    STEP: tl.constexpr = 1 << (BITS - LEVEL)
    candidates = ()
    for k in tl.static_range(1 << LEVEL):
        candidates = candidates + (midpoints[STEP // 2 - 1 + k * STEP],)
    for level in tl.static_range(LEVEL):
        halved = ()
        for k in tl.static_range(1 << (LEVEL - level - 1)):
            halved = halved + (tl.where(above[level], candidates[(1 << (LEVEL - level - 1)) + k], candidates[k]),)
        candidates = halved
    return candidates[0]


@triton.jit
def encode_dynamic(x, cells, midpoints_8, BITS: tl.constexpr):
    """Return the number of midpoints not above x."""
    if BITS == 8:
        cell = x.to(tl.uint32, bitcast=True) >> _CELL_SHIFT
        code = tl.load(cells + cell.to(tl.int32)).to(tl.int32)
        code += (x >= tl.load(midpoints_8 + code)).to(tl.int32)
    else:
        midpoints: tl.constexpr = _MIDPOINTS_2 if BITS == 2 else _MIDPOINTS_3 if BITS == 3 else _MIDPOINTS_4
        above = (x >= midpoints[(1 << BITS) // 2 - 1],)
        code = tl.where(above[0], 1 << (BITS - 1), 0)
        for level in tl.static_range(1, BITS):
            above = above + (x >= midpoint(midpoints, above, BITS, level),)
            code += tl.where(above[level], 1 << (BITS - 1 - level), 0)
    return code


# ---- logarithmic.py -------------------------------------------------------------------------------------------------


@triton.jit
def count_not_above(keys, pivot):
    """Return (blocks,) how many keys are at most (blocks,) pivot."""
    # Sign bits of differences, none of which overflows: two instructions an element, where comparisons become three.
    above = (pivot + 1)[:, None]
    count = (keys[0] - above).to(tl.uint32) >> 31
    for lane in tl.static_range(1, 8):
        count += (keys[lane] - above).to(tl.uint32) >> 31
    return tl.sum(count.to(tl.int32), axis=1)


@triton.jit
def neighbours_of_rank(keys, length, rank, low, high):
    """Return the (blocks,) keys of 0-based ranks ``rank`` and ``rank + 1`` (the last twice), bits of fp32.

    Non-negative floats are ordered as their bits. A bisection between the bounds ``low`` and ``high`` of the sought key
    ends as soon as a pivot parts the two in every block of the warp. Most elements that the last step left at the last
    level have moved from there by far less than they lie apart from others, so what is halved is the logarithm of the
    distance to ``low``: 9 passes instead of 17.
    """
    origin = low
    while tl.max(high - low, axis=0) > 0:
        near = tl.maximum(low - origin, 1).to(tl.float32).to(tl.int32, bitcast=True)
        far = (high - origin).to(tl.float32).to(tl.int32, bitcast=True)
        pivot = origin + (near + ((far - near) >> 1)).to(tl.float32, bitcast=True).to(tl.int32)
        pivot = tl.where(high - low > 256, pivot, low + ((high - low) >> 1))  # rounding would stall the other
        pivot = tl.maximum(tl.minimum(pivot, high - 1), low)
        count = count_not_above(keys, pivot)
        high = tl.where(count > rank, pivot, high)
        low = tl.where(count > rank, low, pivot + 1)
        low = tl.where(count == rank + 1, high, low)
    lower, upper = (
        tl.where(keys[0] <= high[:, None], keys[0], 0),
        tl.where(keys[0] <= high[:, None], NO_VALUE, keys[0]),
    )
    for lane in tl.static_range(1, 8):
        below = keys[lane] <= high[:, None]
        lower = tl.maximum(lower, tl.where(below, keys[lane], 0))
        upper = tl.minimum(upper, tl.where(below, NO_VALUE, keys[lane]))
    lower, upper = tl.max(lower, axis=1), tl.min(upper, axis=1)
    return lower, tl.where(count_not_above(keys, high) >= tl.minimum(rank + 2, length), lower, upper)


@triton.jit
def block_quantile(keys, length, rank, weight, quantile, least, most):
    """Return (blocks,) fp32 quantiles of keys (blocks, 8 c), the bits of numbers that are not negative."""
    lower, upper = neighbours_of_rank(keys, length, rank, least, most)
    low, high = lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True)
    result = low + (high - low) * weight
    # Blocks whose quantile is zero although something in them is not are rare, and a warp of others skips this.
    if tl.max(((result <= 0) & (most > 0)).to(tl.int32), axis=0) > 0:
        zeros = count_not_above(keys, most * 0)
        positive = tl.maximum(length - zeros - 1, 0).to(tl.float64)
        positive_rank = tl.minimum(zeros + tl.floor(quantile * positive).to(tl.int32), length - 1)
        lower, upper = neighbours_of_rank(keys, length, positive_rank, tl.minimum(most, 1), most)
        limit = most.to(tl.float32, bitcast=True) * _LARGEST_ZERO
        result = tl.where(result > 0, result, tl.minimum(lower.to(tl.float32, bitcast=True), limit))
    return result


# ---- stochastic_rounding.py -------------------------------------------------------------------------------------


@triton.jit
def scale_draws(words, i):
    """Return (blocks,) uint32 draws for the two scales of each block, from its first call's words in (blocks, c)."""
    first, second = words[0] ^ (words[0] >> 16), words[1] ^ (words[1] >> 16)
    both = ((first & 0xFFFF) | (second << 16)).to(tl.int32, bitcast=True)
    both = tl.sum(tl.where(i == 0, both, 0), axis=1).to(tl.uint32, bitcast=True)  # one reduction for both
    return both & 0xFFFF, both >> 16


@triton.jit
def draw_of(words, LANE: tl.constexpr):
    """Return uint32 draws in [0, 65536)."""
    if LANE % 2 == 0:
        draw = words[LANE // 2] & 0xFFFF
    else:
        draw = words[LANE // 2] >> 16
    return draw


@triton.jit
def adamw_update(param, grad, exp_avg, exp_avg_sq, factor1, factor2, denominator_factor, eps, decay, step_size):
    """Return parameter, first and second moment after one step, all fp32."""
    exp_avg = exp_avg + factor1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq + factor2 * (grad * grad - exp_avg_sq)
    denominator = tl.sqrt_rn(exp_avg_sq) * denominator_factor + eps
    param = param * decay - step_size * tl.div_rn(exp_avg, denominator)
    return param, exp_avg, exp_avg_sq
