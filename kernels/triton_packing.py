# ruff: noqa: RUF005, SIM108
# Triton's compiler knows neither starred tuples nor conditional expressions of tensors.
"""Codes and draws in lanes: packing.py and the layout of philox.py for Triton kernels that hold whole blocks.

A block of 8 c elements is eight *lanes* of c: lane l, position i is element l c + i. Packed words, Philox calls and
their draws are planar in just this way, so with one (blocks, c) tensor a lane no data moves between threads.
"""

import triton
import triton.language as tl


@triton.jit
def typed_pointers(address, offsets, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    """Return pointers to (blocks, positions) whose runs begin at multiples of ALIGN elements."""
    pointers = address.to(tl.pointer_type(DTYPE)) + offsets
    if ALIGN > 1:
        pointers = tl.multiple_of(pointers, [1, ALIGN * DTYPE.primitive_bitwidth // 8])
    return pointers


@triton.jit
def load_words(address, first, calls, i, inside, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Return int32 words of one byte each, or one of three for 3 bits; lane l is in word l modulo their number."""
    words = ()
    for place in tl.static_range(BITS):
        pointers = typed_pointers(address, first + place * calls + i, tl.uint8, ALIGN)
        words = words + (tl.load(pointers, mask=inside, other=0).to(tl.int32),)
    if BITS == 3:
        words = ((words[0] << 16) | (words[1] << 8) | words[2],)
    return words


@triton.jit
def lane_code(words, LANE: tl.constexpr, BITS: tl.constexpr):
    """Return the int32 codes of a lane."""
    WORDS: tl.constexpr = 1 if BITS == 3 else BITS
    return (words[LANE % WORDS] >> (BITS * (8 // WORDS - 1 - LANE // WORDS))) & ((1 << BITS) - 1)


@triton.jit
def store_words(address, first, calls, i, inside, lanes, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Store the codes of eight lanes, int32, as packed bytes."""
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
        pointers = typed_pointers(address, first + place * calls + i, tl.uint8, ALIGN)
        tl.store(pointers, (words[place] & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def lane_draw(words, LANE: tl.constexpr):
    """Return uint32 draws in [0, 65536)."""
    if LANE % 2 == 0:
        draw = words[LANE // 2] & 0xFFFF
    else:
        draw = words[LANE // 2] >> 16
    return draw
