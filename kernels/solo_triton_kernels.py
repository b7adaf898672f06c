# ruff: noqa: RUF005
# Triton's compiler knows no starred tuples.
"""The SOLO step on CUDA: what solo_step_reference in solo.py means, bit for bit, as three Triton kernels.

``check_gradients`` flags tensors with a gradient that is not finite, ``advance_steps`` counts the step and derives its
scalars in fp64, ``solo_step`` does all else in one pass over memory. :mod:`.solo_triton` fills their tables and
launches them; this file imports triton, that one does not.

Layout. One warp holds a tile of whole blocks. A block of 8 c elements is eight *lanes* of c: lane l, position i is
element l c + i. Packed words, Philox calls and their draws are planar in just this way, so with one (blocks, c) tensor
a lane everything but the reductions over a block happens inside a thread; with c = 16 four threads share a block, four
elements of each lane to a thread, which loads and stores fp32 in 16 bytes. The compiler never has to move data between
threads to change a layout.

Arithmetic is IEEE addition, multiplication, division and square root in the reference's order. Launches must not
contract to fused multiply-add (``enable_fp_fusion=False``); division and root are the correctly rounded ones, and no
value is cast to bf16: Triton's interpreter would truncate.
"""

import torch
import triton
import triton.language as tl

from . import dynamic, elementary, logarithmic
from .triton_arithmetic import integer_power, philox, round_to_bf16
from .triton_packing import lane_code, lane_draw, load_words, store_words, typed_pointers


def _fp32(values: object) -> tl.constexpr:
    """Return numbers rounded as the reference's tensors are."""
    return tl.constexpr(torch.tensor(values, dtype=torch.float32).tolist())


def _fp32_bits(value: float) -> tl.constexpr:
    return tl.constexpr(int(torch.tensor(value, dtype=torch.float32).view(torch.int32)))


# Columns of the int64 table, a row for each tensor. ``rank`` and ``weight`` place the quantile in a full block and in a
# row's last one; weights are the bits of fp32.
FIELDS = (
    "param", "grad", "step", "skips", "hyper", "numel", "first_check", "first_program",
    "first_codes", "first_scale", "second_codes", "second_scale", "second_log2_base",
    "columns", "blocks", "blocks_per_row", "first_row_bytes", "second_row_bytes",
    "seed", "state_stream", "weight_stream", "first_row", "rank", "weight", "last_rank", "last_weight",
)  # fmt: skip
_WIDTH = tl.constexpr(len(FIELDS))
_PARAM, _GRAD, _STEP, _SKIPS, _HYPER, _NUMEL, _FIRST_CHECK, _FIRST_PROGRAM = (tl.constexpr(i) for i in range(8))
_FIRST_CODES, _FIRST_SCALE, _SECOND_CODES, _SECOND_SCALE, _SECOND_LOG2_BASE = (tl.constexpr(i) for i in range(8, 13))
_COLUMNS, _BLOCKS, _BLOCKS_PER_ROW, _FIRST_ROW_BYTES, _SECOND_ROW_BYTES = (tl.constexpr(i) for i in range(13, 18))
_SEED, _STATE_STREAM, _WEIGHT_STREAM, _FIRST_ROW = (tl.constexpr(i) for i in range(18, 22))
_RANK, _WEIGHT, _LAST_RANK, _LAST_WEIGHT = (tl.constexpr(i) for i in range(22, 26))

# Columns of the fp64 table, a row for each set of hyperparameters.
HYPER_FIELDS = ("lr", "beta1", "beta2", "eps", "weight_decay", "quantile")
_HYPER_WIDTH = tl.constexpr(len(HYPER_FIELDS))
_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _QUANTILE = (tl.constexpr(i) for i in range(6))

# Columns of the fp32 table that ``advance_steps`` fills, a row for each tensor.
SCALARS = 8
_SCALARS = tl.constexpr(SCALARS)
_TAKE, _STEP_BITS, _ONE_MINUS_BETA1, _ONE_MINUS_BETA2 = (tl.constexpr(i) for i in range(4))
_DENOMINATOR_FACTOR, _EPS_FP32, _DECAY, _STEP_SIZE = (tl.constexpr(i) for i in range(4, 8))

_LARGEST_SQUARABLE = _fp32_bits(elementary.LARGEST_SQUARABLE)
_SMALLEST_NORMAL = _fp32(elementary.SMALLEST_NORMAL)
_SMALLEST_NORMAL_BITS = _fp32_bits(elementary.SMALLEST_NORMAL)
_SQRT_HALF_BITS = tl.constexpr(elementary.SQRT_HALF_BITS)
_LOG2_COEFFICIENTS = tl.constexpr(tuple(_fp32(c).value for c in reversed(elementary.LOG2_COEFFICIENTS)))
_LOG2_TERMS = tl.constexpr(len(elementary.LOG2_COEFFICIENTS))
_EXP2_COEFFICIENTS = tl.constexpr(tuple(_fp32(c).value for c in reversed(elementary.EXP2_COEFFICIENTS)))
_EXP2_TERMS = tl.constexpr(len(elementary.EXP2_COEFFICIENTS))
_LARGEST_SPAN = _fp32(-logarithmic.LOG2_FLOOR)
_LARGEST_ZERO = _fp32(logarithmic.LARGEST_ZERO)
_SMALLEST_SPAN = _fp32(logarithmic.SMALLEST_SPAN)
_MAP_2 = tl.constexpr(tuple(_fp32(m).value for m in dynamic.dynamic_map(2)))
_MAP_3 = tl.constexpr(tuple(_fp32(m).value for m in dynamic.dynamic_map(3)))
_MAP_4 = tl.constexpr(tuple(_fp32(m).value for m in dynamic.dynamic_map(4)))
_MIDPOINTS_2 = tl.constexpr(tuple(_fp32(m).value for m in dynamic.dynamic_midpoints(2)))
_MIDPOINTS_3 = tl.constexpr(tuple(_fp32(m).value for m in dynamic.dynamic_midpoints(3)))
_MIDPOINTS_4 = tl.constexpr(tuple(_fp32(m).value for m in dynamic.dynamic_midpoints(4)))
# An 8-bit code is looked up by sign, exponent and six bits of mantissa; no two midpoints share such a cell.
CELL_SHIFT = 17
_CELL_SHIFT = tl.constexpr(CELL_SHIFT)
_LARGEST_BF16_BITS = _fp32_bits(torch.finfo(torch.bfloat16).max)
_NO_VALUE = tl.constexpr(0x7FFFFFFF)
CHECK_ELEMENTS = 16384  # of a gradient, by one program
_CHECK_ELEMENTS = tl.constexpr(CHECK_ELEMENTS)
_CHECK_TILE = tl.constexpr(2048)


# ---- memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def _field(table, entry, COLUMN: tl.constexpr):
    return tl.load(table + entry.to(tl.int64) * _WIDTH + COLUMN)


@triton.jit
def _load_bits(address, offsets, inside, IS_BF16: tl.constexpr, ALIGN: tl.constexpr):
    """Return the bits of fp32 or bf16 elements as those of fp32."""
    if IS_BF16:
        bits = tl.load(typed_pointers(address, offsets, tl.int16, ALIGN), mask=inside, other=0).to(tl.int32) << 16
    else:
        bits = tl.load(typed_pointers(address, offsets, tl.int32, ALIGN), mask=inside, other=0)
    return bits


# ---- once for each tensor -------------------------------------------------------------------------------------------


@triton.jit
def check_gradients(table, entry_of_program, flags, GRAD_BF16: tl.constexpr):
    """Set flags[entry] where a gradient holds NaN or a value whose square overflows."""
    program = tl.program_id(0)
    entry = tl.load(entry_of_program + program)
    first = (program - _field(table, entry, _FIRST_CHECK)) * _CHECK_ELEMENTS
    stop = tl.minimum(_field(table, entry, _NUMEL) - first, _CHECK_ELEMENTS).to(tl.int32)
    address = _field(table, entry, _GRAD)
    offsets = tl.arange(0, _CHECK_TILE)
    most = tl.zeros([_CHECK_TILE], tl.int32)
    for start in range(0, stop, _CHECK_TILE):
        bits = _load_bits(address, first + start + offsets, start + offsets < stop, GRAD_BF16, 1)
        most = tl.maximum(most, bits & 0x7FFFFFFF)  # the bits of infinities and NaN are larger than any number's
    if tl.max(most, axis=0) > _LARGEST_SQUARABLE:
        tl.store(flags + entry, 1)


@triton.jit
def advance_steps(table, hypers, flags, scalars):
    """Count the step of one tensor and derive its scalars, or count that it is skipped; clears its flag."""
    entry = tl.program_id(0)
    flag = tl.load(flags + entry)
    tl.store(flags + entry, 0)
    row = scalars + entry * _SCALARS
    tl.store(row + _TAKE, (flag == 0).to(tl.float32))
    if flag == 0:
        counter = _field(table, entry, _STEP).to(tl.pointer_type(tl.float32))
        step = tl.load(counter) + 1.0
        tl.store(counter, step)
        hyper = hypers + _field(table, entry, _HYPER) * _HYPER_WIDTH
        lr, beta1, beta2 = tl.load(hyper + _LR), tl.load(hyper + _BETA1), tl.load(hyper + _BETA2)
        exponent = step.to(tl.int32)
        tl.store(row + _STEP_BITS, exponent.to(tl.float32, bitcast=True))
        tl.store(row + _ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32))
        tl.store(row + _ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32))
        correction = tl.sqrt(1.0 - integer_power(beta2, exponent))
        tl.store(row + _DENOMINATOR_FACTOR, (1.0 / correction).to(tl.float32))
        tl.store(row + _EPS_FP32, tl.load(hyper + _EPS).to(tl.float32))
        tl.store(row + _DECAY, (1.0 - lr * tl.load(hyper + _WEIGHT_DECAY)).to(tl.float32))
        tl.store(row + _STEP_SIZE, (lr / (1.0 - integer_power(beta1, exponent))).to(tl.float32))
    else:
        skips = _field(table, entry, _SKIPS)
        if skips != 0:
            tl.atomic_add(skips.to(tl.pointer_type(tl.int64)), 1)


# ---- elementary.py --------------------------------------------------------------------------------------------------


@triton.jit
def _log2(x):
    bits = tl.maximum(x.to(tl.int32, bitcast=True), _SMALLEST_NORMAL_BITS)  # x is not negative
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    polynomial = t * _LOG2_COEFFICIENTS[0] + _LOG2_COEFFICIENTS[1]
    for k in tl.static_range(2, _LOG2_TERMS):
        polynomial = polynomial * t + _LOG2_COEFFICIENTS[k]
    return polynomial * t + exponent.to(tl.float32)


@triton.jit
def _exp2(y):
    whole = tl.floor(y)
    t = y - whole
    polynomial = t * _EXP2_COEFFICIENTS[0] + _EXP2_COEFFICIENTS[1]
    for k in tl.static_range(2, _EXP2_TERMS):
        polynomial = polynomial * t + _EXP2_COEFFICIENTS[k]
    return (polynomial * t + 1.0) * ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


# ---- dynamic.py -----------------------------------------------------------------------------------------------------


@triton.jit
def _entry(code, map_8, BITS: tl.constexpr):
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
def _midpoint(midpoints: tl.constexpr, above, BITS: tl.constexpr, LEVEL: tl.constexpr):
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
def _encode_dynamic(x, cells, midpoints_8, BITS: tl.constexpr):
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
            above = above + (x >= _midpoint(midpoints, above, BITS, level),)
            code += tl.where(above[level], 1 << (BITS - 1 - level), 0)
    return code


# ---- logarithmic.py -------------------------------------------------------------------------------------------------


@triton.jit
def _count_not_above(keys, pivot):
    """Return (blocks,) how many keys are at most (blocks,) pivot."""
    # Sign bits of differences, none of which overflows: two instructions an element, where comparisons become three.
    above = (pivot + 1)[:, None]
    count = (keys[0] - above).to(tl.uint32) >> 31
    for lane in tl.static_range(1, 8):
        count += (keys[lane] - above).to(tl.uint32) >> 31
    return tl.sum(count.to(tl.int32), axis=1)


@triton.jit
def _neighbours_of_rank(keys, length, rank, low, high):
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
        count = _count_not_above(keys, pivot)
        high = tl.where(count > rank, pivot, high)
        low = tl.where(count > rank, low, pivot + 1)
        low = tl.where(count == rank + 1, high, low)
    lower, upper = (
        tl.where(keys[0] <= high[:, None], keys[0], 0),
        tl.where(keys[0] <= high[:, None], _NO_VALUE, keys[0]),
    )
    for lane in tl.static_range(1, 8):
        below = keys[lane] <= high[:, None]
        lower = tl.maximum(lower, tl.where(below, keys[lane], 0))
        upper = tl.minimum(upper, tl.where(below, _NO_VALUE, keys[lane]))
    lower, upper = tl.max(lower, axis=1), tl.min(upper, axis=1)
    return lower, tl.where(_count_not_above(keys, high) >= tl.minimum(rank + 2, length), lower, upper)


@triton.jit
def _block_quantile(keys, length, rank, weight, quantile, least, most):
    lower, upper = _neighbours_of_rank(keys, length, rank, least, most)
    low, high = lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True)
    result = low + (high - low) * weight
    # Blocks whose quantile is zero although something in them is not are rare, and a warp of others skips this.
    if tl.max(((result <= 0) & (most > 0)).to(tl.int32), axis=0) > 0:
        zeros = _count_not_above(keys, most * 0)
        positive = tl.maximum(length - zeros - 1, 0).to(tl.float64)
        positive_rank = tl.minimum(zeros + tl.floor(quantile * positive).to(tl.int32), length - 1)
        lower, upper = _neighbours_of_rank(keys, length, positive_rank, tl.minimum(most, 1), most)
        limit = most.to(tl.float32, bitcast=True) * _LARGEST_ZERO
        result = tl.where(result > 0, result, tl.minimum(lower.to(tl.float32, bitcast=True), limit))
    return result


# ---- stochastic_rounding.py -------------------------------------------------------------------------------------


@triton.jit
def _scale_draws(words, i):
    """Return (blocks,) uint32 draws for the two scales of each block, from its first call's words in (blocks, c)."""
    first, second = words[0] ^ (words[0] >> 16), words[1] ^ (words[1] >> 16)
    both = ((first & 0xFFFF) | (second << 16)).to(tl.int32, bitcast=True)
    both = tl.sum(tl.where(i == 0, both, 0), axis=1).to(tl.uint32, bitcast=True)  # one reduction for both
    return both & 0xFFFF, both >> 16


@triton.jit
def _adamw_update(param, grad, exp_avg, exp_avg_sq, factor1, factor2, denominator_factor, eps, decay, step_size):
    exp_avg = exp_avg + factor1 * (grad - exp_avg)
    exp_avg_sq = exp_avg_sq + factor2 * (grad * grad - exp_avg_sq)
    denominator = tl.sqrt_rn(exp_avg_sq) * denominator_factor + eps
    param = param * decay - step_size * tl.div_rn(exp_avg, denominator)
    return param, exp_avg, exp_avg_sq


# ---- solo.py --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tiles_per_program"])
def solo_step(
    table, hypers, scalars, entry_of_program, tiles_per_program, map_8, cells, midpoints_8,
    FIRST_BITS: tl.constexpr, SECOND_BITS: tl.constexpr, BLOCK: tl.constexpr,
    PARAM_BF16: tl.constexpr, GRAD_BF16: tl.constexpr,
    STATE_NOISE: tl.constexpr, WEIGHT_NOISE: tl.constexpr, MAXIMIZE: tl.constexpr,
    EVEN: tl.constexpr, ALIGN: tl.constexpr, SCALE_BF16: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, TILE_CALLS: tl.constexpr,
):  # fmt: skip
    """Step ``tiles_per_program`` tiles of TILE_BLOCKS blocks of one tensor.

    EVEN promises rows of whole blocks, ALIGN that the lanes of all blocks start at multiples of so many elements.
    """
    program = tl.program_id(0)
    entry = tl.load(entry_of_program + program)
    param, grad = _field(table, entry, _PARAM), _field(table, entry, _GRAD)
    first_codes, first_scale = _field(table, entry, _FIRST_CODES), _field(table, entry, _FIRST_SCALE)
    second_codes, second_scale = _field(table, entry, _SECOND_CODES), _field(table, entry, _SECOND_SCALE)
    second_log2_base = _field(table, entry, _SECOND_LOG2_BASE)
    columns, blocks = _field(table, entry, _COLUMNS), _field(table, entry, _BLOCKS)
    blocks_per_row, first_row = _field(table, entry, _BLOCKS_PER_ROW), _field(table, entry, _FIRST_ROW)
    first_row_bytes, second_row_bytes = _field(table, entry, _FIRST_ROW_BYTES), _field(table, entry, _SECOND_ROW_BYTES)
    seed = _field(table, entry, _SEED).to(tl.uint32)
    state_stream = _field(table, entry, _STATE_STREAM).to(tl.uint32)
    weight_stream = _field(table, entry, _WEIGHT_STREAM).to(tl.uint32)
    rank, last_rank = _field(table, entry, _RANK).to(tl.int32), _field(table, entry, _LAST_RANK).to(tl.int32)
    weight = _field(table, entry, _WEIGHT).to(tl.int32).to(tl.float32, bitcast=True)
    last_weight = _field(table, entry, _LAST_WEIGHT).to(tl.int32).to(tl.float32, bitcast=True)
    quantile = tl.load(hypers + _field(table, entry, _HYPER) * _HYPER_WIDTH + _QUANTILE)
    row_scalars = scalars + entry * _SCALARS
    step = tl.load(row_scalars + _STEP_BITS).to(tl.uint32, bitcast=True)
    factor1, factor2 = tl.load(row_scalars + _ONE_MINUS_BETA1), tl.load(row_scalars + _ONE_MINUS_BETA2)
    denominator_factor, eps = tl.load(row_scalars + _DENOMINATOR_FACTOR), tl.load(row_scalars + _EPS_FP32)
    decay, step_size = tl.load(row_scalars + _DECAY), tl.load(row_scalars + _STEP_SIZE)

    BLOCK_CALLS: tl.constexpr = BLOCK // 8
    # Without these, no tile has an element that is none; a block that is none is computed and not stored.
    PARTIAL: tl.constexpr = (not EVEN) or (TILE_CALLS != BLOCK_CALLS)
    i = tl.arange(0, TILE_CALLS)[None, :]
    tile = (program - _field(table, entry, _FIRST_PROGRAM)) * tiles_per_program
    stop = tl.minimum(tile + tiles_per_program, (blocks + TILE_BLOCKS - 1) // TILE_BLOCKS)
    stop = tl.where(tl.load(row_scalars + _TAKE) != 0.0, stop, tile)
    for first_block in range(tile * TILE_BLOCKS, stop * TILE_BLOCKS, TILE_BLOCKS):
        # Where the blocks are.
        block = first_block + tl.arange(0, TILE_BLOCKS).to(tl.int64)
        exists = block < blocks
        if EVEN:
            elements = (block * BLOCK)[:, None]
            first_bytes, second_bytes = (
                (block * (BLOCK_CALLS * FIRST_BITS))[:, None],
                (block * (BLOCK_CALLS * SECOND_BITS))[:, None],
            )
            call = ((block + first_row * blocks_per_row) * BLOCK_CALLS)[:, None] + i
            length = tl.full([TILE_BLOCKS], BLOCK, tl.int32)
            calls: tl.constexpr = BLOCK_CALLS
            block_rank, block_weight = rank, weight
        else:
            matrix_row = block // blocks_per_row
            column = (block - matrix_row * blocks_per_row) * BLOCK
            elements = (matrix_row * columns + column)[:, None]
            first_bytes = (matrix_row * first_row_bytes + column // 8 * FIRST_BITS)[:, None]
            second_bytes = (matrix_row * second_row_bytes + column // 8 * SECOND_BITS)[:, None]
            call = ((matrix_row + first_row) * ((columns + 7) // 8) + column // 8)[:, None] + i
            length = tl.minimum(columns - column, BLOCK).to(tl.int32)
            calls = ((length + 7) // 8)[:, None]
            block_rank, block_weight = (
                tl.where(length < BLOCK, last_rank, rank),
                tl.where(length < BLOCK, last_weight, weight),
            )
        holds = exists[:, None] & (i < calls)
        insides = ()
        for lane in tl.static_range(8):
            if EVEN or ALIGN > 1:
                insides = insides + (holds,)
            else:
                insides = insides + (holds & (lane * calls + i < length[:, None]),)

        # All loads at once, so that they are under way together.
        param_bits, grad_bits, exp_avgs, exp_avg_sqs = (), (), (), ()
        for lane in tl.static_range(8):
            offsets = elements + (lane * calls + i)
            param_bits = param_bits + (_load_bits(param, offsets, insides[lane], PARAM_BF16, ALIGN),)
            grad_bits = grad_bits + (_load_bits(grad, offsets, insides[lane], GRAD_BF16, ALIGN),)
            if FIRST_BITS == 32:
                exp_avgs = exp_avgs + (_load_bits(first_codes, offsets, insides[lane], False, ALIGN),)
            if SECOND_BITS == 32:
                exp_avg_sqs = exp_avg_sqs + (_load_bits(second_codes, offsets, insides[lane], False, ALIGN),)
        if FIRST_BITS != 32:
            first_words = load_words(first_codes, first_bytes, calls, i, holds, FIRST_BITS, ALIGN)
            scale1 = _load_bits(first_scale, block, exists, SCALE_BF16, 1).to(tl.float32, bitcast=True)[:, None]
        if SECOND_BITS != 32:
            second_words = load_words(second_codes, second_bytes, calls, i, holds, SECOND_BITS, ALIGN)
            scale2 = _load_bits(second_scale, block, exists, SCALE_BF16, 1).to(tl.float32, bitcast=True)[:, None]
            log2_base = _load_bits(second_log2_base, block, exists, SCALE_BF16, 1).to(tl.float32, bitcast=True)
            factors = (_exp2(log2_base)[:, None],)
            for bit in tl.static_range(1, SECOND_BITS):
                factors = factors + (factors[bit - 1] * factors[bit - 1],)
        # Philox counts in the layout of what was loaded, to which a zero ties it: a bf16's low bits, or those above a
        # packed word. Otherwise its words would have to change hands between threads.
        if WEIGHT_NOISE:
            weight_words = philox(seed, weight_stream, step, call + (param_bits[0] & 1))

        params, first_moments, second_moments = (), (), ()
        for lane in tl.static_range(8):
            # Phase 1: the moments in fp32.
            if FIRST_BITS == 32:
                exp_avg = exp_avgs[lane].to(tl.float32, bitcast=True)
            else:
                exp_avg = _entry(lane_code(first_words, lane, FIRST_BITS), map_8, FIRST_BITS) * scale1
            if SECOND_BITS == 32:
                exp_avg_sq = exp_avg_sqs[lane].to(tl.float32, bitcast=True)
            else:
                exp_avg_sq = scale2
                code = lane_code(second_words, lane, SECOND_BITS)
                for bit in tl.static_range(SECOND_BITS):
                    exp_avg_sq = tl.where((code >> bit) & 1 == 1, exp_avg_sq * factors[bit], exp_avg_sq)

            # Phase 2: adamw_update.
            gradient = grad_bits[lane].to(tl.float32, bitcast=True)
            if MAXIMIZE:
                gradient *= -1.0
            updated, exp_avg, exp_avg_sq = _adamw_update(
                param_bits[lane].to(tl.float32, bitcast=True), gradient, exp_avg, exp_avg_sq,
                factor1, factor2, denominator_factor, eps, decay, step_size,
            )  # fmt: skip
            if PARTIAL:
                exp_avg = tl.where(insides[lane], exp_avg, 0.0)
            params = params + (updated,)
            first_moments = first_moments + (exp_avg,)
            second_moments = second_moments + (exp_avg_sq,)

        # Phase 3: write of the weights.
        for lane in tl.static_range(8):
            offsets = elements + (lane * calls + i)
            if PARAM_BF16:
                if WEIGHT_NOISE:
                    rounded = round_to_bf16(params[lane], lane_draw(weight_words, lane), True)
                else:
                    rounded = round_to_bf16(params[lane], 0, False)
                tl.store(typed_pointers(param, offsets, tl.int16, ALIGN), rounded, mask=insides[lane])
            else:
                tl.store(typed_pointers(param, offsets, tl.float32, ALIGN), params[lane], mask=insides[lane])

        # Phase 4: the first moment back to codes.
        if FIRST_BITS == 32:
            for lane in tl.static_range(8):
                offsets = elements + (lane * calls + i)
                tl.store(
                    typed_pointers(first_codes, offsets, tl.float32, ALIGN), first_moments[lane], mask=insides[lane]
                )
        else:
            most = first_moments[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
            for lane in tl.static_range(1, 8):
                most = tl.maximum(most, first_moments[lane].to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            most = tl.max(most, axis=1)
            if SCALE_BF16:
                scale = tl.minimum(most, _LARGEST_BF16_BITS).to(tl.float32, bitcast=True)
                scale_bits = round_to_bf16(scale, 0, False)
                tl.store(first_scale.to(tl.pointer_type(tl.int16)) + block, scale_bits, mask=exists)
                most = scale_bits.to(tl.int32) << 16
            else:
                tl.store(first_scale.to(tl.pointer_type(tl.int32)) + block, most, mask=exists)
            # A zero block multiplies by a finite number, so its elements stay 0 and take the code of the map's 0.
            clamped = tl.maximum(most, _SMALLEST_NORMAL_BITS).to(tl.float32, bitcast=True)
            inverse = tl.div_rn(clamped * 0.0 + 1.0, clamped)[:, None]
            codes = ()
            for lane in tl.static_range(8):
                code = _encode_dynamic(first_moments[lane] * inverse, cells, midpoints_8, FIRST_BITS)
                if PARTIAL:
                    code = tl.where(insides[lane], code, 0)
                codes = codes + (code,)
            store_words(first_codes, first_bytes, calls, i, holds, codes, FIRST_BITS, ALIGN)

        if SECOND_BITS == 32:
            for lane in tl.static_range(8):
                offsets = elements + (lane * calls + i)
                tl.store(
                    typed_pointers(second_codes, offsets, tl.float32, ALIGN), second_moments[lane], mask=insides[lane]
                )
        else:
            # Phase 5: the quantile of the second moment, which sets the last level.
            keys = ()
            for lane in tl.static_range(8):
                key = second_moments[lane].to(tl.int32, bitcast=True)
                if PARTIAL:
                    key = tl.where(insides[lane], key, _NO_VALUE)
                keys = keys + (key,)
            least, most = keys[0], keys[0]
            for lane in tl.static_range(1, 8):
                least, most = tl.minimum(least, keys[lane]), tl.maximum(most, keys[lane])
            if PARTIAL:
                most = tl.where(insides[0], keys[0], 0)
                for lane in tl.static_range(1, 8):
                    most = tl.maximum(most, tl.where(insides[lane], keys[lane], 0))
            least, most = tl.min(least, axis=1), tl.max(most, axis=1)
            least = tl.minimum(least, most)  # a block that is none has no value at all
            last_level = _block_quantile(keys, length, block_rank, block_weight, quantile, least, most)

            # Phase 6: the second moment back to codes.
            LAST: tl.constexpr = (1 << SECOND_BITS) - 1
            log2_scale = _log2(most.to(tl.float32, bitcast=True))
            span = tl.minimum(log2_scale - _log2(last_level), _LARGEST_SPAN)
            per_step = tl.div_rn(span, span * 0.0 + LAST)
            # Not a minus sign, which some versions of Triton subtract from zero: the span of a constant block is -0.
            new_log2_base = per_step * -1.0
            if not SCALE_BF16:
                tl.store(second_scale.to(tl.pointer_type(tl.int32)) + block, most, mask=exists)
                tl.store(second_log2_base.to(tl.pointer_type(tl.float32)) + block, new_log2_base, mask=exists)
            divisor = tl.maximum(per_step, _SMALLEST_SPAN)
            inverse = tl.div_rn(divisor * 0.0 + 1.0, divisor)[:, None]
            if STATE_NOISE:
                state_words = philox(seed, state_stream, step, call + (second_words[0] >> 24))
            if SCALE_BF16:
                scale = tl.minimum(most, _LARGEST_BF16_BITS).to(tl.float32, bitcast=True)
                if STATE_NOISE:
                    scale_draw, base_draw = _scale_draws(state_words, i)
                    scale_bits = round_to_bf16(scale, scale_draw, True)
                    base_bits = round_to_bf16(new_log2_base, base_draw, True)
                else:
                    scale_bits = round_to_bf16(scale, 0, False)
                    base_bits = round_to_bf16(new_log2_base, 0, False)
                tl.store(second_scale.to(tl.pointer_type(tl.int16)) + block, scale_bits, mask=exists)
                tl.store(second_log2_base.to(tl.pointer_type(tl.int16)) + block, base_bits, mask=exists)
            codes = ()
            for lane in tl.static_range(8):
                level = (log2_scale[:, None] - _log2(second_moments[lane])) * inverse
                if STATE_NOISE:
                    # 1 + draw 2^-16 by its bits, less 1 - 2^-17: (draw + ½) 2^-16 without an error.
                    one_to_two = (lane_draw(state_words, lane) << 7) | 0x3F800000
                    level += one_to_two.to(tl.float32, bitcast=True) - 0.99999237060546875
                else:
                    level += 0.5
                code = tl.minimum(tl.maximum(level, 0.0), LAST + 0.0).to(tl.int32)
                if PARTIAL:
                    code = tl.where(insides[lane], code, 0)
                codes = codes + (code,)
            store_words(second_codes, second_bytes, calls, i, holds, codes, SECOND_BITS, ALIGN)
