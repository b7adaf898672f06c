// The formats of the SOLO states on a CPU: elementary.py, dynamic.py and logarithmic.py in C++, for one block at a time.
// The Python files say what and why; this one says how.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "elements.h"
#include "packing.h"
#include "solo_constants.h"

namespace {

// ---- elementary.py ----------------------------------------------------------------------------------------------

INLINE float log2_of(float x) {
    const int32_t bits = std::max(bit_cast<int32_t>(x), bit_cast<int32_t>(SMALLEST_NORMAL));  // x is not negative
    const int32_t exponent = (bits - SQRT_HALF_BITS) >> 23;
    const uint32_t mantissa = static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23);
    const float t = bit_cast<float>(mantissa) - 1.0f;
    constexpr int terms = sizeof(LOG2_COEFFICIENTS) / sizeof(float);
    float polynomial = LOG2_COEFFICIENTS[terms - 1];
    for (int k = terms - 2; k >= 0; --k) polynomial = polynomial * t + LOG2_COEFFICIENTS[k];
    return polynomial * t + static_cast<float>(exponent);
}

INLINE float exp2_of(float y) {
    const float whole = std::floor(y);
    const float t = y - whole;
    constexpr int terms = sizeof(EXP2_COEFFICIENTS) / sizeof(float);
    float polynomial = EXP2_COEFFICIENTS[terms - 1];
    for (int k = terms - 2; k >= 0; --k) polynomial = polynomial * t + EXP2_COEFFICIENTS[k];
    return (polynomial * t + 1.0f) * bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

// ---- dynamic.py -------------------------------------------------------------------------------------------------

// out[i] = table[codes[i]] * scale, codes below 16.
INLINE void look_up(const float* table, const uint8_t* codes, float scale, float* out, int64_t length) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 entries = _mm512_loadu_ps(table), factor = _mm512_set1_ps(scale);
    for (; i + 16 <= length; i += 16) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        _mm512_storeu_ps(out + i, _mm512_mul_ps(_mm512_permutexvar_ps(index, entries), factor));
    }
#elif defined(__AVX2__)
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8), factor = _mm256_set1_ps(scale);
    for (; i + 8 <= length; i += 8) {
        const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
        const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        const __m256 entry = _mm256_blendv_ps(
            _mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper_half);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(entry, factor));
    }
#endif
    for (; i < length; ++i) out[i] = table[codes[i]] * scale;
}

template <int BITS>
INLINE void decode_dynamic(const uint8_t* codes, float scale, float* out, int64_t length) {
    const float* table = DYNAMIC_MAP_8;
    if constexpr (BITS == 8) {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) out[i] = table[codes[i]] * scale;
    } else {
        table = BITS == 2 ? DYNAMIC_MAP_2 : BITS == 3 ? DYNAMIC_MAP_3 : DYNAMIC_MAP_4;
        look_up(table, codes, scale, out, length);
    }
}

// The number of midpoints not above each values[i] * inverse_scale.
template <int BITS>
INLINE void search_few_midpoints(const float* midpoints, const float* values, float inverse_scale, uint8_t* codes,
                          int64_t length) {
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 table = _mm512_loadu_ps(midpoints), factor = _mm512_set1_ps(inverse_scale);
    for (; i + 16 <= length; i += 16) {
        const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(values + i), factor);
        __m512i code = _mm512_setzero_si512();
        for (int half = 1 << (BITS - 1); half; half >>= 1) {
            const __m512i probe = _mm512_add_epi32(code, _mm512_set1_epi32(half - 1));
            const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_permutexvar_ps(probe, table), _CMP_GE_OQ);
            code = _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(half));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(code));
    }
#endif
    VECTORIZE
    for (int64_t j = i; j < length; ++j) {
        const float x = values[j] * inverse_scale;
        int32_t code = 0;
        for (int k = 0; k < (1 << BITS) - 1; ++k) code += x >= midpoints[k];
        codes[j] = static_cast<uint8_t>(code);
    }
}

// For 8 bits a table gives the code from sign, exponent and six bits of mantissa up to one last comparison: no two
// midpoints share such a cell.
class MidpointCells {
   public:
    MidpointCells() {
        for (int32_t cell = 0; cell < CELLS; ++cell) {
            const int32_t low = cell ? (cell + FIRST) << SHIFT : 0, high = ((cell + 1 + FIRST) << SHIFT) - 1;
            below_[0][cell] = count(bit_cast<float>(low));
            below_[1][cell] = count(-bit_cast<float>(high));
        }
    }

    INLINE void search(const float* values, float inverse_scale, uint8_t* codes, int64_t length) const {
        const int32_t* table = below_[0];
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) {
            const float x = values[i] * inverse_scale;
            const int32_t bits = bit_cast<int32_t>(x);
            const int32_t cell = std::min(std::max(((bits & 0x7FFFFFFF) >> SHIFT) - FIRST, 0), CELLS - 1);
            const int32_t code = table[cell + (bits < 0 ? CELLS : 0)];
            codes[i] = static_cast<uint8_t>(code + (x >= DYNAMIC_MIDPOINTS_8[code]));
        }
    }

   private:
    static constexpr int SHIFT = 17;
    static constexpr int32_t FIRST = (127 - 22) << 6;  // 2^-22 lies below the smallest midpoint, 2.75e-7
    static constexpr int32_t CELLS = (22 << 6) + 1;    // up to 1
    int32_t below_[2][CELLS];

    static int32_t count(float x) {
        int32_t count = 0;
        while (count < 255 && DYNAMIC_MIDPOINTS_8[count] <= x) ++count;
        return count;
    }
};
const MidpointCells midpoint_cells;

template <int BITS>
INLINE void encode_dynamic(const float* values, float inverse_scale, uint8_t* codes, int64_t length) {
    if constexpr (BITS == 8) {
        midpoint_cells.search(values, inverse_scale, codes, length);
    } else {
        constexpr const float* midpoints =
            BITS == 2 ? DYNAMIC_MIDPOINTS_2 : BITS == 3 ? DYNAMIC_MIDPOINTS_3 : DYNAMIC_MIDPOINTS_4;
        search_few_midpoints<BITS>(midpoints, values, inverse_scale, codes, length);
    }
}

// ---- logarithmic.py ---------------------------------------------------------------------------------------------

template <int BITS>
INLINE void decode_logarithmic(const uint8_t* codes, float scale, float log2_base, float* out, int64_t length) {
    float factor[BITS];
    factor[0] = exp2_of(log2_base);
    for (int bit = 1; bit < BITS; ++bit) factor[bit] = factor[bit - 1] * factor[bit - 1];
    VECTORIZE
    for (int64_t i = 0; i < length; ++i) {
        const int32_t code = codes[i];
        float value = scale;
        for (int bit = 0; bit < BITS; ++bit) value = (code >> bit) & 1 ? value * factor[bit] : value;
        out[i] = value;
    }
}

// Non-negative floats are ordered as their bits, and integers reduce in any order.
INLINE int32_t count_not_above(const float* values, int64_t length, int32_t pivot) {
    int64_t i = 0;
    int32_t count = 0;
#if defined(__AVX512F__)
    const __m512i pivots = _mm512_set1_epi32(pivot);
    for (; i + 16 <= length; i += 16)
        count += __builtin_popcount(_mm512_cmple_epi32_mask(_mm512_loadu_si512(values + i), pivots));
#endif
#pragma omp simd reduction(+ : count)
    for (int64_t j = i; j < length; ++j) count += bit_cast<int32_t>(values[j]) <= pivot;
    return count;
}

struct Neighbours {
    float low, high;
};

// The elements of 0-based ranks `rank` and `rank + 1` (the last twice), by bisection on their bits, which ends as soon
// as a pivot parts the two. The first pivot is `guess`, the result does not depend on it.
INLINE Neighbours neighbours_of_rank(const float* values, int64_t length, int64_t rank, float least, float most,
                                     float guess) {
    int32_t low = bit_cast<int32_t>(least), high = bit_cast<int32_t>(most);
    int32_t pivot = std::clamp(bit_cast<int32_t>(guess), low, high);
    for (; low < high; pivot = low + (high - low) / 2) {
        const int32_t count = count_not_above(values, length, pivot);
        if (count > rank) high = pivot;
        else low = pivot + 1;
        if (count == rank + 1) break;
    }
    int32_t lower = 0, upper = std::numeric_limits<int32_t>::max(), count = 0;
#pragma omp simd reduction(max : lower) reduction(min : upper) reduction(+ : count)
    for (int64_t i = 0; i < length; ++i) {
        const int32_t bits = bit_cast<int32_t>(values[i]);
        const bool below = bits <= high;
        lower = std::max(lower, below ? bits : 0);
        upper = std::min(upper, below ? std::numeric_limits<int32_t>::max() : bits);
        count += below;
    }
    if (count >= std::min(rank + 2, length)) upper = lower;
    return {bit_cast<float>(lower), bit_cast<float>(upper)};
}

INLINE float block_quantile(const float* values, int64_t length, double quantile, float least, float most,
                            float guess) {
    const double position = quantile * static_cast<double>(length - 1), rank = std::floor(position);
    const Neighbours around = neighbours_of_rank(values, length, static_cast<int64_t>(rank), least, most, guess);
    const float interpolated = around.low + (around.high - around.low) * static_cast<float>(position - rank);
    if (interpolated > 0) return interpolated;
    const int64_t zeros = count_not_above(values, length, 0);
    const auto positive = static_cast<double>(std::max<int64_t>(length - zeros - 1, 0));
    const int64_t positive_rank = zeros + static_cast<int64_t>(std::floor(quantile * positive));
    if (positive_rank >= length) return 0.0f;  // nothing is positive
    const float least_positive = bit_cast<float>(int32_t{1});
    const Neighbours found = neighbours_of_rank(values, length, positive_rank, least_positive, most, guess);
    return std::min(found.low, most * LARGEST_ZERO);
}

// rounding: 0.5, or from draws where there are some.
template <int BITS>
INLINE void encode_logarithmic(const float* values, float log2_scale, float inverse_step, const int32_t* draws,
                        uint8_t* codes, int64_t length) {
    constexpr float last = (1 << BITS) - 1;
    auto code = [=](float value, float rounding) {
        const float level = (log2_scale - log2_of(value)) * inverse_step + rounding;
        const float clamped = level > 0.0f ? level : 0.0f;  // first, so that truncation is the floor
        return static_cast<uint8_t>(static_cast<int32_t>(clamped < last ? clamped : last));
    };
    if (draws) {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i)
            codes[i] = code(values[i], (static_cast<float>(draws[i]) + 0.5f) * 0x1p-16f);
    } else {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) codes[i] = code(values[i], 0.5f);
    }
}

}  // namespace
