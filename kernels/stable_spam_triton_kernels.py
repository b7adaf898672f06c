"""AdaClip and AdaGN on CUDA: what :mod:`.stable_spam` reads and writes of gradients, in three kernels.

``partial_measures`` reads a part of a tensor in every program, ``whole_measures`` adds the parts of each tensor up in a
fixed order, ``rescale`` writes. What is decided between them is arithmetic on a few numbers for each tensor and is left
to torch. :mod:`.stable_spam_triton` launches them; this file imports triton, that one does not.

Launches must not contract to fused multiply-add (``enable_fp_fusion=False``), and no value is cast to bf16: Triton's
interpreter would truncate.
"""

import triton
import triton.language as tl

from .triton_arithmetic import round_to_bf16

# Columns of the int64 table, a row for each tensor of a launch: addresses, elements, its first program, and its place
# among all tensors of the step.
FIELDS = ("grad", "out", "numel", "first_program", "place")
_WIDTH = tl.constexpr(len(FIELDS))
_GRAD, _OUT, _NUMEL, _FIRST_PROGRAM, _PLACE = (tl.constexpr(i) for i in range(5))

ELEMENTS = 16384  # of a tensor, by one program
_ELEMENTS = tl.constexpr(ELEMENTS)
_TILE = tl.constexpr(2048)

# Dtypes of gradients and of what is written.
FP32, BF16, FP16 = range(3)
_BF16, _FP16 = tl.constexpr(BF16), tl.constexpr(FP16)


@triton.jit
def _field(table, entry, COLUMN: tl.constexpr):
    return tl.load(table + entry.to(tl.int64) * _WIDTH + COLUMN)


@triton.jit
def _load(address, offsets, inside, DTYPE: tl.constexpr):
    if DTYPE == _BF16:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + offsets, mask=inside, other=0).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    elif DTYPE == _FP16:
        return tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=inside, other=0).to(tl.float32)
    else:
        return tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0)


@triton.jit
def _store(address, offsets, inside, values, DTYPE: tl.constexpr):
    if DTYPE == _BF16:
        bits = round_to_bf16(values, 0, False)
        tl.store(address.to(tl.pointer_type(tl.int16)) + offsets, bits, mask=inside)
    elif DTYPE == _FP16:
        tl.store(address.to(tl.pointer_type(tl.float16)) + offsets, values.to(tl.float16), mask=inside)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + offsets, values, mask=inside)


@triton.jit
def _clipped(values, limit, shrink):
    return tl.where(tl.abs(values) > limit, values * shrink, values)


@triton.jit
def partial_measures(table, entry_of_program, limits, shrink, partials, CLIPS: tl.constexpr, DTYPE: tl.constexpr):
    """Write the largest magnitude and the sum of squares of a part of a tensor, as it is or as it would be clipped.

    Where it would be clipped, a tensor without a limit is not read.
    """
    program = tl.program_id(0)
    entry = tl.load(entry_of_program + program)
    first = (program - _field(table, entry, _FIRST_PROGRAM)) * _ELEMENTS
    stop = tl.minimum(_field(table, entry, _NUMEL) - first, _ELEMENTS).to(tl.int32)
    address = _field(table, entry, _GRAD)
    limit, factor = float("inf"), 1.0
    if CLIPS:
        place = _field(table, entry, _PLACE)
        limit, factor = tl.load(limits + place), tl.load(shrink + place)
        stop = tl.where(limit == float("inf"), 0, stop)
    offsets = tl.arange(0, _TILE)
    most = tl.zeros([_TILE], tl.int32)
    squares = tl.zeros([_TILE], tl.float32)
    for start in range(0, stop, _TILE):
        values = _load(address, first + start + offsets, start + offsets < stop, DTYPE)
        if CLIPS:
            values = _clipped(values, limit, factor)
        # As bits, because the largest of numbers and a NaN must be the NaN.
        most = tl.maximum(most, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        squares += values * values
    largest = tl.max(most, axis=0)
    tl.store(partials + 2 * program, largest.to(tl.float32, bitcast=True))
    tl.store(partials + 2 * program + 1, tl.sum(squares, axis=0))


@triton.jit
def whole_measures(table, partials, maxima, squares, TILE: tl.constexpr):
    """Write the largest magnitude and the sum of squares of one tensor from those of its parts."""
    entry = tl.program_id(0)
    first = _field(table, entry, _FIRST_PROGRAM)
    count = tl.cdiv(_field(table, entry, _NUMEL), _ELEMENTS).to(tl.int32)
    offsets = tl.arange(0, TILE)
    most = tl.zeros([TILE], tl.int32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        inside = start + offsets < count
        part = partials + 2 * (first + start + offsets)
        most = tl.maximum(most, tl.load(part, mask=inside, other=0).to(tl.int32, bitcast=True))
        total += tl.load(part + 1, mask=inside, other=0)
    place = _field(table, entry, _PLACE)
    tl.store(maxima + place, tl.max(most, axis=0).to(tl.float32, bitcast=True))
    tl.store(squares + place, tl.sum(total, axis=0))


@triton.jit
def rescale(table, entry_of_program, limits, shrink, factors, DTYPE: tl.constexpr, OUT_DTYPE: tl.constexpr):
    """Write a part of a tensor, clipped and scaled."""
    program = tl.program_id(0)
    entry = tl.load(entry_of_program + program)
    first = (program - _field(table, entry, _FIRST_PROGRAM)) * _ELEMENTS
    stop = tl.minimum(_field(table, entry, _NUMEL) - first, _ELEMENTS).to(tl.int32)
    address, out, place = _field(table, entry, _GRAD), _field(table, entry, _OUT), _field(table, entry, _PLACE)
    limit, less, factor = tl.load(limits + place), tl.load(shrink + place), tl.load(factors + place)
    offsets = tl.arange(0, _TILE)
    for start in range(0, stop, _TILE):
        inside = start + offsets < stop
        values = _clipped(_load(address, first + start + offsets, inside, DTYPE), limit, less)
        _store(out, first + start + offsets, inside, values * factor, OUT_DTYPE)
