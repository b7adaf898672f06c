# ruff: noqa: RUF005, SIM102
# Triton's compiler knows no starred tuples, and decides an `if` while it compiles only where all of it is constant.
"""The MicroAdam step on CUDA: what micro_adam_step_reference in micro_adam.py means, bit for bit, in four kernels.

``check_gradients`` flags tensors with a gradient that is not finite, ``advance_steps`` counts the step and derives its
scalars in fp64, ``micro_adam_step`` does all of Algorithm 1 in one pass over memory, ``adjust_counts`` moves automatic
densities. :mod:`.micro_adam_triton` fills their tables and launches them; this file imports triton, that one does not.

Layout. A program holds one selection block at a time, in registers. The sums over the window are made in a scratch of
two fp32 rows that belongs to the program and stays in the second-level cache: entries of one ring row touch different
places, so a barrier between rows is all the order that they need.

Arithmetic is IEEE addition, multiplication, division and square root in the reference's order. Launches must not
contract to fused multiply-add (``enable_fp_fusion=False``), and no value is cast to bf16: Triton's interpreter would
truncate.
"""

import torch
import triton
import triton.language as tl

from .elementary import LARGEST_SQUARABLE
from .error_codes import LEVELS
from .philox import NOISE_BLOCK
from .triton_arithmetic import integer_power, philox, round_to_bf16

# Columns of the int64 table, a row for each tensor. The first ten are filled for all kernels, ``first_check`` and
# ``first_block`` number the programs and the blocks of a launch.
FIELDS = (
    "param", "grad", "step", "skips", "hyper", "numel", "first_check", "first_block", "window", "seed",
    "error_codes", "error_min", "error_max", "indices", "values", "row_counts", "count",
    "full", "k", "last_k", "smallest_k", "length", "entries", "blocks", "error_stream", "weight_stream",
    "first_element",
)  # fmt: skip
_WIDTH = tl.constexpr(len(FIELDS))
_PARAM, _GRAD, _STEP, _SKIPS, _HYPER, _NUMEL, _FIRST_CHECK, _FIRST_BLOCK = (tl.constexpr(i) for i in range(8))
_WINDOW, _SEED, _ERROR_CODES, _ERROR_MIN, _ERROR_MAX, _INDICES, _VALUES = (tl.constexpr(i) for i in range(8, 15))
_ROW_COUNTS, _COUNT, _FULL, _K, _LAST_K, _SMALLEST_K, _LENGTH = (tl.constexpr(i) for i in range(15, 22))
_ENTRIES, _BLOCKS, _ERROR_STREAM, _WEIGHT_STREAM, _FIRST_ELEMENT = (tl.constexpr(i) for i in range(22, 27))

# Columns of the fp64 table, a row for each set of hyperparameters.
HYPER_FIELDS = ("lr", "beta1", "beta2", "eps", "weight_decay", "feedback", "window_correction", "caught_target")
_HYPER_WIDTH = tl.constexpr(len(HYPER_FIELDS))
_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _FEEDBACK, _WINDOW_CORRECTION, _CAUGHT_TARGET = (
    tl.constexpr(i) for i in range(8)
)

# Columns of the fp32 table that ``advance_steps`` fills, a row for each tensor.
SCALARS = 8
_SCALARS = tl.constexpr(SCALARS)
_TAKE, _STEP_BITS, _DENOMINATOR_FACTOR, _EPS_FP32 = (tl.constexpr(i) for i in range(4))
_DECAY, _STEP_SIZE, _FEEDBACK_SIZE, _KEPT = (tl.constexpr(i) for i in range(4, 8))

_LARGEST_SQUARABLE_BITS = tl.constexpr(int(torch.tensor(LARGEST_SQUARABLE, dtype=torch.float32).view(torch.int32)))
_LAST_CODE = tl.constexpr(LEVELS - 1)
_NOISE_BLOCK = tl.constexpr(NOISE_BLOCK)
CHECK_ELEMENTS = 16384  # of a gradient, by one program
_CHECK_ELEMENTS = tl.constexpr(CHECK_ELEMENTS)
_CHECK_TILE = tl.constexpr(2048)
_SUM_TILE = tl.constexpr(1024)


@triton.jit
def _field(table, entry, COLUMN: tl.constexpr):
    return tl.load(table + entry.to(tl.int64) * _WIDTH + COLUMN)


@triton.jit
def _load_fp32(address, offsets, inside, IS_BF16: tl.constexpr):
    if IS_BF16:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + offsets, mask=inside, other=0).to(tl.int32) << 16
    else:
        bits = tl.load(address.to(tl.pointer_type(tl.int32)) + offsets, mask=inside, other=0)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _from_bf16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


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
        values = _load_fp32(address, first + start + offsets, start + offsets < stop, GRAD_BF16)
        # The bits of infinities and NaN are larger than any number's.
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if tl.max(most, axis=0) > _LARGEST_SQUARABLE_BITS:
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
        feedback = tl.load(hyper + _FEEDBACK)
        terms = step.to(tl.int32)
        tl.store(row + _STEP_BITS, terms.to(tl.float32, bitcast=True))
        if tl.load(hyper + _WINDOW_CORRECTION) != 0.0:
            terms = tl.minimum(terms, _field(table, entry, _WINDOW).to(tl.int32))
        correction1 = (1.0 - beta1) / (1.0 - integer_power(beta1, terms))
        correction2 = (1.0 - beta2) / (1.0 - integer_power(beta2, terms))
        tl.store(row + _DENOMINATOR_FACTOR, tl.sqrt(correction2).to(tl.float32))
        tl.store(row + _EPS_FP32, tl.load(hyper + _EPS).to(tl.float32))
        tl.store(row + _DECAY, (1.0 - lr * tl.load(hyper + _WEIGHT_DECAY)).to(tl.float32))
        tl.store(row + _STEP_SIZE, (lr * correction1).to(tl.float32))
        tl.store(row + _FEEDBACK_SIZE, (lr * feedback).to(tl.float32))
        tl.store(row + _KEPT, (1.0 - feedback).to(tl.float32))
    else:
        skips = _field(table, entry, _SKIPS)
        if skips != 0:
            tl.atomic_add(skips.to(tl.pointer_type(tl.int64)), 1)


@triton.jit
def adjust_counts(table, hypers, scalars, energies, entries_of_programs):
    """Note how many elements one tensor of automatic density selected, and decide how many it selects next."""
    entry = tl.load(entries_of_programs + tl.program_id(0))
    if tl.load(scalars + entry * _SCALARS + _TAKE) != 0.0:
        first, blocks = _field(table, entry, _FIRST_BLOCK), _field(table, entry, _BLOCKS).to(tl.int32)
        selected, total = tl.zeros([_SUM_TILE], tl.float64), tl.zeros([_SUM_TILE], tl.float64)
        offsets = tl.arange(0, _SUM_TILE)
        for start in range(0, blocks, _SUM_TILE):
            pair, exists = energies + (first + start + offsets) * 2, start + offsets < blocks
            selected += tl.load(pair, mask=exists, other=0.0)
            total += tl.load(pair + 1, mask=exists, other=0.0)
        selected_sum, total_sum = tl.sum(selected, axis=0), tl.sum(total, axis=0)
        step = tl.load(scalars + entry * _SCALARS + _STEP_BITS).to(tl.int32, bitcast=True)
        row = (step - 1) % _field(table, entry, _WINDOW)
        pointer = _field(table, entry, _COUNT).to(tl.pointer_type(tl.int32))
        count = tl.load(pointer)
        tl.store(_field(table, entry, _ROW_COUNTS).to(tl.pointer_type(tl.int32)) + row, count)
        target = tl.load(hypers + _field(table, entry, _HYPER) * _HYPER_WIDTH + _CAUGHT_TARGET)
        following = tl.where(selected_sum < target * total_sum, count + count // 8 + 1, count - count // 32 - 1)
        least, most = _field(table, entry, _SMALLEST_K), _field(table, entry, _K)
        tl.store(pointer, tl.minimum(tl.maximum(following, least), most).to(tl.int32))


# ---- noise ----------------------------------------------------------------------------------------------------------


@triton.jit
def _element_draws(seed, stream, step, first_element, BLOCK: tl.constexpr):
    """Return (BLOCK,) uint32 draws in [0, 65536) of consecutive elements, as element_draws in philox.py."""
    CALLS: tl.constexpr = _NOISE_BLOCK // 8
    BLOCKS: tl.constexpr = BLOCK // _NOISE_BLOCK
    call = first_element // 8 + tl.arange(0, BLOCKS)[:, None] * CALLS + tl.arange(0, CALLS)[None, :]
    words = philox(seed, stream, step, call)
    halves = ()
    for word in tl.static_range(4):
        halves = halves + (tl.join(words[word] & 0xFFFF, words[word] >> 16),)
    # Lane = 4 a + 2 b + c, the axes in the order in which they were joined: (blocks, calls, c, b, a).
    lanes = tl.join(tl.join(halves[0], halves[1]), tl.join(halves[2], halves[3]))
    return tl.reshape(tl.permute(lanes, (0, 4, 3, 2, 1)), [BLOCK])


@triton.jit
def _per_element(values, BLOCK: tl.constexpr, ERROR_BLOCK: tl.constexpr):
    """Repeat (error blocks,) values to (BLOCK,) elements."""
    return tl.reshape(tl.broadcast_to(values[:, None], [BLOCK // ERROR_BLOCK, ERROR_BLOCK]), [BLOCK])


@triton.jit
def _last_count(count, k, last_k, last, length):
    """Return how many entries of a short last block are used, as Blocks.last_count."""
    return tl.where(count == k, last_k, tl.minimum(last_k, (count * last + length - 1) // length))


# ---- micro_adam.py --------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_blocks"])
def micro_adam_step(
    table, scalars, weights, entry_of_block, total_blocks, scratch, energies,
    BLOCK: tl.constexpr, ERROR_BLOCK: tl.constexpr, ROW: tl.constexpr, WINDOW: tl.constexpr,
    PARAM_BF16: tl.constexpr, GRAD_BF16: tl.constexpr, AUTOMATIC: tl.constexpr,
    ERROR_NOISE: tl.constexpr, WEIGHT_NOISE: tl.constexpr, FEEDBACK: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """Step every so many-th block of a launch; comments give lines of Algorithm 1.

    ``scratch`` holds 2 BLOCK fp32 for each program, zero between blocks. ROW, a power of two, is at least the entries
    of a block in a row of the ring. ``weights`` are β₁^age and β₂^age, (hyperparameters, 2, WINDOW) fp32.
    """
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    half_offsets = tl.arange(0, BLOCK // 2)
    ERROR_BLOCKS: tl.constexpr = BLOCK // ERROR_BLOCK
    first_sums = scratch + program.to(tl.int64) * (2 * BLOCK)
    second_sums = first_sums + BLOCK
    for launch_block in range(program, total_blocks, tl.num_programs(0)):
        entry = tl.load(entry_of_block + launch_block)
        row_scalars = scalars + entry * _SCALARS
        if tl.load(row_scalars + _TAKE) != 0.0:
            block = launch_block - _field(table, entry, _FIRST_BLOCK)
            start = block * BLOCK
            numel, entries = _field(table, entry, _NUMEL), _field(table, entry, _ENTRIES)
            length = tl.minimum(numel - start, BLOCK).to(tl.int32)
            inside = offsets < length
            step = tl.load(row_scalars + _STEP_BITS).to(tl.int32, bitcast=True)
            row = (step - 1) % WINDOW
            seed = _field(table, entry, _SEED).to(tl.uint32)
            first_element = _field(table, entry, _FIRST_ELEMENT)
            k, last_k = _field(table, entry, _K).to(tl.int32), _field(table, entry, _LAST_K).to(tl.int32)
            whole_length = _field(table, entry, _LENGTH).to(tl.int32)
            is_last = block == _field(table, entry, _FULL)
            indices = _field(table, entry, _INDICES).to(tl.pointer_type(tl.int16)) + block * k
            kept = _field(table, entry, _VALUES).to(tl.pointer_type(tl.int16)) + block * k
            row_counts = _field(table, entry, _ROW_COUNTS).to(tl.pointer_type(tl.int32))
            count = k
            if AUTOMATIC:
                count = tl.load(_field(table, entry, _COUNT).to(tl.pointer_type(tl.int32)))
            chosen_count = tl.where(is_last, _last_count(count, k, last_k, length, whole_length), count)

            # 4: a = g + Q⁻¹(e)
            codes = _field(table, entry, _ERROR_CODES).to(tl.pointer_type(tl.uint8)) + start // 2 + half_offsets
            bytes_inside = 2 * half_offsets < length
            both = tl.load(codes, mask=bytes_inside, other=0).to(tl.int32)
            error_block = tl.arange(0, ERROR_BLOCKS)
            bounds_inside = error_block * ERROR_BLOCK < length
            low_bits = (
                _field(table, entry, _ERROR_MIN).to(tl.pointer_type(tl.int16)) + start // ERROR_BLOCK + error_block
            )
            high_bits = (
                _field(table, entry, _ERROR_MAX).to(tl.pointer_type(tl.int16)) + start // ERROR_BLOCK + error_block
            )
            low = _from_bf16(tl.load(low_bits, mask=bounds_inside, other=0))
            high = _from_bf16(tl.load(high_bits, mask=bounds_inside, other=0))
            level = tl.div_rn(high - low, low * 0.0 + _LAST_CODE)
            error = tl.interleave(both >> 4, both & 15).to(tl.float32) * _per_element(level, BLOCK, ERROR_BLOCK)
            error += _per_element(low, BLOCK, ERROR_BLOCK)
            gradient = _load_fp32(_field(table, entry, _GRAD), start + offsets, inside, GRAD_BF16)
            if MAXIMIZE:
                gradient *= -1.0
            accumulated = tl.where(inside, gradient + error, 0.0)

            # 5: I, V = the k largest: bisection on the bits, which are ordered as the magnitudes; the first of equals
            magnitude = tl.where(inside, accumulated.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
            least, most = 0, tl.max(magnitude, axis=0)
            while least < most:
                pivot = least + (most - least + 1) // 2
                reached = tl.sum((magnitude >= pivot).to(tl.int32), axis=0)
                least = tl.where(reached >= chosen_count, pivot, least)
                most = tl.where(reached == chosen_count, pivot, tl.where(reached < chosen_count, pivot - 1, most))
            above, equal = magnitude > least, magnitude == least
            spare = chosen_count - tl.sum(above.to(tl.int32), axis=0)
            chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= spare))
            place = row * entries + tl.cumsum(chosen.to(tl.int32), axis=0) - 1
            tl.store(indices + place, offsets.to(tl.int16), mask=chosen)
            tl.store(kept + place, round_to_bf16(accumulated, 0, False), mask=chosen)
            if AUTOMATIC:
                squares = accumulated.to(tl.float64) * accumulated.to(tl.float64)
                tl.store(energies + launch_block * 2, tl.sum(tl.where(chosen, squares, 0.0), axis=0))
                tl.store(energies + launch_block * 2 + 1, tl.sum(squares, axis=0))
            # 6: a[I] = 0
            accumulated = tl.where(chosen, 0.0, accumulated)
            # 7: δ, Δ
            rest = tl.reshape(tl.where(inside, accumulated, float("inf")), [ERROR_BLOCKS, ERROR_BLOCK])
            new_low = round_to_bf16(tl.min(rest, axis=1), 0, False)
            rest = tl.reshape(tl.where(inside, accumulated, float("-inf")), [ERROR_BLOCKS, ERROR_BLOCK])
            new_high = round_to_bf16(tl.max(rest, axis=1), 0, False)
            # 8: e = Q(a)
            low, high = _from_bf16(new_low), _from_bf16(new_high)
            low, high = tl.where(bounds_inside, low, 0.0), tl.where(bounds_inside, high, 0.0)
            level = tl.div_rn(high - low, low * 0.0 + _LAST_CODE)
            levels, lows = _per_element(level, BLOCK, ERROR_BLOCK), _per_element(low, BLOCK, ERROR_BLOCK)
            divisor = tl.where(levels > 0.0, levels, 1.0)
            position = tl.where(levels > 0.0, tl.div_rn(accumulated - lows, divisor), 0.0)
            if ERROR_NOISE:
                stream = _field(table, entry, _ERROR_STREAM).to(tl.uint32)
                draws = _element_draws(seed, stream, step.to(tl.uint32), first_element + start, BLOCK)
                position += (draws.to(tl.float32) + 0.5) * 0.0000152587890625
            else:
                position += 0.5
            code = tl.minimum(tl.maximum(position, 0.0), _LAST_CODE + 0.0).to(tl.int32)
            code = tl.where(inside, code, 0)
            even, odd = tl.split(tl.reshape(code, [BLOCK // 2, 2]))
            tl.store(codes, ((even << 4) | odd).to(tl.uint8), mask=bytes_inside)
            if FEEDBACK:
                kept_share = tl.load(row_scalars + _KEPT)
                new_low = round_to_bf16(low * kept_share, 0, False)
                new_high = round_to_bf16(high * kept_share, 0, False)
            tl.store(low_bits, new_low, mask=bounds_inside)
            tl.store(high_bits, new_high, mask=bounds_inside)

            # 10, 11: the sums of m̂ / c₁ and v̂ / c₂
            place = tl.arange(0, ROW)
            hyper_weights = weights + _field(table, entry, _HYPER) * (2 * WINDOW)
            for age in range(tl.minimum(step, WINDOW)):
                tl.debug_barrier()
                past = (row + WINDOW - age) % WINDOW
                past_count = chosen_count
                if AUTOMATIC:
                    if age > 0:
                        past_count = tl.load(row_counts + past)
                        past_count = tl.where(
                            is_last, _last_count(past_count, k, last_k, length, whole_length), past_count
                        )
                used = place < past_count
                index = tl.load(indices + past * entries + place, mask=used, other=0).to(tl.int32) & 0xFFFF
                value = _from_bf16(tl.load(kept + past * entries + place, mask=used, other=0))
                first = tl.load(first_sums + index, mask=used, other=0.0)
                second = tl.load(second_sums + index, mask=used, other=0.0)
                first += value * tl.load(hyper_weights + age)
                second += value * value * tl.load(hyper_weights + WINDOW + age)
                tl.store(first_sums + index, first, mask=used)
                tl.store(second_sums + index, second, mask=used)
            tl.debug_barrier()
            first, second = tl.load(first_sums + offsets), tl.load(second_sums + offsets)
            tl.store(first_sums + offsets, tl.zeros([BLOCK], tl.float32))
            tl.store(second_sums + offsets, tl.zeros([BLOCK], tl.float32))

            # 12: p = p (1 - lr·wd) - lr·m̂ / (√v̂ + ε)
            denominator = tl.sqrt_rn(second) * tl.load(row_scalars + _DENOMINATOR_FACTOR)
            denominator += tl.load(row_scalars + _EPS_FP32)
            direction = tl.where(second > 0.0, tl.div_rn(first, tl.where(second > 0.0, denominator, 1.0)), 0.0)
            address = _field(table, entry, _PARAM)
            param = _load_fp32(address, start + offsets, inside, PARAM_BF16)
            param = param * tl.load(row_scalars + _DECAY) - direction * tl.load(row_scalars + _STEP_SIZE)
            if FEEDBACK:
                sent = code.to(tl.float32) * levels + lows
                param -= sent * tl.load(row_scalars + _FEEDBACK_SIZE)
            if PARAM_BF16:
                if WEIGHT_NOISE:
                    stream = _field(table, entry, _WEIGHT_STREAM).to(tl.uint32)
                    draws = _element_draws(seed, stream, step.to(tl.uint32), first_element + start, BLOCK)
                    rounded = round_to_bf16(param, draws, True)
                else:
                    rounded = round_to_bf16(param, 0, False)
                tl.store(address.to(tl.pointer_type(tl.int16)) + start + offsets, rounded, mask=inside)
            else:
                tl.store(address.to(tl.pointer_type(tl.float32)) + start + offsets, param, mask=inside)
            tl.debug_barrier()
