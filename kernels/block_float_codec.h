// One run of elements of a packed tensor: what block_float.py's references mean, bit for bit, phase by phase.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements.h"

namespace {

// All fields are 64 bits wide. Which pointers are null says what to do: pack, unpack or quantize.
struct Task {
    const void* in;  // (rows, columns), contiguous; null to unpack
    void* out;       // as in; null to pack
    uint8_t* codes;  // (rows, row_bytes); null to quantize
    void* scales;    // (rows, boxes) of bytes, or (rows, boxes, 2) of bf16; null to quantize
    // Element (row, column) is at (row / inner * columns + column) * inner + row % inner; inner > 1 only to quantize.
    int64_t rows, columns, inner, type, bits, box, affine, stochastic, seed, stream, step;
};

constexpr int64_t RUN = 1024;
// The shortest box; longer ones are several of these.
constexpr int64_t LANES = 16, DRAWS_PER_CALL = 8;
constexpr int32_t NON_FINITE = 255, INFINITY_BITS = 0x7F800000;
constexpr float LARGEST_BF16 = 3.38953138925153547590470800371487867e+38f, SMALLEST_NORMAL = 0x1p-126f;
constexpr float LARGEST[] = {3.40282346638528859811704183484516925e+38f, LARGEST_BF16, 65504.0f};  // of each type

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `first_box` counts all boxes of the tensor; `padded` is the length with the last box filled up.
struct Run {
    int64_t row, column, length, padded, first_box;
    float* own = nullptr;  // fp32 values to quantize in place, if not those of the tensors

    int64_t offset(const Task& task) const { return row * task.columns + column; }
};

// Of a box, what its every sixteen elements need: they are multiplied by 1/2, less `half_least`, times `inverse`.
struct Scratch {
    float values[RUN];
    int32_t most[RUN / LANES], fewest[RUN / LANES];
    float half_least[RUN / LANES], inverse[RUN / LANES], least[RUN / LANES], step[RUN / LANES];
    uint32_t words[RUN / 2];
    uint16_t draws[RUN];
    alignas(64) int32_t levels[RUN];
    uint8_t codes[2 * RUN], bytes[2 * RUN + 8];
};

INLINE float power_of_two(int32_t exponent) { return bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23); }
INLINE float bf16_down(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    return bit_cast<float>((bits + (bits >> 31) * 0xFFFFu) & 0xFFFF0000u);
}
INLINE float bf16_up(float positive) { return bit_cast<float>((bit_cast<uint32_t>(positive) + 0xFFFFu) & 0xFFFF0000u); }
INLINE uint16_t bf16_bits(float value) { return static_cast<uint16_t>(bit_cast<uint32_t>(value) >> 16); }

INLINE void to_fp32(const Task& task, int64_t offset, int64_t length, float* values) {
    const uint16_t* halves = static_cast<const uint16_t*>(task.in) + offset;
    if (task.type == FP32) {
        std::copy_n(static_cast<const float*>(task.in) + offset, length, values);
    } else if (task.type == BF16) {
        read_bf16(halves, values, length);
    } else {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) values[i] = from_fp16(halves[i]);
    }
}

INLINE void from_fp32(const Task& task, int64_t offset, int64_t length, const float* values) {
    uint16_t* halves = static_cast<uint16_t*>(task.out) + offset;
    if (task.type == FP32) {
        std::copy_n(values, length, static_cast<float*>(task.out) + offset);
    } else if (task.type == BF16) {
        write_bf16(values, nullptr, halves, length);
    } else {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) halves[i] = to_fp16(values[i], -1);
    }
}

// Eight codes of a byte each to BITS bytes: neighbours are pushed together, then pairs, then fours.
template <int BITS>
struct Fields {
    static constexpr uint64_t ONE = ((1ull << BITS) - 1) * 0x0001000100010001ull,
                              TWO = ((1ull << 2 * BITS) - 1) * 0x0000000100000001ull, FOUR = (1ull << 4 * BITS) - 1;

    static INLINE uint64_t squeeze(uint64_t x) {
        x = (x & ONE) | (x >> (8 - BITS) & ONE << BITS);
        x = (x & TWO) | (x >> (16 - 2 * BITS) & TWO << 2 * BITS);
        return (x & FOUR) | (x >> (32 - 4 * BITS) & FOUR << 4 * BITS);
    }

    static INLINE uint64_t spread(uint64_t x) {
        x = (x & FOUR) | (x & FOUR << 4 * BITS) << (32 - 4 * BITS);
        x = (x & TWO) | (x & TWO << 2 * BITS) << (16 - 2 * BITS);
        return (x & ONE) | (x & ONE << BITS) << (8 - BITS);
    }
};

// What to do for one kind of codes. Without AFFINE, codes are mantissas.
template <bool AFFINE, int BITS>
struct Codec {
    using Code = std::conditional_t<AFFINE, uint8_t, std::conditional_t<BITS == 16, int16_t, int8_t>>;
    // Holds eight codes, as tight as a compiler can vectorize.
    using Word = std::conditional_t<BITS == 4, uint32_t, std::conditional_t<BITS == 2, uint16_t, uint64_t>>;
    static constexpr int32_t MOST = AFFINE ? (1 << BITS) - 1 : (1 << (BITS - 1)) - 1, FEWEST = AFFINE ? 0 : -MOST;

    const Task& task;
    const Run& run;
    Scratch& scratch;
    const int64_t sixteens = run.padded / LANES, per_box = task.box / LANES;

    void pack() const {
        const float* values = read();
        find_extremes(values);
        encode(find_scales() ? values : without_boxes_not_finite(values));
        store_scales();
        store_codes(scratch.bytes);
        std::copy(scratch.bytes, scratch.bytes + ceil_div(run.length * BITS, 8), stream());
    }

    void unpack() const {
        load_scales();
        const int64_t bytes = ceil_div(run.length * BITS, 8);
        std::copy(stream(), stream() + bytes, scratch.bytes);
        std::fill(scratch.bytes + bytes, scratch.bytes + run.padded * BITS / 8, 0);
        load_codes();
        write();
    }

    void quantize() const {
        const float* values = run.own ? run.own : read();
        find_extremes(values);
        encode(find_scales() ? values : without_boxes_not_finite(values));
        write();
    }

   private:
    Code* codes() const { return reinterpret_cast<Code*>(scratch.codes); }
    uint8_t* stream() const { return task.codes + run.row * ceil_div(task.columns * BITS, 8) + run.column * BITS / 8; }

    // Phase 1: fp32. Short boxes are filled up with their last element, which changes no scale.
    const float* read() const {
        float* values = scratch.values;
        if (task.type == FP32 && run.length == run.padded) return static_cast<const float*>(task.in) + run.offset(task);
        to_fp32(task, run.offset(task), run.length, values);
        std::fill(values + run.length, values + run.padded, values[run.length - 1]);
        return values;
    }

    // Phase 2: extremes of a box, in integers that are ordered as the numbers are.
    void find_extremes(const float* values) const {
        for (int64_t k = 0; k < sixteens; ++k) {
            const float* value = values + k * LANES;
            int32_t most = AFFINE ? INT32_MIN : 0, fewest = INT32_MAX;
            if (AFFINE) {
#pragma omp simd reduction(max : most) reduction(min : fewest)
                for (int64_t i = 0; i < LANES; ++i) {
                    const int32_t bits = bit_cast<int32_t>(value[i]), key = bits ^ ((bits >> 31) & 0x7FFFFFFF);
                    most = std::max(most, key);
                    fewest = std::min(fewest, key);
                }
            } else {
#pragma omp simd reduction(max : most)
                for (int64_t i = 0; i < LANES; ++i) most = std::max(most, bit_cast<int32_t>(value[i]) & 0x7FFFFFFF);
            }
            scratch.most[k] = most;
            if (AFFINE) scratch.fewest[k] = fewest;
        }
        for (int64_t k = 0; per_box > 1 && k < sixteens; k += per_box) {
            int32_t *most = scratch.most + k, *fewest = scratch.fewest + k;
            std::fill(most, most + per_box, *std::max_element(most, most + per_box));
            if (AFFINE) std::fill(fewest, fewest + per_box, *std::min_element(fewest, fewest + per_box));
        }
    }

    // Phase 3: step and minimum of a box, NaN where not all of it is finite. Returns whether all of the run is.
    bool find_scales() const {
        int32_t all_finite = 1;
        if (!AFFINE) {
#pragma omp simd reduction(min : all_finite)
            for (int64_t k = 0; k < sixteens; ++k) {
                const int32_t exponent = std::max(scratch.most[k] >> 23, BITS - 1);
                scratch.inverse[k] = power_of_two(126 + BITS - exponent);
                scratch.step[k] = exponent == NON_FINITE ? NAN : power_of_two(exponent - 125 - BITS);
                all_finite = std::min(all_finite, exponent == NON_FINITE ? 0 : 1);
            }
            return all_finite != 0;
        }
        constexpr float share = 1.0f / static_cast<float>((1 << BITS) - 1);
        for (int64_t k = 0; k < sixteens; ++k) {
            const int32_t fewest = scratch.fewest[k], most = scratch.most[k];
            const bool finite = most < INFINITY_BITS && fewest > ~INFINITY_BITS;
            const float minimum = bf16_down(bit_cast<float>(fewest ^ ((fewest >> 31) & 0x7FFFFFFF)));
            const float maximum = bit_cast<float>(most ^ ((most >> 31) & 0x7FFFFFFF));
            const float least = std::max(minimum, -LARGEST_BF16) + 0.0f;  // no negative zero
            const float step = std::max(bf16_up(maximum * share - least * share), SMALLEST_NORMAL);
            scratch.least[k] = finite ? least : NAN;
            scratch.step[k] = finite ? step : SMALLEST_NORMAL;
            scratch.half_least[k] = least * 0.5f;
            scratch.inverse[k] = 2.0f / step;
            all_finite = std::min(all_finite, finite ? 1 : 0);
        }
        return all_finite != 0;
    }

    // Boxes that are not all finite have codes of 0.
    const float* without_boxes_not_finite(const float* values) const {
        if (values != scratch.values) std::copy(values, values + run.padded, scratch.values);
        for (int64_t k = 0; k < sixteens; ++k) {
            const float scale = AFFINE ? scratch.least[k] : scratch.step[k];
            if (scale == scale) continue;
            std::fill(scratch.values + k * LANES, scratch.values + (k + 1) * LANES, 0.0f);
            scratch.half_least[k] = scratch.inverse[k] = 0.0f;
        }
        return scratch.values;
    }

    // Phase 4: codes, first as int32, since loops of one width are what the vectorizer does well.
    void encode(const float* values) const {
        if (!task.stochastic) return round<false>(values);
        const uint64_t first = static_cast<uint64_t>(run.first_box) * static_cast<uint64_t>(task.box / DRAWS_PER_CALL);
        const uint32_t seed = static_cast<uint32_t>(task.seed), stream_id = static_cast<uint32_t>(task.stream);
        const uint32_t step = static_cast<uint32_t>(task.step);
        philox_words(seed, stream_id, step, 0, first, run.padded / DRAWS_PER_CALL, scratch.words);
        // A pointer to another type would break aliasing rules; the copy does not leave the first-level cache.
        std::memcpy(scratch.draws, scratch.words, sizeof(uint16_t) * static_cast<size_t>(run.padded));
        round<true>(values);
    }

    template <bool NOISE>
    void round(const float* values) const {
        int32_t* levels = scratch.levels;
        for (int64_t k = 0; k < sixteens; ++k) {
            const float* value = values + k * LANES;
            const uint16_t* draw = scratch.draws + k * LANES;
            const float inverse = scratch.inverse[k], half_least = AFFINE ? scratch.half_least[k] : 0.0f;
            VECTORIZE
            for (int64_t i = 0; i < LANES; ++i) {
                float level = value[i] * 0.5f;
                if (AFFINE) level -= half_least;
                level *= inverse;
                if (NOISE) {
                    level += BITS == 16 ? (static_cast<float>(draw[i] >> 8) + 0.5f) * 0x1p-8f
                                        : (static_cast<float>(draw[i]) + 0.5f) * 0x1p-16f;
                    level = std::floor(level);
                } else {
                    level = (level + 0x1.8p23f) - 0x1.8p23f;  // to the nearest, ties to even
                }
                levels[k * LANES + i] = std::min(MOST, std::max(FEWEST, static_cast<int32_t>(level)));
            }
        }
        Code* code = codes();
        VECTORIZE
        for (int64_t i = 0; i < run.padded; ++i) code[i] = static_cast<Code>(levels[i]);
    }

    void store_scales() const {
        const int64_t boxes = sixteens / per_box;
        if (AFFINE) {
            uint16_t* out = static_cast<uint16_t*>(task.scales) + 2 * run.first_box;
            for (int64_t box = 0; box < boxes; ++box) {
                out[2 * box] = bf16_bits(scratch.least[box * per_box]);
                out[2 * box + 1] = bf16_bits(scratch.step[box * per_box]);
            }
        } else {
            uint8_t* out = static_cast<uint8_t*>(task.scales) + run.first_box;
            for (int64_t box = 0; box < boxes; ++box) {
                out[box] = static_cast<uint8_t>(std::max(scratch.most[box * per_box] >> 23, BITS - 1));
            }
        }
    }

    void load_scales() const {
        for (int64_t k = 0; k < sixteens; ++k) {
            const int64_t box = run.first_box + k / per_box;
            if (AFFINE) {
                const uint16_t* in = static_cast<const uint16_t*>(task.scales) + 2 * box;
                scratch.least[k] = from_bf16(in[0]);
                scratch.step[k] = from_bf16(in[1]);
            } else {
                const int32_t exponent = std::max<int32_t>(static_cast<const uint8_t*>(task.scales)[box], BITS - 1);
                scratch.step[k] = exponent == NON_FINITE ? NAN : power_of_two(exponent - 125 - BITS);
            }
        }
    }

    // Phase 5: the stream of bits, of padded / 8 * BITS bytes; may write up to 8 more.
    void store_codes(uint8_t* out) const {
        if constexpr (BITS >= 8) {
            std::memcpy(out, scratch.codes, static_cast<size_t>(run.padded * BITS / 8));
        } else {
            for (int64_t i = 0; i < run.padded / 8; ++i) {
                uint64_t eight;
                std::memcpy(&eight, scratch.codes + 8 * i, 8);
                const Word word = static_cast<Word>(Fields<BITS>::squeeze(eight));
                std::memcpy(out + i * BITS, &word, sizeof(Word));
            }
        }
    }

    void load_codes() const {
        if constexpr (BITS >= 8) {
            std::memcpy(scratch.codes, scratch.bytes, static_cast<size_t>(run.padded * BITS / 8));
        } else {
            for (int64_t i = 0; i < run.padded / 8; ++i) {
                Word word;
                std::memcpy(&word, scratch.bytes + i * BITS, sizeof(Word));
                const uint64_t eight = Fields<BITS>::spread(word);
                std::memcpy(scratch.codes + 8 * i, &eight, 8);
            }
            constexpr int half = 1 << (BITS - 1);
            VECTORIZE
            for (int64_t i = 0; i < run.padded; ++i) {
                if (!AFFINE) codes()[i] = static_cast<Code>((codes()[i] ^ half) - half);  // two's complement
            }
        }
    }

    // Phase 6: values of codes, in the tensor's type.
    void write() const {
        const bool direct = run.own || (task.type == FP32 && run.length == run.padded);
        float* values = scratch.values;
        if (direct) values = run.own ? run.own : static_cast<float*>(task.out) + run.offset(task);
        const float most = LARGEST[task.type];
        for (int64_t k = 0; k < sixteens; ++k) {
            const Code* code = codes() + k * LANES;
            float* value = values + k * LANES;
            const float step = scratch.step[k], least = scratch.least[k];
            VECTORIZE
            for (int64_t i = 0; i < LANES; ++i) {
                float number = static_cast<float>(code[i]) * step;
                if (AFFINE) {
                    number += least;
                    number = number > most ? most : number;  // keeps NaN
                    number = number < -most ? -most : number;
                }
                value[i] = number;
            }
        }
        if (!direct) from_fp32(task, run.offset(task), run.length, values);
    }
};

}  // namespace
