// The MicroAdam step on a CPU: what micro_adam_step_reference in micro_adam.py means, bit for bit, in one pass over
// memory.
//
// A tensor is cut into units of whole selection blocks and whole error blocks, and a unit goes through the numbered
// lines of Algorithm 1 while it stays in the first-level cache. All arithmetic is IEEE addition, multiplication,
// division and square root in the reference's order, so the build must not contract to fused multiply-add or
// reassociate. micro_adam_cpu.py has this file built and mirrors `Tensor` and `Hyper`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "checked_steps.h"
#include "elements.h"
#include "micro_adam_constants.h"

namespace {

// One row of the table that micro_adam_cpu.py fills for every step; all fields are 64 bits wide.
struct Tensor {
    void* param;  // flattened, contiguous
    const void* grad;
    float* step;
    uint8_t* error_codes;
    uint16_t *error_min, *error_max;
    uint16_t *indices, *values;  // (window, entries)
    int32_t *row_counts, *count;  // none where density is fixed
    int64_t numel, param_type, grad_type;
    int64_t length, full, last, k, last_k, smallest_k;  // as Blocks in micro_adam_tensor.py
    int64_t error_stream, weight_stream, first_element;  // the place of a shard in the whole
    int64_t hyper;  // row of the table of hyperparameters
};

// One row of the table of hyperparameters, shared by all tensors with the same settings.
struct Hyper {
    double lr, beta1, beta2, eps, weight_decay;
    double window, error_block, caught_target, window_correction, stochastic_error, feedback;
    double bf16_stochastic_rounding, maximize, seed;
};

constexpr float LAST_CODE = LEVELS - 1;

// The energies of ‖a[I]‖² and ‖a‖².
struct Energy {
    double selected = 0, total = 0;
};

// A tensor's numbers for one step, rounded to fp32 where torch rounds a Python scalar that meets an fp32 tensor.
struct Plan : Checked {
    Tensor tensor;
    int64_t window, error_block, entries, row, terms, count, last_count;
    int64_t unit, item_elements;
    float sign, denominator_factor, eps, decay, step_size, feedback_size, kept;
    std::vector<float> first_weights, second_weights;  // β₁^age, β₂^age
    std::vector<Energy> energies;                      // of the items; empty where density is fixed
    double caught_target;
    uint32_t seed, step;
    bool error_noise, weight_noise;
};

int64_t last_count(const Tensor& t, int64_t count) {
    return count == t.k ? t.last_k : std::min(t.last_k, (count * t.last + t.length - 1) / t.length);
}

void fill(Plan& plan, const Tensor& tensor, const Hyper& hyper) {
    plan.tensor = tensor;
    plan.window = static_cast<int64_t>(hyper.window);
    plan.error_block = static_cast<int64_t>(hyper.error_block);
    plan.entries = tensor.full * tensor.k + tensor.last_k;
    const double step = static_cast<double>(*tensor.step) + 1;
    const int64_t count = static_cast<int64_t>(step);
    plan.step = static_cast<uint32_t>(static_cast<uint64_t>(step));
    plan.row = (count - 1) % plan.window;
    plan.terms = std::min(count, plan.window);
    plan.count = tensor.count ? *tensor.count : tensor.k;
    plan.last_count = last_count(tensor, plan.count);
    plan.unit = std::min(tensor.numel, std::lcm(tensor.length, plan.error_block));
    plan.item_elements = plan.unit * std::max<int64_t>(1, ITEM_ELEMENTS / plan.unit);
    plan.items = (tensor.numel + plan.item_elements - 1) / plan.item_elements;
    if (tensor.count) plan.energies.resize(static_cast<size_t>(plan.items));

    const double corrected = hyper.window_correction != 0 ? static_cast<double>(plan.terms) : step;
    const double c1 = (1 - hyper.beta1) / (1 - std::pow(hyper.beta1, corrected));
    const double c2 = (1 - hyper.beta2) / (1 - std::pow(hyper.beta2, corrected));
    for (int64_t age = 0; age < plan.terms; ++age) {
        plan.first_weights.push_back(static_cast<float>(std::pow(hyper.beta1, static_cast<double>(age))));
        plan.second_weights.push_back(static_cast<float>(std::pow(hyper.beta2, static_cast<double>(age))));
    }
    plan.sign = hyper.maximize != 0 ? -1.0f : 1.0f;
    plan.denominator_factor = static_cast<float>(std::pow(c2, 0.5));
    plan.eps = static_cast<float>(hyper.eps);
    plan.decay = static_cast<float>(1 - hyper.lr * hyper.weight_decay);
    plan.step_size = static_cast<float>(hyper.lr * c1);
    plan.feedback_size = static_cast<float>(hyper.lr * hyper.feedback);
    plan.kept = static_cast<float>(1 - hyper.feedback);
    plan.caught_target = hyper.caught_target;
    plan.seed = static_cast<uint32_t>(hyper.seed);
    plan.error_noise = hyper.stochastic_error != 0;
    plan.weight_noise = tensor.param_type == BF16 && hyper.bf16_stochastic_rounding != 0;
}

// For units of `elements` at most; `first` and `second` are zero between units.
struct Scratch {
    explicit Scratch(int64_t elements)
        : values(new float[elements]), param(new float[elements]), first(new float[elements]()),
          second(new float[elements]()), directions(new float[elements]),
          draws(new int32_t[elements + 2 * NOISE_BLOCK]), codes(new uint8_t[elements + 1]),
          touched(new int32_t[elements + 1]) {}

    std::unique_ptr<float[]> values, param, first, second, directions;
    std::unique_ptr<int32_t[]> draws;
    std::unique_ptr<uint8_t[]> codes;
    std::unique_ptr<int32_t[]> touched;
};

// Returns the draws of elements start to stop.
const int32_t* draw(const Plan& plan, int64_t stream, int64_t start, int64_t stop, int32_t* draws) {
    constexpr int64_t calls = NOISE_BLOCK / 8;
    start += plan.tensor.first_element;
    stop += plan.tensor.first_element;
    const int64_t first = start / NOISE_BLOCK;
    for (int64_t block = first; block * NOISE_BLOCK < stop; ++block)
        draw_16bit(plan.seed, static_cast<uint32_t>(stream), plan.step, static_cast<uint64_t>(block * calls), calls,
                   draws + (block - first) * NOISE_BLOCK);
    return draws + (start - first * NOISE_BLOCK);
}

struct Levels {
    float low, step;
    Levels(uint16_t low, uint16_t high) : low(from_bf16(low)), step((from_bf16(high) - from_bf16(low)) / LAST_CODE) {}
};

// Line 4: a = g + Q⁻¹(e) of one error block.
INLINE void accumulate(const uint8_t* __restrict codes, Levels levels, const float* __restrict grad, float sign,
                       float* __restrict values, int64_t length) {
    const float low = levels.low, step = levels.step;
    const int64_t pairs = length / 2;
    VECTORIZE
    for (int64_t j = 0; j < pairs; ++j) {
        const int32_t both = codes[j];
        values[2 * j] = grad[2 * j] * sign + (static_cast<float>(both >> 4) * step + low);
        values[2 * j + 1] = grad[2 * j + 1] * sign + (static_cast<float>(both & 15) * step + low);
    }
    if (length % 2)
        values[length - 1] = grad[length - 1] * sign + (static_cast<float>(codes[pairs] >> 4) * step + low);
}

INLINE int32_t magnitude(float value) { return bit_cast<int32_t>(value) & 0x7FFFFFFF; }

INLINE int64_t count_from(const float* values, int64_t length, int32_t least) {
    int64_t i = 0, count = 0;
#if defined(__AVX512F__)
    const __m512i pivots = _mm512_set1_epi32(least), mask = _mm512_set1_epi32(0x7FFFFFFF);
    for (; i + 16 <= length; i += 16) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(values + i), mask);
        count += __builtin_popcount(_mm512_cmpge_epi32_mask(bits, pivots));
    }
#endif
    int32_t rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t j = i; j < length; ++j) rest += magnitude(values[j]) >= least;
    return count + rest;
}

struct Threshold {
    int32_t least;    // all above it are selected
    int64_t at_least;  // how many of those that equal it are selected, the first ones
};

// The k-th largest magnitude, by bisection on the bits, which are ordered as the magnitudes. It ends as soon as a pivot
// parts k elements from the others.
Threshold find_threshold(const float* values, int64_t length, int64_t k) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < length; ++i) most = std::max(most, magnitude(values[i]));
    int32_t low = 0, high = most;  // count_from(low) >= k, and k elements from `high` on are too few or just enough
    while (low < high) {
        const int32_t pivot = low + (high - low + 1) / 2;
        const int64_t count = count_from(values, length, pivot);
        if (count == k) return {pivot, length};
        if (count > k) low = pivot;
        else high = pivot - 1;
    }
    return {low, k - count_from(values, length, low + 1)};
}

// Lines 5 and 6 of one block: the k largest into the ring, and zero in their place.
void select(float* values, int64_t length, int64_t k, uint16_t* indices, uint16_t* kept) {
    const Threshold threshold = find_threshold(values, length, k);
    int64_t equals = threshold.at_least, found = 0;
    const auto take = [&](int64_t i) {
        if (magnitude(values[i]) == threshold.least && equals-- <= 0) return;
        indices[found] = static_cast<uint16_t>(i);
        write_bf16(values[i], nullptr, kept + found);
        values[i] = 0.0f;
        ++found;
    };
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512i least = _mm512_set1_epi32(threshold.least), mask = _mm512_set1_epi32(0x7FFFFFFF);
    for (; i + 16 <= length; i += 16) {
        const __m512i bits = _mm512_and_si512(_mm512_loadu_si512(values + i), mask);
        for (unsigned chosen = _mm512_cmpge_epi32_mask(bits, least); chosen; chosen &= chosen - 1)
            take(i + __builtin_ctz(chosen));
    }
#endif
    for (; i < length; ++i)
        if (magnitude(values[i]) >= threshold.least) take(i);
}

double energy(const float* values, int64_t length) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < length; ++i) sum += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    return sum;
}

// Integers that are ordered as the floats of these bits, and back: reductions of integers become vectors.
INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }

// Lines 7 and 8 of one error block. With `sent`, values become what their codes stand for.
void encode(const Plan& plan, float* __restrict values, int64_t length, const int32_t* __restrict draws,
            uint8_t* __restrict codes, uint8_t* __restrict packed, uint16_t* low_bits, uint16_t* high_bits, bool sent) {
    int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < length; ++i) {
        low = std::min(low, ordered(bit_cast<int32_t>(values[i])));
        high = std::max(high, ordered(bit_cast<int32_t>(values[i])));
    }
    write_bf16(bit_cast<float>(ordered(low)), nullptr, low_bits);
    write_bf16(bit_cast<float>(ordered(high)), nullptr, high_bits);
    const Levels levels(*low_bits, *high_bits);
    const auto code = [=](float value, float rounding) {
        const float position = (value - levels.low) / levels.step + rounding;
        const float clamped = position > 0.0f ? position : 0.0f;  // first, so that truncation is the floor
        return static_cast<uint8_t>(static_cast<int32_t>(clamped < LAST_CODE ? clamped : LAST_CODE));
    };
    codes[length] = 0;  // the other half of the last byte, if there is one
    if (!(levels.step > 0)) {
        std::fill(codes, codes + length, uint8_t{0});
    } else if (draws) {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i)
            codes[i] = code(values[i], (static_cast<float>(draws[i]) + 0.5f) * 0x1p-16f);
    } else {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) codes[i] = code(values[i], 0.5f);
    }
    VECTORIZE
    for (int64_t j = 0; j < (length + 1) / 2; ++j)
        packed[j] = static_cast<uint8_t>(codes[2 * j] << 4 | codes[2 * j + 1]);
    if (sent) {
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) values[i] = static_cast<float>(codes[i]) * levels.step + levels.low;
        write_bf16(from_bf16(*low_bits) * plan.kept, nullptr, low_bits);
        write_bf16(from_bf16(*high_bits) * plan.kept, nullptr, high_bits);
    }
}

// Lines 10 and 11 of one block: the sums over the window. Returns how many places they touch, listed in `touched`.
int64_t sum_window(const Plan& plan, int64_t block, Scratch& scratch) {
    const Tensor& t = plan.tensor;
    float* __restrict first = scratch.first.get();
    float* __restrict second = scratch.second.get();
    const bool is_last = block == t.full;
    int64_t touched = 0;
    for (int64_t age = 0; age < plan.terms; ++age) {
        const int64_t row = (plan.row + plan.window - age) % plan.window;
        int64_t count = age == 0 || !t.row_counts ? plan.count : t.row_counts[row];
        if (is_last) count = last_count(t, count);
        const int64_t entry = row * plan.entries + block * t.k;
        const float weight1 = plan.first_weights[static_cast<size_t>(age)];
        const float weight2 = plan.second_weights[static_cast<size_t>(age)];
        for (int64_t j = 0; j < count; ++j) {
            const int32_t i = t.indices[entry + j];
            const float value = from_bf16(t.values[entry + j]);
            const float square = value * value * weight2;
            scratch.touched[touched] = i;
            touched += second[i] == 0.0f && square > 0.0f;
            first[i] += value * weight1;
            second[i] += square;
        }
    }
    return touched;
}

// Line 12 of one block, first half: the directions of the touched places. Clears the sums.
void find_directions(const Plan& plan, int64_t block, int64_t touched, Scratch& scratch) {
    const Tensor& t = plan.tensor;
    float* __restrict first = scratch.first.get();
    float* __restrict second = scratch.second.get();
    float* __restrict directions = scratch.directions.get();
    float* __restrict param = scratch.param.get();
    for (int64_t j = 0; j < touched; ++j) {
        directions[j] = first[scratch.touched[j]];
        param[j] = second[scratch.touched[j]];
    }
    const float factor = plan.denominator_factor, eps = plan.eps, step_size = plan.step_size;
    VECTORIZE
    for (int64_t j = 0; j < touched; ++j)
        directions[j] = directions[j] / (std::sqrt(param[j]) * factor + eps) * step_size;
    const int64_t length = block == t.full ? t.last : t.length;
    if (touched > length / 4) {
        std::fill(first, first + length, 0.0f);
        std::fill(second, second + length, 0.0f);
        return;
    }
    for (int64_t age = 0; age < plan.terms; ++age) {
        const int64_t row = (plan.row + plan.window - age) % plan.window;
        int64_t count = age == 0 || !t.row_counts ? plan.count : t.row_counts[row];
        if (block == t.full) count = last_count(t, count);
        const uint16_t* indices = t.indices + row * plan.entries + block * t.k;
        for (int64_t j = 0; j < count; ++j) first[indices[j]] = second[indices[j]] = 0.0f;
    }
}

// Line 12 of one block, second half: the weights. `sent` is what feedback sends, or none; draws are the block's.
void update_weights(const Plan& plan, int64_t start, int64_t length, int64_t touched, const float* __restrict sent,
                    const int32_t* draws, Scratch& scratch) {
    const Tensor& t = plan.tensor;
    const float* __restrict directions = scratch.directions.get();
    const int32_t* __restrict places = scratch.touched.get();
    uint16_t* half = static_cast<uint16_t*>(t.param) + start;
    const bool is_bf16 = t.param_type == BF16, is_dense = plan.decay != 1.0f || sent;
    if (is_bf16 && !is_dense) {
        for (int64_t j = 0; j < touched; ++j) {
            const int32_t i = places[j];
            const float updated = from_bf16(half[i]) - directions[j];
            write_bf16(&updated, draws ? draws + i : nullptr, half + i, 1);
        }
        return;
    }
    float* __restrict param = is_bf16 ? scratch.param.get() : static_cast<float*>(t.param) + start;
    if (is_bf16) read_bf16(half, param, length);
    if (plan.decay != 1.0f) {
        const float decay = plan.decay;
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) param[i] *= decay;
    }
    for (int64_t j = 0; j < touched; ++j) param[places[j]] -= directions[j];
    if (sent) {
        const float size = plan.feedback_size;
        VECTORIZE
        for (int64_t i = 0; i < length; ++i) param[i] -= sent[i] * size;
    }
    if (is_bf16) write_bf16(param, draws, half, length);
}

void step_unit(const Plan& plan, int64_t start, int64_t stop, Scratch& scratch, Energy& energies) {
    const Tensor& t = plan.tensor;
    float* values = scratch.values.get();
    const int64_t elements = stop - start;
    const float* grad = static_cast<const float*>(t.grad) + start;
    if (t.grad_type == BF16) {
        read_bf16(static_cast<const uint16_t*>(t.grad) + start, scratch.param.get(), elements);
        grad = scratch.param.get();
    }
    const auto for_each_error_block = [&](auto work) {
        for (int64_t first = 0; first < elements; first += plan.error_block)
            work(first, std::min(plan.error_block, elements - first), (start + first) / plan.error_block);
    };
    const auto for_each_block = [&](auto work) {
        for (int64_t first = 0; first < elements; first += t.length)
            work(first, std::min(t.length, elements - first), (start + first) / t.length);
    };
    uint8_t* packed = t.error_codes + start / 2;
    for_each_error_block([&](int64_t first, int64_t length, int64_t number) {
        const Levels levels(t.error_min[number], t.error_max[number]);
        accumulate(packed + first / 2, levels, grad + first, plan.sign, values + first, length);
    });
    if (t.count) energies.total += energy(values, elements);
    for_each_block([&](int64_t first, int64_t length, int64_t number) {
        const int64_t entry = plan.row * plan.entries + number * t.k;
        const int64_t count = number == t.full ? plan.last_count : plan.count;
        const double before = t.count ? energy(values + first, length) : 0;
        select(values + first, length, count, t.indices + entry, t.values + entry);
        if (t.count) energies.selected += before - energy(values + first, length);
    });
    const bool feedback = plan.kept != 1.0f;
    const int32_t* draws = plan.error_noise ? draw(plan, t.error_stream, start, stop, scratch.draws.get()) : nullptr;
    for_each_error_block([&](int64_t first, int64_t length, int64_t number) {
        encode(plan, values + first, length, draws ? draws + first : nullptr, scratch.codes.get(), packed + first / 2,
               t.error_min + number, t.error_max + number, feedback);
    });
    draws = plan.weight_noise ? draw(plan, t.weight_stream, start, stop, scratch.draws.get()) : nullptr;
    for_each_block([&](int64_t first, int64_t length, int64_t number) {
        const int64_t touched = sum_window(plan, number, scratch);
        find_directions(plan, number, touched, scratch);
        update_weights(plan, start + first, length, touched, feedback ? values + first : nullptr,
                       draws ? draws + first : nullptr, scratch);
    });
}

void count_step(const Plan& plan) {
    const Tensor& t = plan.tensor;
    *t.step += 1;
    if (!t.count) return;
    t.row_counts[plan.row] = static_cast<int32_t>(plan.count);
    Energy sum;
    for (const Energy& energies : plan.energies) {
        sum.selected += energies.selected;
        sum.total += energies.total;
    }
    // As next_count in micro_adam.py.
    const int64_t count = plan.count;
    const int64_t next =
        count + (sum.selected < plan.caught_target * sum.total ? count / 8 + 1 : -(count / 32 + 1));
    *t.count = static_cast<int32_t>(std::min(std::max(next, t.smallest_k), t.k));
}

}  // namespace

// Steps `count` tensors; sets skipped[i] where a gradient was not finite, else raises the tensor's step by one.
extern "C" __attribute__((visibility("default"))) void micro_adam_step(const Tensor* tensors, int64_t count,
                                                                       const Hyper* hypers, int64_t threads,
                                                                       uint8_t* skipped) {
    Job<Plan> job(count);
    int64_t elements = 0;
    for (int64_t i = 0; i < count; ++i) {
        Plan& plan = job.plans[static_cast<size_t>(i)];
        fill(plan, tensors[i], hypers[tensors[i].hyper]);
        elements = std::max(elements, plan.unit);
    }
    const auto stop_of = [](const Plan& plan, int64_t item) {
        return std::min((item + 1) * plan.item_elements, plan.tensor.numel);
    };
    job.run(
        threads, [&] { return Scratch(elements); },
        [&](const Plan& plan, int64_t item) {
            const Tensor& t = plan.tensor;
            return none_exceeds(t.grad, t.grad_type, item * plan.item_elements, stop_of(plan, item), LARGEST_SQUARABLE);
        },
        [&](Plan& plan, int64_t item, Scratch& scratch) {
            Energy energies;
            const int64_t stop = stop_of(plan, item);
            for (int64_t start = item * plan.item_elements; start < stop; start += plan.unit)
                step_unit(plan, start, std::min(start + plan.unit, stop), scratch, energies);
            if (plan.tensor.count) plan.energies[static_cast<size_t>(item)] = energies;
        });
    for (int64_t i = 0; i < count; ++i) {
        const Plan& plan = job.plans[static_cast<size_t>(i)];
        skipped[i] = !plan.finite;
        if (!skipped[i]) count_step(plan);
    }
}
