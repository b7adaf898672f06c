// packing.py in C++, for one block at a time: the Python file says what and why.

#pragma once

#include <cstdint>
#include <type_traits>

#include "elements.h"

namespace {

template <int BITS>
struct Word {
    static constexpr int codes = BITS == 3 ? 8 : 8 / BITS, bytes = BITS == 3 ? 3 : 1, mask = (1 << BITS) - 1;
    using Type = std::conditional_t<BITS == 3, uint32_t, uint8_t>;
};

template <int BITS>
INLINE void unpack(const uint8_t* __restrict packed, uint8_t* __restrict codes, int64_t padded) {
    using W = Word<BITS>;
    const int64_t plane_length = padded / W::codes;
    for (int plane = 0; plane < W::codes; ++plane) {
        VECTORIZE
        for (int64_t j = 0; j < plane_length; ++j) {
            typename W::Type word = packed[j];
            for (int byte = 1; byte < W::bytes; ++byte) word = (word << 8) | packed[byte * plane_length + j];
            codes[plane * plane_length + j] = (word >> (BITS * (W::codes - 1 - plane))) & W::mask;
        }
    }
}

template <int BITS>
INLINE void pack(const uint8_t* __restrict codes, uint8_t* __restrict packed, int64_t padded) {
    using W = Word<BITS>;
    const int64_t plane_length = padded / W::codes;
    VECTORIZE
    for (int64_t j = 0; j < plane_length; ++j) {
        typename W::Type word = codes[j];
        for (int plane = 1; plane < W::codes; ++plane) word = (word << BITS) | codes[plane * plane_length + j];
        for (int byte = 0; byte < W::bytes; ++byte)
            packed[byte * plane_length + j] = static_cast<uint8_t>(word >> (8 * (W::bytes - 1 - byte)));
    }
}

}  // namespace
