// Quantizing, packing and unpacking a matrix on a CPU: what four_bit.py's references mean, bit for bit.
//
// A group goes through the numbered phases below while it stays in the first-level cache. All arithmetic is IEEE in the
// reference's order (see compiled.py's flags). four_bit_cpu.py has this file built and mirrors `Matrix`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "elements.h"
#include "four_bit_constants.h"
#include "packing.h"
#include "workers.h"

namespace {

// What four_bit_cpu.py fills for every call; all fields are 64 bits wide.
struct Matrix {
    const void* in;  // (rows, columns), contiguous
    void* out;       // the same, or null where the values are not wanted
    uint8_t* codes;
    void* scales;
    uint8_t* zero_points;
    const float* tensor_scale;
    void* outlier_values;  // of out_type
    void* outlier_indices;
    int64_t rows, columns, in_type, out_type;
    int64_t group_size, bits, form, largest, scale_kind, outliers, wide_indices;
    int64_t store_codes, noise, seed, stream, step;
};

enum Form : int64_t { UNIFORM = 0, E2M1 = 1, ASYMMETRIC = 2 };
enum ScaleKind : int64_t { SCALE_FP32 = 0, SCALE_E4M3 = 1, SCALE_E8M0 = 2 };

constexpr int32_t INFINITY_BITS = 0x7F800000;
constexpr int64_t ITEM_ELEMENTS = 65536;  // what a thread claims at a time

INLINE int64_t padded_to_eight(int64_t length) { return (length + 7) / 8 * 8; }
INLINE int32_t magnitude_bits(float x) { return bit_cast<int32_t>(x) & 0x7FFFFFFF; }
INLINE float quiet_nan() { return bit_cast<float>(uint32_t{0x7FC00000}); }

// A sum and a difference round to an integer, ties to even, for magnitudes below 2^22.
INLINE float nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

struct Scratch {
    float values[LARGEST_GROUP + 16];
    int32_t draws[LARGEST_GROUP + 16];
    uint8_t codes[LARGEST_GROUP + 16];
    int64_t places[LARGEST_GROUP];
};

struct Group {
    int64_t number, row, column, element, byte;  // element, byte: where it begins in the matrix and in the codes
};

// ---- scales -----------------------------------------------------------------------------------------------------

// value: from 0 to 448, to the nearest E4M3, ties to even.
INLINE uint8_t to_e4m3(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    if (value < 0x1p-6f) return static_cast<uint8_t>(nearest(value * 0x1p9f));
    return static_cast<uint8_t>(((bits + 0x7FFFFu + ((bits >> 20) & 1)) >> 20) - (120u << 3));
}

INLINE float from_e4m3(uint8_t code) {
    if (code == E4M3_NAN) return quiet_nan();
    if (code < 8) return static_cast<float>(code) * 0x1p-9f;
    return bit_cast<float>((static_cast<uint32_t>(code) + (120u << 3)) << 20);
}

INLINE float from_e8m0(uint8_t code) {
    if (code == E8M0_NAN) return quiet_nan();
    return code == 0 ? 0x1p-127f : bit_cast<float>(static_cast<uint32_t>(code) << 23);
}

INLINE float scale_at(const Matrix& m, int64_t number) {
    if (m.scale_kind == SCALE_FP32) return static_cast<const float*>(m.scales)[number];
    const uint8_t code = static_cast<const uint8_t*>(m.scales)[number];
    return m.scale_kind == SCALE_E8M0 ? from_e8m0(code) : from_e4m3(code) * *m.tensor_scale;
}

// Stores the scale of a group whose largest magnitude has these bits.
INLINE void set_scale(const Matrix& m, int64_t number, int32_t most) {
    if (m.scale_kind == SCALE_E8M0) {
        const int32_t exponent = std::clamp((most >> 23) - 2, 0, 254);  // E2M1's own largest power of two is 4
        static_cast<uint8_t*>(m.scales)[number] = static_cast<uint8_t>(most < INFINITY_BITS ? exponent : E8M0_NAN);
        return;
    }
    const float scale = bit_cast<float>(most) / static_cast<float>(m.largest);
    if (m.scale_kind == SCALE_E4M3) {
        const bool finite = most < INFINITY_BITS && magnitude_bits(*m.tensor_scale) < INFINITY_BITS;
        const uint8_t code = finite ? to_e4m3(std::min(scale / *m.tensor_scale, LARGEST_E4M3)) : uint8_t{E4M3_NAN};
        static_cast<uint8_t*>(m.scales)[number] = code;
        return;
    }
    static_cast<float*>(m.scales)[number] = most < INFINITY_BITS ? std::max(scale, SMALLEST_NORMAL) : quiet_nan();
}

// ---- elements ---------------------------------------------------------------------------------------------------

template <class Length>
INLINE int32_t largest_magnitude(const float* values, Length length) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < length; ++i) most = std::max(most, magnitude_bits(values[i]));
    return most;
}

template <class Length>
INLINE void read(const void* in, int64_t type, int64_t first, float* values, Length length) {
    if (type == BF16) {
        read_bf16(static_cast<const uint16_t*>(in) + first, values, length);
    } else {
        std::copy(static_cast<const float*>(in) + first, static_cast<const float*>(in) + first + length, values);
    }
}

INLINE void write_one(void* out, int64_t type, int64_t i, float value) {
    if (type == BF16) {
        write_bf16(&value, nullptr, static_cast<uint16_t*>(out) + i, 1);
    } else {
        static_cast<float*>(out)[i] = value;
    }
}

template <int64_t FORM, bool NOISE, class Length>
INLINE void encode(const float* values, const int32_t* draws, float inverse, float zero, float largest, uint8_t* codes,
                   Length length) {
    VECTORIZE
    for (int64_t i = 0; i < length; ++i) {
        const float units = values[i] * inverse;
        const float uniform = NOISE ? (static_cast<float>(draws[i]) + 0.5f) * 0x1p-16f : 0.0f;
        if constexpr (FORM == E2M1) {
            // From 0, 2 and 4 on the grid is spaced by ½, 1 and 2.
            const float magnitude = std::min(bit_cast<float>(magnitude_bits(units)), largest);
            const bool upper = magnitude >= 4.0f, middle = magnitude >= 2.0f;
            const float steps = upper ? (magnitude - 4.0f) * 0.5f : middle ? magnitude - 2.0f : magnitude * 2.0f;
            const float first = upper ? 6.0f : middle ? 4.0f : 0.0f;
            const float code = std::min(first + (NOISE ? std::floor(steps + uniform) : nearest(steps)), 7.0f);
            const uint32_t sign = bit_cast<uint32_t>(units) >> 31;
            codes[i] = static_cast<uint8_t>(static_cast<uint32_t>(static_cast<int32_t>(code)) | (sign << 3));
        } else {
            const float whole = NOISE ? std::floor(units + uniform) : nearest(units);
            const float code = FORM == ASYMMETRIC ? std::min(std::max(whole + zero, 0.0f), largest)
                                                  : std::min(std::max(whole, -largest), largest) + largest;
            codes[i] = static_cast<uint8_t>(static_cast<int32_t>(code));
        }
    }
}

template <int64_t FORM, class Length>
INLINE void decode(const uint8_t* codes, float scale, float zero, float* values, Length length) {
    VECTORIZE
    for (int64_t i = 0; i < length; ++i) {
        if constexpr (FORM == E2M1) {
            const int32_t code = codes[i] & 7;
            const float whole = static_cast<float>(code);
            const float magnitude = code < 4 ? whole * 0.5f : code < 6 ? whole - 2.0f : whole * 2.0f - 8.0f;
            const uint32_t sign = (static_cast<uint32_t>(codes[i]) & 8u) << 28;
            values[i] = bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign) * scale;
        } else {
            values[i] = (static_cast<float>(codes[i]) - zero) * scale;
        }
    }
}

template <class Visitor>
INLINE void with_bits(int64_t bits, Visitor&& visit) {
    if (bits == 2) visit(std::integral_constant<int, 2>{});
    if (bits == 3) visit(std::integral_constant<int, 3>{});
    if (bits == 4) visit(std::integral_constant<int, 4>{});
}

// Phase 1: the outliers leave the group, the first of equal magnitudes first. Values are read again where they came
// from, since where only zeros are left, place 0 is named once more.
template <class Length>
void take_outliers(const Matrix& m, const Group& g, Length length, Scratch& s) {
    for (int64_t k = 0; k < m.outliers; ++k) {
        const int32_t most = largest_magnitude(s.values, length);
        int32_t place = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : place)
        for (int64_t i = 0; i < length; ++i) {
            place = std::min(place, magnitude_bits(s.values[i]) == most ? static_cast<int32_t>(i)
                                                                        : std::numeric_limits<int32_t>::max());
        }
        const int64_t slot = g.number * m.outliers + k;
        float exact;
        read(m.in, m.in_type, g.element + place, &exact, std::integral_constant<int64_t, 1>{});
        write_one(m.outlier_values, m.out_type, slot, exact);
        if (m.wide_indices) {
            static_cast<int16_t*>(m.outlier_indices)[slot] = static_cast<int16_t>(place);
        } else {
            static_cast<uint8_t*>(m.outlier_indices)[slot] = static_cast<uint8_t>(place);
        }
        s.values[place] = 0.0f;
    }
}

template <class Length>
void put_outliers(const Matrix& m, const Group& g) {
    for (int64_t k = 0; k < m.outliers; ++k) {
        const int64_t slot = g.number * m.outliers + k;
        const int64_t place = m.wide_indices ? static_cast<const int16_t*>(m.outlier_indices)[slot]
                                             : static_cast<const uint8_t*>(m.outlier_indices)[slot];
        if (m.out_type == BF16) {
            static_cast<uint16_t*>(m.out)[g.element + place] = static_cast<const uint16_t*>(m.outlier_values)[slot];
        } else {
            static_cast<float*>(m.out)[g.element + place] = static_cast<const float*>(m.outlier_values)[slot];
        }
    }
}

// Phase 4, and all of dequantizing: codes to values.
template <int64_t FORM, class Length>
void write_values(const Matrix& m, const Group& g, Length length, Scratch& s) {
    const float zero = FORM == ASYMMETRIC ? static_cast<float>(m.zero_points[g.number])
                                          : static_cast<float>(m.largest);
    if (m.out_type == BF16) {
        decode<FORM>(s.codes, scale_at(m, g.number), zero, s.values, length);
        write_bf16(s.values, nullptr, static_cast<uint16_t*>(m.out) + g.element, length);
    } else {
        decode<FORM>(s.codes, scale_at(m, g.number), zero, static_cast<float*>(m.out) + g.element, length);
    }
    put_outliers<Length>(m, g);
}

template <int64_t FORM, bool NOISE, class Length>
void quantize_group(const Matrix& m, const Group& g, Length length, Scratch& s) {
    read(m.in, m.in_type, g.element, s.values, length);
    take_outliers(m, g, length, s);

    // Phase 2: scale and zero point.
    const int32_t most = largest_magnitude(s.values, length);
    float zero = 0.0f, inverse = 0.0f;
    if (FORM != ASYMMETRIC) {
        set_scale(m, g.number, most);
        const float scale = scale_at(m, g.number);
        if (scale > 0.0f) inverse = 1.0f / std::max(scale, 0x1p-127f);
    } else {
        float low = 0.0f, high = 0.0f;
        const float levels = static_cast<float>(m.largest);
#pragma omp simd reduction(min : low) reduction(max : high)
        for (int64_t i = 0; i < length; ++i) {
            low = std::min(low, s.values[i]);
            high = std::max(high, s.values[i]);
        }
        const float scale = std::max(high / levels - low / levels, SMALLEST_NORMAL);
        const bool finite = most < INFINITY_BITS;
        static_cast<float*>(m.scales)[g.number] = finite ? scale : quiet_nan();
        if (finite) {
            inverse = 1.0f / scale;
            zero = std::min(nearest(-low * inverse), levels);
        }
        m.zero_points[g.number] = static_cast<uint8_t>(zero);
    }
    if (most >= INFINITY_BITS) std::fill(s.values, s.values + length, 0.0f);

    // Phase 3: codes.
    if (NOISE) {
        const uint64_t calls_per_row = static_cast<uint64_t>((m.columns + 7) / 8);
        const uint64_t call = static_cast<uint64_t>(g.row) * calls_per_row + static_cast<uint64_t>(g.column / 8);
        draw_16bit(static_cast<uint32_t>(m.seed), static_cast<uint32_t>(m.stream), static_cast<uint32_t>(m.step), call,
                   padded_to_eight(length) / 8, s.draws);
    }
    encode<FORM, NOISE>(s.values, s.draws, inverse, zero, static_cast<float>(m.largest), s.codes, length);
    if (m.store_codes) {
        const int64_t padded = padded_to_eight(length);
        std::fill(s.codes + length, s.codes + padded, uint8_t{0});
        with_bits(m.bits, [&](auto bits) { pack<bits>(s.codes, m.codes + g.byte, padded); });
    }
    if (m.out) write_values<FORM>(m, g, length, s);
}

template <int64_t FORM, class Length>
void dequantize_group(const Matrix& m, const Group& g, Length length, Scratch& s) {
    with_bits(m.bits, [&](auto bits) { unpack<bits>(m.codes + g.byte, s.codes, padded_to_eight(length)); });
    write_values<FORM>(m, g, length, s);
}

// ---- work -------------------------------------------------------------------------------------------------------

// Calls treat(group, length, scratch) for every group, with constant lengths for the usual ones.
template <class Treat>
void for_each_group(const Matrix& m, int64_t threads, Treat treat) {
    const int64_t groups_per_row = (m.columns + m.group_size - 1) / m.group_size;
    const int64_t full = m.columns / m.group_size, rest = m.columns % m.group_size;
    const int64_t full_bytes = m.group_size / 8 * m.bits;
    const int64_t row_bytes = full * full_bytes + padded_to_eight(rest) / 8 * m.bits;
    const int64_t rows_per_item = std::max<int64_t>(1, ITEM_ELEMENTS / m.columns);
    const int64_t items = (m.rows + rows_per_item - 1) / rows_per_item;
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        const std::unique_ptr<Scratch> scratch(new Scratch);
        for (int64_t item; (item = next.fetch_add(1)) < items;) {
            const int64_t stop = std::min(m.rows, (item + 1) * rows_per_item);
            for (int64_t row = item * rows_per_item; row < stop; ++row) {
                for (int64_t index = 0; index < groups_per_row; ++index) {
                    const int64_t column = index * m.group_size;
                    const Group g{row * groups_per_row + index, row, column, row * m.columns + column,
                                  row * row_bytes + index * full_bytes};
                    const int64_t length = index < full ? m.group_size : rest;
                    if (length == 256) treat(g, std::integral_constant<int64_t, 256>{}, *scratch);
                    else if (length == 128) treat(g, std::integral_constant<int64_t, 128>{}, *scratch);
                    else if (length == 32) treat(g, std::integral_constant<int64_t, 32>{}, *scratch);
                    else if (length == 16) treat(g, std::integral_constant<int64_t, 16>{}, *scratch);
                    else treat(g, length, *scratch);
                }
            }
        }
    };
    workers->run(work, std::min(threads, items) - 1);
}

template <int64_t FORM>
void quantize(const Matrix& m, int64_t threads) {
    if (m.noise) {
        for_each_group(m, threads, [&](const Group& g, auto n, Scratch& s) { quantize_group<FORM, true>(m, g, n, s); });
    } else {
        for_each_group(m, threads, [&](const Group& g, auto n, Scratch& s) { quantize_group<FORM, false>(m, g, n, s); });
    }
}

template <int64_t FORM>
void dequantize(const Matrix& m, int64_t threads) {
    for_each_group(m, threads, [&](const Group& g, auto n, Scratch& s) { dequantize_group<FORM>(m, g, n, s); });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void four_bit_quantize(const Matrix* m, int64_t threads) {
    if (m->form == UNIFORM) quantize<UNIFORM>(*m, threads);
    if (m->form == E2M1) quantize<E2M1>(*m, threads);
    if (m->form == ASYMMETRIC) quantize<ASYMMETRIC>(*m, threads);
}

EXPORT void four_bit_dequantize(const Matrix* m, int64_t threads) {
    if (m->form == UNIFORM) dequantize<UNIFORM>(*m, threads);
    if (m->form == E2M1) dequantize<E2M1>(*m, threads);
    if (m->form == ASYMMETRIC) dequantize<ASYMMETRIC>(*m, threads);
}
