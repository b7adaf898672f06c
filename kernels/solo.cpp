// The SOLO step on a CPU: what solo_step_reference in solo.py means, bit for bit, in one pass over memory.
//
// Up to sixteen blocks at a time go through the numbered phases below while their fp32 moments stay in the first-level
// cache. All arithmetic is IEEE addition, multiplication, division and square root in the reference's order, so the
// build must not contract to fused multiply-add or reassociate (-ffp-contract=off, no -ffast-math). The loops are
// written for the compiler's vectorizer; intrinsics stand only where it finds no good form (look-ups, Philox).
// solo_cpu.py has this file built, generates solo_constants.h from the reference's constants, and mirrors `Tensor`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "checked_steps.h"
#include "elements.h"
#include "solo_formats.h"

namespace {

// One row of the table that solo_cpu.py fills for every step; all fields are 64 bits wide.
struct Tensor {
    void* param;  // (rows, columns), contiguous
    const void* grad;
    float* step;
    uint8_t* first_codes;  // or the fp32 moment where first_bits is 32
    void* first_scale;
    uint8_t* second_codes;
    void* second_scale;
    void* second_log2_base;
    int64_t rows, columns;
    int64_t param_type, grad_type, scale_type;
    int64_t state_stream, weight_stream, first_row;
    int64_t hyper;  // row of the table of hyperparameters
};

// One row of the table of hyperparameters, shared by all tensors with the same settings.
struct Hyper {
    double lr, beta1, beta2, eps, weight_decay, quantile;
    double first_bits, second_bits, block_size, seed;
    double stochastic_rounding, bf16_stochastic_rounding, maximize;
};

// The default block size, for which the phases are compiled with constant loop counts.
constexpr int64_t USUAL_LENGTH = 128;
constexpr int64_t BATCH_BLOCKS = 16;
// Two fp32 arrays of this length and their neighbours fit a 32 KiB first-level cache.
constexpr int64_t BATCH_ELEMENTS = 2048;

// A tensor's numbers for one step, rounded to fp32 where torch rounds a Python scalar that meets an fp32 tensor.
struct Plan : Checked {
    Tensor tensor;
    int64_t first_bits, second_bits, block_size, blocks_per_row, first_row_bytes, second_row_bytes;
    int64_t blocks_per_item;
    float sign, one_minus_beta1, one_minus_beta2, denominator_factor, eps, decay, step_size;
    double quantile;
    uint32_t seed, step;
    bool state_noise, weight_noise;

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
    int64_t number, row, index, length, offset;  // offset: of its first element in the matrix
    uint8_t *first_codes, *second_codes;
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
    block.number = number;
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
    }
    if (plan.second_bits == 32) {
        block.exp_avg_sq = reinterpret_cast<float*>(t.second_codes) + block.offset;
    } else {
        block.second_codes = t.second_codes + block.row * plan.second_row_bytes + column / 8 * plan.second_bits;
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

INLINE float scale_at(const Plan& plan, const Block& block, const void* scales) {
    if (plan.tensor.scale_type == FP32) return static_cast<const float*>(scales)[block.number];
    return from_bf16(static_cast<const uint16_t*>(scales)[block.number]);
}

// Returns what is stored. draws: the exclusive or of two lanes' first rounds to bf16, none rounds to the nearest.
INLINE float set_scale(const Plan& plan, const Block& block, void* scales, float scale, const int32_t* draws,
                       int64_t lane) {
    if (plan.tensor.scale_type == FP32) return static_cast<float*>(scales)[block.number] = scale;
    const int32_t draw = draws ? draws[0] ^ draws[lane] : 0;
    uint16_t* stored = static_cast<uint16_t*>(scales) + block.number;
    write_bf16(std::min(scale, LARGEST_BF16), draws ? &draw : nullptr, stored);
    return from_bf16(*stored);
}

// Phase 1: the moments in fp32.
template <class Length>
void decode(const Plan& plan, const Block& block, Length length, uint8_t* codes) {
    const Tensor& t = plan.tensor;
    with_bits(plan.first_bits, [&](auto bits) {
        unpack<bits>(block.first_codes, codes, padded_to_eight(length));
        decode_dynamic<bits>(codes, scale_at(plan, block, t.first_scale), block.exp_avg, length);
    });
    with_bits(plan.second_bits, [&](auto bits) {
        unpack<bits>(block.second_codes, codes, padded_to_eight(length));
        decode_logarithmic<bits>(codes, scale_at(plan, block, t.second_scale),
                                 scale_at(plan, block, t.second_log2_base), block.exp_avg_sq, length);
    });
}

// Phase 2: adamw_update, in place. What the encoders need to know of the moments falls out of it.
template <class Length>
void adamw_update(const Plan& plan, Block& block, Length length, const float* __restrict grad,
                  float* __restrict param) {
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
void encode_first(const Plan& plan, const Block& block, Length length, Scratch& scratch) {
    uint8_t* codes = scratch.codes.get();
    const float scale = set_scale(plan, block, plan.tensor.first_scale, block.first_most, nullptr, 0);
    // A zero block multiplies by a finite number, so its elements stay 0 and take the code of the map's 0.
    const float inverse = 1.0f / std::max(scale, SMALLEST_NORMAL);
    encode_dynamic<BITS>(block.exp_avg, inverse, codes, length);
    std::fill(codes + length, codes + padded_to_eight(length), uint8_t{0});
    pack<BITS>(codes, block.first_codes, padded_to_eight(length));
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
    const int32_t* draws = plan.state_noise ? scratch.draws.get() : nullptr;
    const int64_t lane = padded_to_eight(length) / 8;
    set_scale(plan, block, plan.tensor.second_scale, block.second_most, draws, lane);
    set_scale(plan, block, plan.tensor.second_log2_base, -span / last, draws ? draws + 2 * lane : nullptr, lane);
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
            for_each([&](Block& block, auto length) { encode_first<bits>(plan, block, length, scratch); });
        });
        with_bits(plan.second_bits, [&](auto bits) {
            for_each([&](Block& block, auto length) { find_quantile(plan, block, length); });
            for_each([&](Block& block, auto length) { encode_second<bits>(plan, block, length, scratch); });
        });
    }
}

// Whether no element of these blocks is NaN or has a magnitude whose square overflows.
bool is_steppable(const Plan& plan, int64_t first, int64_t stop) {
    const auto offset = [&](int64_t block) {
        return block / plan.blocks_per_row * plan.tensor.columns + block % plan.blocks_per_row * plan.block_size;
    };
    return none_exceeds(plan.tensor.grad, plan.tensor.grad_type, offset(first), offset(stop), LARGEST_SQUARABLE);
}

}  // namespace

// Steps `count` tensors; sets skipped[i] where a gradient was not finite, else raises the tensor's step by one.
extern "C" __attribute__((visibility("default"))) void solo_step(const Tensor* tensors, int64_t count,
                                                                 const Hyper* hypers, int64_t threads,
                                                                 uint8_t* skipped) {
    Job<Plan> job(count);
    int64_t stride = 0;
    for (int64_t i = 0; i < count; ++i) {
        Plan& plan = job.plans[static_cast<size_t>(i)];
        fill(plan, tensors[i], hypers[tensors[i].hyper]);
        stride = std::max(stride, padded_to_eight(plan.block_length()));
    }
    const auto blocks_of = [](const Plan& plan, int64_t item, auto work) {
        const int64_t first = item * plan.blocks_per_item;
        return work(first, std::min(first + plan.blocks_per_item, plan.blocks()));
    };
    job.run(
        threads, [&] { return Scratch(stride); },
        [&](const Plan& plan, int64_t item) {
            return blocks_of(plan, item, [&](int64_t first, int64_t stop) { return is_steppable(plan, first, stop); });
        },
        [&](const Plan& plan, int64_t item, Scratch& scratch) {
            blocks_of(plan, item, [&](int64_t first, int64_t stop) { step_blocks(plan, first, stop, scratch); });
        });
    for (int64_t i = 0; i < count; ++i) {
        skipped[i] = !job.plans[static_cast<size_t>(i)].finite;
        if (!skipped[i]) *tensors[i].step += 1;
    }
}
