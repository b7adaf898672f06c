"""Random signs on CUDA: what the references in rademacher.py mean, bit for bit, as one Triton kernel.

Every operation is ``out ← decay · in - Σᵢ sizes[i] · u(first_index + i)``; a perturbed copy has the one size -ε.
:mod:`.rademacher_triton` launches it; this file imports triton, that one does not.

Layout. A program treats 128 elements of each of ROWS lines, as four tensors (ROWS, 4, 8), one for each word of the call
of Philox that holds their signs: bit 8 j + l of word w belongs to element 32 w + 8 j + l, and the eight elements of one
j share a call for stochastic rounding. A line is the span of one call (full signs) or 128 columns of a row (rank 1),
whose word is then the same for all rows and flipped by each one's own sign. For chosen rows with full signs, which
begin anywhere in a call, every element makes its own.

Launches must not contract to fused multiply-add (``enable_fp_fusion=False``), and nothing is cast to bf16: Triton's
interpreter would truncate.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(calls, step, slot, seed, stream):
    """Return the four uint32 words of each int64 call, in a tuple."""
    c0, c1 = calls.to(tl.uint32), (calls >> 32).to(tl.uint32)
    c2, c3 = c0 * 0 + step.to(tl.uint32), c0 * 0 + slot.to(tl.uint32)
    k0, k1 = c0 * 0 + seed.to(tl.uint32), c0 * 0 + stream.to(tl.uint32)
    for _ in tl.static_range(10):
        # One widening multiplication gives both halves.
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0, (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = product1.to(tl.uint32), product0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _chosen_word(words, which):
    """Return for each element the word of number ``which``, 0 to 3."""
    low = tl.where(which == 0, words[0], words[1])
    high = tl.where(which == 2, words[2], words[3])
    return tl.where(which < 2, low, high)


@triton.jit
def _signs_of(elements, index, step, seed, stream):
    """Return the sign bits (uint32 0 or 1) of int64 elements, each from a call of its own."""
    words = _philox(elements >> 7, step, index, seed, stream)
    return (_chosen_word(words, (elements >> 5) & 3) >> (elements & 31).to(tl.uint32)) & 1


@triton.jit
def _draws(group, lane, elements, step, slot, seed, stream, ALIGNED: tl.constexpr):
    """Return 16-bit draws as int32; ``group`` is the first element of every eight."""
    if ALIGNED:
        words = _philox(group >> 3, step, slot, seed, stream)
        which = lane
    else:
        words = _philox(elements >> 3, step, slot, seed, stream)
        which = elements & 7
    return ((_chosen_word(words, which >> 1) >> ((which & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def _to_bf16_bits(value, draws, STOCHASTIC: tl.constexpr):
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if STOCHASTIC:
        rounded = tl.where(magnitude < 0x7F800000, bits + draws, bits)
    else:
        rounded = tl.where(magnitude < 0x7F800000, bits + 0x7FFF + ((bits >> 16) & 1), bits)
    return tl.where(magnitude > 0x7F800000, 0x7FC0, rounded >> 16).to(tl.int16)


@triton.jit
def _on_fp16_grid(value, draws):
    """Return fp32 rounded stochastically to what fp16 represents."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.abs(value)
    normal = ((bits + (draws >> 3)) & -8192).to(tl.float32, bitcast=True)
    # The minimum keeps the branch that is not taken finite.
    small = tl.floor(tl.minimum(magnitude, 1.0) * 16777216.0 + (draws >> 2).to(tl.float32) * 6.103515625e-05)
    small = small * 5.9604644775390625e-08
    rounded = tl.where(magnitude < 6.103515625e-05, tl.where(bits < 0, -small, small), normal)
    return tl.where((bits & 0x7FFFFFFF) < 0x7F800000, rounded, value)


@triton.jit
def _write(source, out, acc, decay, e, dst, group, lane, inside, step, slot, seed, stream,
           DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    if DTYPE == 1:  # bf16
        value = (tl.load(source + e, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = tl.load(source + e, mask=inside, other=0.0).to(tl.float32)
    value = value * decay - acc
    draws = lane
    if STOCHASTIC:
        draws = _draws(group, lane, e, step, slot, seed, stream, ALIGNED)
    if DTYPE == 1:
        tl.store(out + dst, _to_bf16_bits(value, draws, STOCHASTIC), mask=inside)
    elif DTYPE == 2:
        if STOCHASTIC:
            value = _on_fp16_grid(value, draws)
        tl.store(out + dst, value.to(tl.float16), mask=inside)
    else:
        tl.store(out + dst, value, mask=inside)


@triton.jit(do_not_specialize=["count", "first_index", "seed", "sign_stream", "weight_stream", "step", "slot"])
def apply_signs(
    source, out, chosen, factors, count, first_index, rows_out, columns, seed, sign_stream, weight_stream, step, slot,
    RANK1: tl.constexpr, CHOSEN: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Treat ROWS lines of 128 elements.

    Without RANK1 and CHOSEN the tensor is one row: ``rows_out`` is 1 and ``columns`` the number of elements.
    DTYPE is 0 for fp32, 1 for bf16 (pointers to int16), 2 for fp16. ALIGNED: every row begins at a multiple of eight.
    """
    program = tl.program_id(0).to(tl.int64)
    lines = tl.arange(0, ROWS)[:, None, None].to(tl.int64)
    group = tl.arange(0, 4)[None, :, None]
    lane = tl.arange(0, 8)[None, None, :]
    bit = (group * 8 + lane).to(tl.uint32)
    spans = (columns + 127).to(tl.int64) // 128
    if RANK1 or CHOSEN:
        place = program // spans * ROWS + lines
        inside_row = place < rows_out
        column = program % spans * 128
        row = place
        if CHOSEN:
            row = tl.load(chosen + place, mask=inside_row, other=0)
        first, limit = row * columns + column, columns - column
    else:
        place, row = lines * 0, lines * 0
        column = (program * ROWS + lines) * 128
        inside_row = column < columns
        first, limit = column, columns - column
    destination = place * columns + column

    acc0 = tl.zeros([ROWS, 4, 8], tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for i in range(count):
        size = tl.load(factors + 1 + i).to(tl.int32, bitcast=True)
        index = first_index + i
        if RANK1:
            words = _philox(program % spans + lines * 0, step, index, seed, sign_stream)
            flip = _signs_of(columns + row, index, step, seed, sign_stream)
            b0, b1, b2, b3 = words[0] >> bit, words[1] >> bit, words[2] >> bit, words[3] >> bit
            b0, b1, b2, b3 = b0 ^ flip, b1 ^ flip, b2 ^ flip, b3 ^ flip
        elif CHOSEN:
            e = first + group * 8 + lane
            b0 = _signs_of(e, index, step, seed, sign_stream)
            b1 = _signs_of(e + 32, index, step, seed, sign_stream)
            b2 = _signs_of(e + 64, index, step, seed, sign_stream)
            b3 = _signs_of(e + 96, index, step, seed, sign_stream)
        else:
            words = _philox(program * ROWS + lines, step, index, seed, sign_stream)
            b0, b1, b2, b3 = words[0] >> bit, words[1] >> bit, words[2] >> bit, words[3] >> bit
        acc0 += (size ^ ((b0 & 1) << 31).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        acc1 += (size ^ ((b1 & 1) << 31).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        acc2 += (size ^ ((b2 & 1) << 31).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        acc3 += (size ^ ((b3 & 1) << 31).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

    decay = tl.load(factors)
    for w in tl.static_range(4):
        if w == 0:
            acc = acc0
        elif w == 1:
            acc = acc1
        elif w == 2:
            acc = acc2
        else:
            acc = acc3
        offset = w * 32 + group * 8
        inside = inside_row & (offset + lane < limit)
        _write(source, out, acc, decay, first + offset + lane, destination + offset + lane, first + offset, lane,
               inside, step, slot, seed, weight_stream, DTYPE, STOCHASTIC, ALIGNED)  # fmt: skip
