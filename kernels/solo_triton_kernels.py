# ruff: noqa: RUF005
# Triton's compiler knows neither starred tuples nor conditional expressions of tensors.
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

from . import elementary, logarithmic
from .solo_triton_arithmetic import (
    NO_VALUE,
    SMALLEST_NORMAL_BITS,
    adamw_update,
    block_quantile,
    code_of,
    draw_of,
    encode_dynamic,
    exp2,
    fp32,
    fp32_bits,
    load_bits,
    load_words,
    log2,
    map_entry,
    pointers_to,
    scale_draws,
    store_words,
)
from .triton_arithmetic import integer_power, philox, round_to_bf16

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

_LARGEST_SQUARABLE = fp32_bits(elementary.LARGEST_SQUARABLE)
_SMALLEST_NORMAL = fp32(elementary.SMALLEST_NORMAL)
_LARGEST_SPAN = fp32(-logarithmic.LOG2_FLOOR)
_SMALLEST_SPAN = fp32(logarithmic.SMALLEST_SPAN)
_LARGEST_BF16_BITS = fp32_bits(torch.finfo(torch.bfloat16).max)
CHECK_ELEMENTS = 16384  # of a gradient, by one program
_CHECK_ELEMENTS = tl.constexpr(CHECK_ELEMENTS)
_CHECK_TILE = tl.constexpr(2048)


# ---- memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def _field(table, entry, COLUMN: tl.constexpr):
    return tl.load(table + entry.to(tl.int64) * _WIDTH + COLUMN)


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
        bits = load_bits(address, first + start + offsets, start + offsets < stop, GRAD_BF16, 1)
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
            param_bits = param_bits + (load_bits(param, offsets, insides[lane], PARAM_BF16, ALIGN),)
            grad_bits = grad_bits + (load_bits(grad, offsets, insides[lane], GRAD_BF16, ALIGN),)
            if FIRST_BITS == 32:
                exp_avgs = exp_avgs + (load_bits(first_codes, offsets, insides[lane], False, ALIGN),)
            if SECOND_BITS == 32:
                exp_avg_sqs = exp_avg_sqs + (load_bits(second_codes, offsets, insides[lane], False, ALIGN),)
        if FIRST_BITS != 32:
            first_words = load_words(first_codes, first_bytes, calls, i, holds, FIRST_BITS, ALIGN)
            scale1 = load_bits(first_scale, block, exists, SCALE_BF16, 1).to(tl.float32, bitcast=True)[:, None]
        if SECOND_BITS != 32:
            second_words = load_words(second_codes, second_bytes, calls, i, holds, SECOND_BITS, ALIGN)
            scale2 = load_bits(second_scale, block, exists, SCALE_BF16, 1).to(tl.float32, bitcast=True)[:, None]
            log2_base = load_bits(second_log2_base, block, exists, SCALE_BF16, 1).to(tl.float32, bitcast=True)
            factors = (exp2(log2_base)[:, None],)
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
                exp_avg = map_entry(code_of(first_words, lane, FIRST_BITS), map_8, FIRST_BITS) * scale1
            if SECOND_BITS == 32:
                exp_avg_sq = exp_avg_sqs[lane].to(tl.float32, bitcast=True)
            else:
                exp_avg_sq = scale2
                code = code_of(second_words, lane, SECOND_BITS)
                for bit in tl.static_range(SECOND_BITS):
                    exp_avg_sq = tl.where((code >> bit) & 1 == 1, exp_avg_sq * factors[bit], exp_avg_sq)

            # Phase 2: adamw_update.
            gradient = grad_bits[lane].to(tl.float32, bitcast=True)
            if MAXIMIZE:
                gradient *= -1.0
            updated, exp_avg, exp_avg_sq = adamw_update(
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
                    rounded = round_to_bf16(params[lane], draw_of(weight_words, lane), True)
                else:
                    rounded = round_to_bf16(params[lane], 0, False)
                tl.store(pointers_to(param, offsets, tl.int16, ALIGN), rounded, mask=insides[lane])
            else:
                tl.store(pointers_to(param, offsets, tl.float32, ALIGN), params[lane], mask=insides[lane])

        # Phase 4: the first moment back to codes.
        if FIRST_BITS == 32:
            for lane in tl.static_range(8):
                offsets = elements + (lane * calls + i)
                tl.store(pointers_to(first_codes, offsets, tl.float32, ALIGN), first_moments[lane], mask=insides[lane])
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
            clamped = tl.maximum(most, SMALLEST_NORMAL_BITS).to(tl.float32, bitcast=True)
            inverse = tl.div_rn(clamped * 0.0 + 1.0, clamped)[:, None]
            codes = ()
            for lane in tl.static_range(8):
                code = encode_dynamic(first_moments[lane] * inverse, cells, midpoints_8, FIRST_BITS)
                if PARTIAL:
                    code = tl.where(insides[lane], code, 0)
                codes = codes + (code,)
            store_words(first_codes, first_bytes, calls, i, holds, codes, FIRST_BITS, ALIGN)

        if SECOND_BITS == 32:
            for lane in tl.static_range(8):
                offsets = elements + (lane * calls + i)
                tl.store(
                    pointers_to(second_codes, offsets, tl.float32, ALIGN), second_moments[lane], mask=insides[lane]
                )
        else:
            # Phase 5: the quantile of the second moment, which sets the last level.
            keys = ()
            for lane in tl.static_range(8):
                key = second_moments[lane].to(tl.int32, bitcast=True)
                if PARTIAL:
                    key = tl.where(insides[lane], key, NO_VALUE)
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
            last_level = block_quantile(keys, length, block_rank, block_weight, quantile, least, most)

            # Phase 6: the second moment back to codes.
            LAST: tl.constexpr = (1 << SECOND_BITS) - 1
            log2_scale = log2(most.to(tl.float32, bitcast=True))
            span = tl.minimum(log2_scale - log2(last_level), _LARGEST_SPAN)
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
                    scale_draw, base_draw = scale_draws(state_words, i)
                    scale_bits = round_to_bf16(scale, scale_draw, True)
                    base_bits = round_to_bf16(new_log2_base, base_draw, True)
                else:
                    scale_bits = round_to_bf16(scale, 0, False)
                    base_bits = round_to_bf16(new_log2_base, 0, False)
                tl.store(second_scale.to(tl.pointer_type(tl.int16)) + block, scale_bits, mask=exists)
                tl.store(second_log2_base.to(tl.pointer_type(tl.int16)) + block, base_bits, mask=exists)
            codes = ()
            for lane in tl.static_range(8):
                level = (log2_scale[:, None] - log2(second_moments[lane])) * inverse
                if STATE_NOISE:
                    # 1 + draw 2^-16 by its bits, less 1 - 2^-17: (draw + ½) 2^-16 without an error.
                    one_to_two = (draw_of(state_words, lane) << 7) | 0x3F800000
                    level += one_to_two.to(tl.float32, bitcast=True) - 0.99999237060546875
                else:
                    level += 0.5
                code = tl.minimum(tl.maximum(level, 0.0), LAST + 0.0).to(tl.int32)
                if PARTIAL:
                    code = tl.where(insides[lane], code, 0)
                codes = codes + (code,)
            store_words(second_codes, second_bytes, calls, i, holds, codes, SECOND_BITS, ALIGN)
