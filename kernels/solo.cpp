// The SOLO step on a CPU: what solo_step_reference in solo.py means, bit for bit, in one pass over memory.
//
// Up to sixteen blocks at a time go through the numbered phases below while their fp32 moments stay in the first-level
// cache. All arithmetic is IEEE addition, multiplication, division and square root in the reference's order, so the
// build must not contract to fused multiply-add or reassociate (-ffp-contract=off, no -ffast-math). The loops are
// written for the compiler's vectorizer; intrinsics stand only where it finds no vector form (table look-up, search).
// solo_cpu.py builds this file, generates solo_constants.h from the reference's constants, and mirrors `Tensor`.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "solo_constants.h"

#define VECTORIZE _Pragma("omp simd")
// Inlined into the phases, where the usual block length is a constant: loops of eight vectors need no other code then.
#define INLINE inline __attribute__((always_inline))

namespace {

// One row of the table that solo_cpu.py fills for every step; all fields are 64 bits wide.
struct Tensor {
    void* param;  // (rows, columns), contiguous
    const void* grad;
    float* step;
    uint8_t* first_codes;  // or the fp32 moment where first_bits is 32
    float* first_scale;
    uint8_t* second_codes;
    float* second_scale;
    float* second_log2_base;
    int64_t rows, columns;
    int64_t param_type, grad_type;
    int64_t state_stream, weight_stream, first_row;
    int64_t hyper;  // row of the table of hyperparameters
};

// One row of the table of hyperparameters, shared by all tensors with the same settings.
struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, quantile;
    double first_bits, second_bits, block_size, seed;
    double stochastic_rounding, bf16_stochastic_rounding, maximize;
};

enum Type : int64_t { FP32 = 0, BF16 = 1 };

constexpr int64_t USUAL_LENGTH = 128;
constexpr int64_t BATCH_BLOCKS = 16;
// Two fp32 arrays of this length and their neighbours fit a 32 KiB first-level cache.
constexpr int64_t BATCH_ELEMENTS = 2048;
// What a thread claims at a time: its gradient, checked first, is still in the second-level cache when it is used.
constexpr int64_t ITEM_ELEMENTS = 65536;

template <class To, class From>
inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "same width");
    To result;
    std::memcpy(&result, &value, sizeof(result));
    return result;
}

// ---- elementary.py ----------------------------------------------------------------------------------------------

INLINE float log2_of(float x) {
    const int32_t bits = std::max(bit_cast<int32_t>(x), bit_cast<int32_t>(SMALLEST_NORMAL));  // x is not negative
    const int32_t exponent = (bits - SQRT_HALF_BITS) >> 23;
    const float t = bit_cast<float>(bits - (exponent << 23)) - 1.0f;
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

// ---- packing.py -------------------------------------------------------------------------------------------------

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

// ---- stochastic_rounding.py -------------------------------------------------------------------------------------

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
    for (int64_t i = 0; i < length; ++i) out[i] = bit_cast<float>(static_cast<uint32_t>(in[i]) << 16);
}

// ---- solo.py ----------------------------------------------------------------------------------------------------

// A tensor's numbers for one step, rounded to fp32 where torch rounds a Python scalar that meets an fp32 tensor.
struct Plan {
    Tensor tensor;
    int64_t first_bits, second_bits, block_size, blocks_per_row, first_row_bytes, second_row_bytes;
    int64_t items, blocks_per_item, first_ticket;
    float sign, one_minus_beta1, one_minus_beta2, denominator_factor, eps, decay, step_size;
    double quantile;
    uint32_t seed, step;
    bool state_noise, weight_noise;
    std::atomic<int64_t> checks_left{0};
    std::atomic<bool> finite{true};

    int64_t blocks() const { return tensor.rows * blocks_per_row; }
    int64_t block_length() const { return std::min(block_size, tensor.columns); }
};

constexpr int64_t padded_to_eight(int64_t length) { return (length + 7) / 8 * 8; }

int64_t row_bytes(int64_t columns, int64_t block_size, int64_t bits) {
    return (columns / block_size * block_size + padded_to_eight(columns % block_size)) / 8 * bits;
}

void fill(Plan& plan, const Tensor& tensor, const Hyper& hyper) {
    plan.tensor = tensor;
    plan.first_bits = static_cast<int64_t>(hyper.first_bits);
    plan.second_bits = static_cast<int64_t>(hyper.second_bits);
    plan.block_size = static_cast<int64_t>(hyper.block_size);
    plan.weight_noise = tensor.param_type == BF16 && hyper.bf16_stochastic_rounding != 0;
    plan.state_noise = plan.second_bits != 32 && hyper.stochastic_rounding != 0;
    if (plan.first_bits == 32 && plan.second_bits == 32 && !plan.weight_noise) {
        // Nothing depends on blocks then: long ones save the cost of starting short loops.
        plan.tensor.columns *= plan.tensor.rows;
        plan.tensor.rows = 1;
        plan.block_size = BATCH_ELEMENTS;
    }
    const int64_t columns = plan.tensor.columns;
    plan.blocks_per_row = (columns + plan.block_size - 1) / plan.block_size;
    plan.first_row_bytes = row_bytes(columns, plan.block_size, plan.first_bits);
    plan.second_row_bytes = row_bytes(columns, plan.block_size, plan.second_bits);
    plan.blocks_per_item = std::max<int64_t>(1, ITEM_ELEMENTS / plan.block_length());
    plan.items = (plan.blocks() + plan.blocks_per_item - 1) / plan.blocks_per_item;
    plan.checks_left = plan.items;

    const double step = static_cast<double>(*tensor.step) + 1;
    plan.step = static_cast<uint32_t>(static_cast<uint64_t>(step));
    plan.seed = static_cast<uint32_t>(hyper.seed);
    plan.sign = hyper.maximize != 0 ? -1.0f : 1.0f;
    plan.one_minus_beta1 = static_cast<float>(1 - hyper.beta1);
    plan.one_minus_beta2 = static_cast<float>(1 - hyper.beta2);
    plan.denominator_factor = static_cast<float>(std::pow(1 - std::pow(hyper.beta2, step), -0.5));
    plan.eps = static_cast<float>(hyper.eps);
    plan.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay);
    plan.step_size = static_cast<float>(hyper.lr / (1 - std::pow(hyper.beta1, step)));
    plan.quantile = hyper.quantile;
}

struct Scratch {
    explicit Scratch(int64_t stride)
        : stride(stride), first(new float[BATCH_BLOCKS * stride]), second(new float[BATCH_BLOCKS * stride]),
          grad(new float[stride]), param(new float[stride]), draws(new int32_t[stride]), codes(new uint8_t[stride]) {}

    int64_t stride;
    std::unique_ptr<float[]> first, second, grad, param;
    std::unique_ptr<int32_t[]> draws;
    std::unique_ptr<uint8_t[]> codes;
};

struct Block {
    int64_t row, index, length, offset;  // offset: of its first element in the matrix
    uint8_t *first_codes, *second_codes;
    float *first_scale, *second_scale, *second_log2_base;
    float *exp_avg, *exp_avg_sq;  // fp32 moments: in the scratch, or in the state itself where it has 32 bits
    float first_most, second_most, second_least, quantile;
};

template <class Visitor>
void with_bits(int64_t bits, Visitor&& visit) {
    if (bits == 2) visit(std::integral_constant<int, 2>{});
    if (bits == 3) visit(std::integral_constant<int, 3>{});
    if (bits == 4) visit(std::integral_constant<int, 4>{});
    if (bits == 8) visit(std::integral_constant<int, 8>{});
}

Block locate(const Plan& plan, int64_t number, Scratch& scratch, int64_t slot) {
    const Tensor& t = plan.tensor;
    Block block;
    block.row = number / plan.blocks_per_row;
    block.index = number % plan.blocks_per_row;
    const int64_t column = block.index * plan.block_size;
    block.length = std::min(plan.block_size, t.columns - column);
    block.offset = block.row * t.columns + column;
    block.exp_avg = scratch.first.get() + slot * scratch.stride;
    block.exp_avg_sq = scratch.second.get() + slot * scratch.stride;
    if (plan.first_bits == 32) {
        block.exp_avg = reinterpret_cast<float*>(t.first_codes) + block.offset;
    } else {
        block.first_codes = t.first_codes + block.row * plan.first_row_bytes + column / 8 * plan.first_bits;
        block.first_scale = t.first_scale + number;
    }
    if (plan.second_bits == 32) {
        block.exp_avg_sq = reinterpret_cast<float*>(t.second_codes) + block.offset;
    } else {
        block.second_codes = t.second_codes + block.row * plan.second_row_bytes + column / 8 * plan.second_bits;
        block.second_scale = t.second_scale + number;
        block.second_log2_base = t.second_log2_base + number;
    }
    return block;
}

template <class Length>
void draw(const Plan& plan, const Block& block, Length length, int64_t stream, int32_t* draws) {
    const uint64_t calls_per_row = static_cast<uint64_t>((plan.tensor.columns + 7) / 8);
    const uint64_t row = static_cast<uint64_t>(block.row + plan.tensor.first_row);
    const uint64_t first = row * calls_per_row + static_cast<uint64_t>(block.index * plan.block_size / 8);
    draw_16bit(plan.seed, static_cast<uint32_t>(stream), plan.step, first, padded_to_eight(length) / 8, draws);
}

// Phase 1: the moments in fp32.
template <class Length>
void decode(const Plan& plan, const Block& block, Length length, uint8_t* codes) {
    with_bits(plan.first_bits, [&](auto bits) {
        unpack<bits>(block.first_codes, codes, padded_to_eight(length));
        decode_dynamic<bits>(codes, *block.first_scale, block.exp_avg, length);
    });
    with_bits(plan.second_bits, [&](auto bits) {
        unpack<bits>(block.second_codes, codes, padded_to_eight(length));
        decode_logarithmic<bits>(codes, *block.second_scale, *block.second_log2_base, block.exp_avg_sq, length);
    });
}

// Phase 2: adamw_update, in place. What the encoders need to know of the moments falls out of it.
template <class Length>
void adamw_update(const Plan& plan, Block& block, Length length, const float* __restrict grad, float* __restrict param) {
    float* __restrict exp_avg = block.exp_avg;
    float* __restrict exp_avg_sq = block.exp_avg_sq;
    const float sign = plan.sign, one_minus_beta1 = plan.one_minus_beta1, one_minus_beta2 = plan.one_minus_beta2,
                denominator_factor = plan.denominator_factor, eps = plan.eps, decay = plan.decay,
                step_size = plan.step_size;
    int32_t first_most = 0, second_most = 0, second_least = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(max : first_most, second_most) reduction(min : second_least)
    for (int64_t i = 0; i < length; ++i) {
        const float g = grad[i] * sign;
        const float m = exp_avg[i] + one_minus_beta1 * (g - exp_avg[i]);
        const float v = exp_avg_sq[i] + one_minus_beta2 * (g * g - exp_avg_sq[i]);
        const float denominator = std::sqrt(v) * denominator_factor + eps;
        param[i] = param[i] * decay - step_size * (m / denominator);
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        first_most = std::max(first_most, bit_cast<int32_t>(m) & 0x7FFFFFFF);
        second_most = std::max(second_most, bit_cast<int32_t>(v));
        second_least = std::min(second_least, bit_cast<int32_t>(v));
    }
    block.first_most = bit_cast<float>(first_most);
    block.second_most = bit_cast<float>(second_most);
    block.second_least = bit_cast<float>(second_least);
}

// Phases 2 and 3: update, and write of the weights.
template <class Length>
void update_weights(const Plan& plan, Block& block, Length length, Scratch& scratch) {
    const Tensor& t = plan.tensor;
    const float* grad = static_cast<const float*>(t.grad) + block.offset;
    if (t.grad_type == BF16) {
        read_bf16(static_cast<const uint16_t*>(t.grad) + block.offset, scratch.grad.get(), length);
        grad = scratch.grad.get();
    }
    if (t.param_type == FP32) {
        adamw_update(plan, block, length, grad, static_cast<float*>(t.param) + block.offset);
        return;
    }
    uint16_t* weights = static_cast<uint16_t*>(t.param) + block.offset;
    read_bf16(weights, scratch.param.get(), length);
    adamw_update(plan, block, length, grad, scratch.param.get());
    if (plan.weight_noise) draw(plan, block, length, t.weight_stream, scratch.draws.get());
    write_bf16(scratch.param.get(), plan.weight_noise ? scratch.draws.get() : nullptr, weights, length);
}

// Phase 4: the first moment back to codes.
template <int BITS, class Length>
void encode_first(const Block& block, Length length, Scratch& scratch) {
    uint8_t* codes = scratch.codes.get();
    // A zero block multiplies by a finite number, so its elements stay 0 and take the code of the map's 0.
    const float inverse = 1.0f / std::max(block.first_most, SMALLEST_NORMAL);
    encode_dynamic<BITS>(block.exp_avg, inverse, codes, length);
    std::fill(codes + length, codes + padded_to_eight(length), uint8_t{0});
    pack<BITS>(codes, block.first_codes, padded_to_eight(length));
    *block.first_scale = block.first_most;
}

// Phase 5: the quantile of the second moment, which sets the last level.
template <class Length>
void find_quantile(const Plan& plan, Block& block, Length length) {
    // What was on the last level a step ago, as the quantile was, is still crowded just above the least element. The
    // factor halves the probes on normal gradients, stationary or not.
    const float guess = block.second_least + plan.one_minus_beta2 * 0x1p-5f * block.second_most;
    block.quantile =
        block_quantile(block.exp_avg_sq, length, plan.quantile, block.second_least, block.second_most, guess);
}

// Phase 6: the second moment back to codes.
template <int BITS, class Length>
void encode_second(const Plan& plan, const Block& block, Length length, Scratch& scratch) {
    uint8_t* codes = scratch.codes.get();
    constexpr float last = (1 << BITS) - 1;
    const float log2_scale = log2_of(block.second_most);
    const float span = std::min(log2_scale - log2_of(block.quantile), -LOG2_FLOOR);
    const float inverse_step = 1.0f / std::max(span / last, SMALLEST_SPAN);
    if (plan.state_noise) draw(plan, block, length, plan.tensor.state_stream, scratch.draws.get());
    encode_logarithmic<BITS>(block.exp_avg_sq, log2_scale, inverse_step,
                             plan.state_noise ? scratch.draws.get() : nullptr, codes, length);
    std::fill(codes + length, codes + padded_to_eight(length), uint8_t{0});
    pack<BITS>(codes, block.second_codes, padded_to_eight(length));
    *block.second_scale = block.second_most;
    *block.second_log2_base = -span / last;
}

void step_blocks(const Plan& plan, int64_t first, int64_t stop, Scratch& scratch) {
    const int64_t batch = std::clamp<int64_t>(BATCH_ELEMENTS / plan.block_length(), 1, BATCH_BLOCKS);
    Block blocks[BATCH_BLOCKS];
    int64_t count = 0;
    const auto for_each = [&](auto phase) {
        for (int64_t i = 0; i < count; ++i) {
            if (blocks[i].length == USUAL_LENGTH) phase(blocks[i], std::integral_constant<int64_t, USUAL_LENGTH>{});
            else phase(blocks[i], blocks[i].length);
        }
    };
    for (; first < stop; first += count) {
        // Phase by phase over a batch: independent blocks hide each other's chains of dependent instructions.
        count = std::min(batch, stop - first);
        for (int64_t i = 0; i < count; ++i) blocks[i] = locate(plan, first + i, scratch, i);
        for_each([&](Block& block, auto length) { decode(plan, block, length, scratch.codes.get()); });
        for_each([&](Block& block, auto length) { update_weights(plan, block, length, scratch); });
        with_bits(plan.first_bits, [&](auto bits) {
            for_each([&](Block& block, auto length) { encode_first<bits>(block, length, scratch); });
        });
        with_bits(plan.second_bits, [&](auto bits) {
            for_each([&](Block& block, auto length) { find_quantile(plan, block, length); });
            for_each([&](Block& block, auto length) { encode_second<bits>(plan, block, length, scratch); });
        });
    }
}

// Whether no element is NaN or has a magnitude whose square overflows.
bool is_steppable(const Plan& plan, int64_t first, int64_t stop) {
    const int64_t begin = first / plan.blocks_per_row * plan.tensor.columns + first % plan.blocks_per_row * plan.block_size;
    const int64_t end = stop / plan.blocks_per_row * plan.tensor.columns + stop % plan.blocks_per_row * plan.block_size;
    int32_t most = 0;
    if (plan.tensor.grad_type == FP32) {
        const float* grad = static_cast<const float*>(plan.tensor.grad);
#pragma omp simd reduction(max : most)
        for (int64_t i = begin; i < end; ++i) most = std::max(most, bit_cast<int32_t>(grad[i]) & 0x7FFFFFFF);
    } else {
        const uint16_t* grad = static_cast<const uint16_t*>(plan.tensor.grad);
#pragma omp simd reduction(max : most)
        for (int64_t i = begin; i < end; ++i) most = std::max(most, (static_cast<int32_t>(grad[i]) & 0x7FFF) << 16);
    }
    return most <= bit_cast<int32_t>(LARGEST_SQUARABLE);  // the bits of infinities and NaN are larger than any number's
}

// ---- threads ----------------------------------------------------------------------------------------------------

// Tickets are drawn in order: for each tensor first those that check its gradient, then those that step it. A tensor of
// one ticket is checked and stepped in one go.
struct Job {
    std::vector<Plan> plans;
    int64_t tickets = 0, stride = 0;
    std::atomic<int64_t> next{0};

    void work() {
        Scratch scratch(stride);
        size_t at = 0;
        for (int64_t ticket; (ticket = next.fetch_add(1)) < tickets;) {
            while (at + 1 < plans.size() && plans[at + 1].first_ticket <= ticket) ++at;
            Plan& plan = plans[at];
            const int64_t number = ticket - plan.first_ticket, item = number % plan.items;
            const int64_t first = item * plan.blocks_per_item;
            const int64_t stop = std::min(first + plan.blocks_per_item, plan.blocks());
            if (number < plan.items) {
                if (!is_steppable(plan, first, stop)) plan.finite = false;
                --plan.checks_left;
                if (plan.items > 1) continue;
            }
            // All checks have been claimed by now, so this waits for a fraction of one item at most.
            while (plan.checks_left) std::this_thread::yield();
            if (plan.finite) step_blocks(plan, first, stop, scratch);
        }
    }
};

// Threads that sleep between steps. They are never joined: the process's end takes them, and a forked child, which
// has none of them, begins with a new set.
class Workers {
   public:
    void run(Job& job, int64_t threads) {
        std::unique_lock<std::mutex> one_job(busy_, std::try_to_lock);
        const int64_t helpers = std::min(threads, job.tickets) - 1;
        if (!one_job || helpers < 1) return job.work();  // another thread of the program is stepping: do it alone
        {
            std::lock_guard<std::mutex> lock(mutex_);
            start(helpers);
            job_ = &job;
            seats_ = helpers;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // who has not woken by now is not needed
        done_.wait(lock, [this] { return active_ == 0; });
    }

   private:
    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int64_t seats_ = 0, active_ = 0, started_ = 0;

    void start(int64_t helpers) {
        try {
            for (; started_ < helpers; ++started_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // The system allows no more threads: those there are do the work.
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++active_;
            Job* job = job_;
            lock.unlock();
            job->work();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }
};

Workers* workers = nullptr;
void new_workers() { workers = new Workers; }
const int registered = (new_workers(), pthread_atfork(nullptr, nullptr, new_workers));

}  // namespace

// Steps `count` tensors; sets skipped[i] where a gradient was not finite, else raises the tensor's step by one.
extern "C" __attribute__((visibility("default"))) void solo_step(const Tensor* tensors, int64_t count, const Hyper* hypers, int64_t threads, uint8_t* skipped) {
    Job job;
    job.plans = std::vector<Plan>(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        Plan& plan = job.plans[static_cast<size_t>(i)];
        fill(plan, tensors[i], hypers[tensors[i].hyper]);
        plan.first_ticket = job.tickets;
        job.tickets += plan.items > 1 ? 2 * plan.items : 1;
        job.stride = std::max(job.stride, padded_to_eight(plan.block_length()));
    }
    workers->run(job, threads);
    for (int64_t i = 0; i < count; ++i) {
        skipped[i] = !job.plans[static_cast<size_t>(i)].finite;
        if (!skipped[i]) *tensors[i].step += 1;
    }
}
