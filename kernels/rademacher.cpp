// Perturbing and updating weights by random signs on a CPU: what rademacher.py's references mean, bit for bit.
//
// Every operation there is one here: out ← decay · in - Σᵢ sizes[i] · u(first_index + i), for a perturbed copy with one
// size of -ε. Runs of up to 4096 elements stay in the first-level cache while their signs are made and applied.
// rademacher_cpu.py builds this file and mirrors `Pass`. Words of Philox are read as half-words in memory order, so the
// machine must be little-endian, as all that torch runs on are.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "elements.h"
#include "workers.h"

namespace {

// One row of the table that rademacher_cpu.py fills; all fields are 64 bits wide.
struct Pass {
    const void* in;  // (rows, columns), contiguous
    void* out;       // as in, or (chosen_count, columns)
    const int64_t* chosen;  // rows to treat, or null for all
    int64_t chosen_count;
    const float* factors;  // decay, then the sizes
    int64_t count, first_index;
    int64_t rows, columns, type, rank1, rounds_stochastically;
    int64_t seed, sign_stream, weight_stream, step, slot;
};

constexpr int64_t RUN = 4096;
// What a thread claims at a time; a multiple of RUN.
constexpr int64_t ITEM_ELEMENTS = 65536;
constexpr int64_t SIGNS_PER_CALL = 128, DRAWS_PER_CALL = 8;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- one run of elements ----------------------------------------------------------------------------------------

struct Scratch {
    explicit Scratch(int64_t count) : words(static_cast<size_t>(count * (RUN / 32 + 4))), flips(static_cast<size_t>(count)) {}

    std::vector<uint32_t> words;  // of every perturbation: the signs of a run, or of a whole row for rank 1
    std::vector<uint32_t> flips;  // of every perturbation: all ones where the row's sign is -1
    std::vector<uint32_t> row_signs;  // of every perturbation: those of r
    float values[RUN + 32];
    int32_t draws[RUN];
    uint32_t generated[4 * (RUN / DRAWS_PER_CALL + 2)];
    uint16_t halves[RUN + DRAWS_PER_CALL];
};

// Writes ceil(length / 32) words, whose bits are the signs of elements from `first` on.
void fill_signs(const Pass& pass, int64_t index, int64_t first, int64_t length, uint32_t* words, Scratch& scratch) {
    const int64_t stop = ceil_div(length, 32), shift = first % 32;
    for (int64_t k = 0; k < stop; k += RUN / 32) {
        const int64_t begin = first + 32 * k, part = std::min<int64_t>(stop - k, RUN / 32);
        const int64_t call = begin / SIGNS_PER_CALL, skipped = begin % SIGNS_PER_CALL / 32;
        const int64_t calls = ceil_div(skipped + part + (shift != 0), 4);
        philox_words(static_cast<uint32_t>(pass.seed), static_cast<uint32_t>(pass.sign_stream),
                     static_cast<uint32_t>(pass.step), static_cast<uint32_t>(index), static_cast<uint64_t>(call), calls,
                     scratch.generated);
        const uint32_t* from = scratch.generated + skipped;
        for (int64_t j = 0; j < part; ++j) {
            words[k + j] = shift ? from[j] >> shift | from[j + 1] << (32 - shift) : from[j];
        }
    }
}

const int32_t* fill_draws(const Pass& pass, int64_t first, int64_t length, Scratch& scratch) {
    const int64_t call = first / DRAWS_PER_CALL, skipped = first % DRAWS_PER_CALL;
    philox_words(static_cast<uint32_t>(pass.seed), static_cast<uint32_t>(pass.weight_stream),
                 static_cast<uint32_t>(pass.step), static_cast<uint32_t>(pass.slot), static_cast<uint64_t>(call),
                 ceil_div(skipped + length, DRAWS_PER_CALL), scratch.generated);
    // A pointer to another type would break aliasing rules; the copy does not leave the first-level cache.
    uint16_t* halves = scratch.halves;
    std::memcpy(halves, scratch.generated, sizeof(uint16_t) * static_cast<size_t>(skipped + length));
    int32_t* draws = scratch.draws;
    VECTORIZE
    for (int64_t j = 0; j < length; ++j) draws[j] = halves[skipped + j];
    return draws;
}

// out ← decay · in - Σᵢ sizes[i] · uᵢ of 32 elements; words[i * stride] has the signs of perturbation i.
template <class Flips>
INLINE void apply_word(const float* in, float* out, const Pass& pass, const uint32_t* words, int64_t stride,
                       Flips flip) {
    float moved[32] = {};
    const float* sizes = pass.factors + 1;
    for (int64_t i = 0; i < pass.count; ++i) {
        const uint32_t word = words[i * stride] ^ flip(i), size = bit_cast<uint32_t>(sizes[i]);
        VECTORIZE
        for (int b = 0; b < 32; ++b) moved[b] += bit_cast<float>(size ^ ((word << (31 - b)) & 0x80000000u));
    }
    const float decay = pass.factors[0];
    VECTORIZE
    for (int b = 0; b < 32; ++b) out[b] = in[b] * decay - moved[b];
}

// The same for a perturbed copy: one perturbation, and no decay.
INLINE void perturb_word(const float* in, float* out, uint32_t word, uint32_t size) {
#if defined(__AVX512F__)
    const __m512 plus = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(size)));
    const __m512 minus = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(size ^ 0x80000000u)));
    for (int half = 0; half < 32; half += 16) {
        const __m512 moved = _mm512_mask_blend_ps(static_cast<__mmask16>(word >> half), plus, minus);
        _mm512_storeu_ps(out + half, _mm512_sub_ps(_mm512_loadu_ps(in + half), moved));
    }
#else
    VECTORIZE
    for (int b = 0; b < 32; ++b) out[b] = in[b] - bit_cast<float>(size ^ ((word << (31 - b)) & 0x80000000u));
#endif
}

template <class Flips>
INLINE void apply_words(const float* in, float* out, int64_t length, const Pass& pass, const uint32_t* words,
                        int64_t stride, Flips flip) {
    int64_t k = 0;
    if (pass.count == 1 && pass.factors[0] == 1.0f) {
        const uint32_t size = bit_cast<uint32_t>(pass.factors[1]), flipped = flip(0);
        for (; 32 * k + 32 <= length; ++k) perturb_word(in + 32 * k, out + 32 * k, words[k] ^ flipped, size);
    }
    for (; 32 * k + 32 <= length; ++k) apply_word(in + 32 * k, out + 32 * k, pass, words + k, stride, flip);
    if (32 * k < length) {
        float rest[32] = {};
        std::copy(in + 32 * k, in + length, rest);
        apply_word(rest, rest, pass, words + k, stride, flip);
        std::copy(rest, rest + (length - 32 * k), out + 32 * k);
    }
}

// Treats elements [from, from + length) of in, whose signs begin at words[i * stride], to [to, to + length) of out.
template <class Flips>
void treat(const Pass& pass, int64_t from, int64_t to, int64_t length, const uint32_t* words, int64_t stride, Flips flip,
           Scratch& scratch) {
    if (pass.type == FP32) {
        apply_words(static_cast<const float*>(pass.in) + from, static_cast<float*>(pass.out) + to, length, pass, words,
                    stride, flip);
        return;
    }
    const uint16_t* in = static_cast<const uint16_t*>(pass.in) + from;
    uint16_t* out = static_cast<uint16_t*>(pass.out) + to;
    float* values = scratch.values;
    if (pass.type == BF16) {
        read_bf16(in, values, length);
    } else {
        VECTORIZE
        for (int64_t j = 0; j < length; ++j) values[j] = from_fp16(in[j]);
    }
    apply_words(values, values, length, pass, words, stride, flip);
    const int32_t* draws = pass.rounds_stochastically ? fill_draws(pass, from, length, scratch) : nullptr;
    if (pass.type == BF16) {
        write_bf16(values, draws, out, length);
    } else if (draws) {
        VECTORIZE
        for (int64_t j = 0; j < length; ++j) out[j] = to_fp16(values[j], draws[j]);
    } else {
        VECTORIZE
        for (int64_t j = 0; j < length; ++j) out[j] = to_fp16(values[j], -1);
    }
}

// ---- items of work ----------------------------------------------------------------------------------------------

struct Plan {
    Pass pass;
    int64_t items, rows_per_item, first_ticket;

    bool is_flat() const { return !pass.rank1 && !pass.chosen; }
    int64_t rows_out() const { return pass.chosen ? pass.chosen_count : pass.rows; }
};

void treat_flat(const Pass& pass, int64_t first, int64_t stop, Scratch& scratch) {
    constexpr int64_t stride = RUN / 32 + 4;
    for (; first < stop; first += RUN) {
        const int64_t length = std::min(RUN, stop - first);
        for (int64_t i = 0; i < pass.count; ++i) {
            fill_signs(pass, pass.first_index + i, first, length, scratch.words.data() + i * stride, scratch);
        }
        treat(pass, first, first, length, scratch.words.data(), stride, [](int64_t) { return 0u; }, scratch);
    }
}

void treat_chosen_rows(const Pass& pass, int64_t first, int64_t stop, Scratch& scratch) {
    constexpr int64_t stride = RUN / 32 + 4;
    for (int64_t row = first; row < stop; ++row) {
        for (int64_t column = 0; column < pass.columns; column += RUN) {
            const int64_t length = std::min(RUN, pass.columns - column), from = pass.chosen[row] * pass.columns + column;
            for (int64_t i = 0; i < pass.count; ++i) {
                fill_signs(pass, pass.first_index + i, from, length, scratch.words.data() + i * stride, scratch);
            }
            const auto no_flip = [](int64_t) { return 0u; };
            treat(pass, from, row * pass.columns + column, length, scratch.words.data(), stride, no_flip, scratch);
        }
    }
}

void treat_rank1_rows(const Pass& pass, int64_t first, int64_t stop, Scratch& scratch) {
    const int64_t stride = ceil_div(pass.columns, 32), row_words = ceil_div(pass.rows, 32);
    scratch.words.resize(static_cast<size_t>(pass.count * stride));
    scratch.row_signs.resize(static_cast<size_t>(pass.count * row_words));
    for (int64_t i = 0; i < pass.count; ++i) {
        const int64_t index = pass.first_index + i;
        fill_signs(pass, index, 0, pass.columns, scratch.words.data() + i * stride, scratch);
        fill_signs(pass, index, pass.columns, pass.rows, scratch.row_signs.data() + i * row_words, scratch);
    }
    for (int64_t place = first; place < stop; ++place) {
        const int64_t row = pass.chosen ? pass.chosen[place] : place;
        for (int64_t i = 0; i < pass.count; ++i) {
            scratch.flips[static_cast<size_t>(i)] = 0u - (scratch.row_signs[i * row_words + row / 32] >> (row % 32) & 1u);
        }
        const uint32_t* flips = scratch.flips.data();
        for (int64_t column = 0; column < pass.columns; column += RUN) {
            const int64_t length = std::min(RUN, pass.columns - column);
            treat(pass, row * pass.columns + column, place * pass.columns + column, length,
                  scratch.words.data() + column / 32, stride, [flips](int64_t i) { return flips[i]; }, scratch);
        }
    }
}

struct Job {
    std::vector<Plan> plans;
    int64_t tickets = 0, most_perturbations = 0;
    std::atomic<int64_t> next{0};

    void work() {
        Scratch scratch(most_perturbations);
        const size_t room = scratch.words.size();
        size_t at = 0;
        for (int64_t ticket; (ticket = next.fetch_add(1)) < tickets;) {
            while (at + 1 < plans.size() && plans[at + 1].first_ticket <= ticket) ++at;
            const Plan& plan = plans[at];
            const int64_t item = ticket - plan.first_ticket, first = item * plan.rows_per_item;
            if (plan.is_flat()) {
                const int64_t numel = plan.pass.rows * plan.pass.columns, begin = item * ITEM_ELEMENTS;
                scratch.words.resize(std::max(scratch.words.size(), room));
                treat_flat(plan.pass, begin, std::min(begin + ITEM_ELEMENTS, numel), scratch);
            } else if (plan.pass.rank1) {
                treat_rank1_rows(plan.pass, first, std::min(first + plan.rows_per_item, plan.rows_out()), scratch);
            } else {
                scratch.words.resize(std::max(scratch.words.size(), room));
                treat_chosen_rows(plan.pass, first, std::min(first + plan.rows_per_item, plan.rows_out()), scratch);
            }
        }
    }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) void rademacher_passes(const Pass* passes, int64_t count,
                                                                         int64_t threads) {
    Job job;
    for (int64_t i = 0; i < count; ++i) {
        Plan plan{passes[i], 0, std::max<int64_t>(1, ITEM_ELEMENTS / std::max<int64_t>(1, passes[i].columns)), job.tickets};
        const int64_t numel = plan.pass.rows * plan.pass.columns;
        plan.items = plan.is_flat() ? ceil_div(numel, ITEM_ELEMENTS) : ceil_div(plan.rows_out(), plan.rows_per_item);
        if (plan.items == 0 || plan.pass.columns == 0) continue;
        job.tickets += plan.items;
        job.most_perturbations = std::max(job.most_perturbations, plan.pass.count);
        job.plans.push_back(plan);
    }
    workers->run([&job] { job.work(); }, std::min(threads, job.tickets) - 1);
}
