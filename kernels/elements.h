// What the compiled steps share of a tensor's elements: their types, philox.py and stochastic_rounding.py in C++. The
// Python files say what and why; this one says how.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VECTORIZE _Pragma("omp simd")
// Inlined into the phases, where the usual block length is a constant: loops of eight vectors need no other code then.
#define INLINE inline __attribute__((always_inline))

namespace {

template <class To, class From>
inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "same width");
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

enum Type : int64_t { FP32 = 0, BF16 = 1, FP16 = 2 };

// ---- philox.py --------------------------------------------------------------------------------------------------

constexpr uint32_t MULTIPLIER_0 = 0xD2511F53, MULTIPLIER_1 = 0xCD9E8D57, WEYL_0 = 0x9E3779B9, WEYL_1 = 0xBB67AE85;
constexpr int ROUNDS = 10;

// Writes 8 * calls 16-bit draws, planar: draw `lane` of call i at [lane * calls + i].
INLINE void draw_16bit(uint32_t seed, uint32_t stream, uint32_t step, uint64_t first_call, int64_t calls,
                       int32_t* draws) {
    int64_t i = 0;
#if defined(__AVX512F__)
    // Words live in the low halves of 64-bit lanes, as the widening multiplication reads them; high halves hold refuse.
    const __m512i multiplier_0 = _mm512_set1_epi64(MULTIPLIER_0), multiplier_1 = _mm512_set1_epi64(MULTIPLIER_1);
    for (; i + 16 <= calls; i += 16) {
        __m512i c0[2], c1[2], c2[2], c3[2];
        for (int half = 0; half < 2; ++half) {
            const __m512i first = _mm512_set1_epi64(static_cast<int64_t>(first_call) + i + 8 * half);
            c0[half] = _mm512_add_epi64(first, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
            c1[half] = _mm512_srli_epi64(c0[half], 32);
            c2[half] = _mm512_set1_epi64(step);
            c3[half] = _mm512_setzero_si512();
        }
        __m512i k0 = _mm512_set1_epi64(seed), k1 = _mm512_set1_epi64(stream);
        for (int round = 0; round < ROUNDS; ++round) {
            for (int half = 0; half < 2; ++half) {
                const __m512i product0 = _mm512_mul_epu32(c0[half], multiplier_0);
                const __m512i product1 = _mm512_mul_epu32(c2[half], multiplier_1);
                c0[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[half], k0, 0x96);  // xor
                c2[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[half], k1, 0x96);
                c1[half] = product1;
                c3[half] = product0;
            }
            k0 = _mm512_add_epi64(k0, _mm512_set1_epi64(WEYL_0));
            k1 = _mm512_add_epi64(k1, _mm512_set1_epi64(WEYL_1));
        }
        int32_t* lane = draws + i;
        for (const __m512i* word : {c0, c1, c2, c3}) {
            const __m512i low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(word[0]));
            const __m512i both = _mm512_inserti64x4(low, _mm512_cvtepi64_epi32(word[1]), 1);
            _mm512_storeu_si512(lane, _mm512_and_si512(both, _mm512_set1_epi32(0xFFFF)));
            _mm512_storeu_si512(lane + calls, _mm512_srli_epi32(both, 16));
            lane += 2 * calls;
        }
    }
#endif
    VECTORIZE
    for (int64_t j = i; j < calls; ++j) {
        const uint64_t call = first_call + static_cast<uint64_t>(j);
        uint32_t c0 = static_cast<uint32_t>(call), c1 = static_cast<uint32_t>(call >> 32), c2 = step, c3 = 0;
        uint32_t k0 = seed, k1 = stream;
        for (int round = 0; round < ROUNDS; ++round) {
            const uint64_t product0 = static_cast<uint64_t>(c0) * MULTIPLIER_0;
            const uint64_t product1 = static_cast<uint64_t>(c2) * MULTIPLIER_1;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(product1);
            c3 = static_cast<uint32_t>(product0);
            k0 += WEYL_0;
            k1 += WEYL_1;
        }
        draws[0 * calls + j] = c0 & 0xFFFF;
        draws[1 * calls + j] = c0 >> 16;
        draws[2 * calls + j] = c1 & 0xFFFF;
        draws[3 * calls + j] = c1 >> 16;
        draws[4 * calls + j] = c2 & 0xFFFF;
        draws[5 * calls + j] = c2 >> 16;
        draws[6 * calls + j] = c3 & 0xFFFF;
        draws[7 * calls + j] = c3 >> 16;
    }
}

// Writes 4 * calls words, those of one call beside each other.
inline void philox_words(uint32_t seed, uint32_t stream, uint32_t step, uint32_t slot, uint64_t first_call, int64_t calls,
                         uint32_t* words) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i multiplier_0 = _mm512_set1_epi64(MULTIPLIER_0), multiplier_1 = _mm512_set1_epi64(MULTIPLIER_1);
    const __m512i low_half = _mm512_set1_epi64(0xFFFFFFFF);
    for (; i + 16 <= calls; i += 16) {
        __m512i c0[2], c1[2], c2[2], c3[2];
        for (int half = 0; half < 2; ++half) {
            const __m512i first = _mm512_set1_epi64(static_cast<int64_t>(first_call) + i + 8 * half);
            // In this order, interleaving below puts the calls in theirs.
            c0[half] = _mm512_add_epi64(first, _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
            c1[half] = _mm512_srli_epi64(c0[half], 32);
            c2[half] = _mm512_set1_epi64(step);
            c3[half] = _mm512_set1_epi64(slot);
        }
        __m512i k0 = _mm512_set1_epi64(seed), k1 = _mm512_set1_epi64(stream);
        for (int round = 0; round < ROUNDS; ++round) {
            for (int half = 0; half < 2; ++half) {
                const __m512i product0 = _mm512_mul_epu32(c0[half], multiplier_0);
                const __m512i product1 = _mm512_mul_epu32(c2[half], multiplier_1);
                c0[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[half], k0, 0x96);  // xor
                c2[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[half], k1, 0x96);
                c1[half] = product1;
                c3[half] = product0;
            }
            k0 = _mm512_add_epi64(k0, _mm512_set1_epi64(WEYL_0));
            k1 = _mm512_add_epi64(k1, _mm512_set1_epi64(WEYL_1));
        }
        for (int half = 0; half < 2; ++half) {
            const __m512i first = _mm512_or_si512(_mm512_and_si512(c0[half], low_half), _mm512_slli_epi64(c1[half], 32));
            const __m512i second = _mm512_or_si512(_mm512_and_si512(c2[half], low_half), _mm512_slli_epi64(c3[half], 32));
            uint32_t* out = words + 4 * (i + 8 * half);
            _mm512_storeu_si512(out, _mm512_unpacklo_epi64(first, second));
            _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(first, second));
        }
    }
#endif
    VECTORIZE
    for (int64_t j = i; j < calls; ++j) {
        const uint64_t call = first_call + static_cast<uint64_t>(j);
        uint32_t c0 = static_cast<uint32_t>(call), c1 = static_cast<uint32_t>(call >> 32), c2 = step, c3 = slot;
        uint32_t k0 = seed, k1 = stream;
        for (int round = 0; round < ROUNDS; ++round) {
            const uint64_t product0 = static_cast<uint64_t>(c0) * MULTIPLIER_0;
            const uint64_t product1 = static_cast<uint64_t>(c2) * MULTIPLIER_1;
            c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
            c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
            c1 = static_cast<uint32_t>(product1);
            c3 = static_cast<uint32_t>(product0);
            k0 += WEYL_0;
            k1 += WEYL_1;
        }
        words[4 * j] = c0;
        words[4 * j + 1] = c1;
        words[4 * j + 2] = c2;
        words[4 * j + 3] = c3;
    }
}

// ---- stochastic_rounding.py -------------------------------------------------------------------------------------

// draw: none rounds to the nearest, ties to even. For finite values.
INLINE void write_bf16(float value, const int32_t* draw, uint16_t* out) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    *out = static_cast<uint16_t>((bits + (draw ? static_cast<uint32_t>(*draw) : 0x7FFFu + ((bits >> 16) & 1))) >> 16);
}

INLINE float from_bf16(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// draws: none rounds to the nearest, ties to even.
INLINE void write_bf16(const float* values, const int32_t* draws, uint16_t* out, int64_t length) {
    if (draws) {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) {
            const uint32_t bits = bit_cast<uint32_t>(values[i]), magnitude = bits & 0x7FFFFFFFu;
            const uint32_t rounded = magnitude < 0x7F800000u ? bits + static_cast<uint32_t>(draws[i]) : bits;
            out[i] = static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7FC0u : rounded >> 16);
        }
    } else {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) {
            const uint32_t bits = bit_cast<uint32_t>(values[i]);
            const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
            out[i] = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
        }
    }
}

INLINE void read_bf16(const uint16_t* in, float* out, int64_t length) {
    VECTORIZE
    for (int64_t i = 0; i < length; ++i) out[i] = from_bf16(in[i]);
}

INLINE float from_fp16(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFFu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    return bit_cast<float>((magnitude < 0x400u ? subnormal : normal) | sign);
}

// draw: in [0, 65536), or -1 to round to the nearest, ties to even.
INLINE uint16_t to_fp16(float value, int32_t draw) {
    const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    const uint32_t carry = draw < 0 ? 0xFFFu + ((bits >> 13) & 1) : static_cast<uint32_t>(draw) >> 3;
    const uint32_t rounded = magnitude + carry;
    const uint32_t normal = rounded >= 0x47800000u ? 0x7C00u : (rounded - 0x38000000u) >> 13;
    // Below 2⁻¹⁴ halves are multiples of 2⁻²⁴. Adding 2²³ rounds to an integer, to the nearest even one.
    const float scaled = std::min(bit_cast<float>(magnitude) * 0x1p24f, 1024.0f);
    const float drawn = scaled + static_cast<float>(draw >> 2) * 0x1p-14f;
    const float integer = draw < 0 ? (scaled + 0x1p23f) - 0x1p23f : std::floor(drawn);
    const uint32_t subnormal = static_cast<uint32_t>(static_cast<int32_t>(integer));
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return static_cast<uint16_t>((magnitude < 0x7F800000u ? finite : special) | sign);
}

}  // namespace
