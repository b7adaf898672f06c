// Packing, unpacking and quantizing on a CPU: what the references mean, bit for bit, in one pass over memory.
//
// Runs of up to 1024 elements of a row go through the phases of block_float_codec.h while they stay in the first-level
// cache. The build must not contract to fused multiply-add or reassociate. block_float_cpu.py builds this file and
// mirrors `Task`. Numbers are read as bytes in memory order, so the machine must be little-endian, as all that torch
// runs on.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "block_float_codec.h"
#include "workers.h"

namespace {

// What a thread claims at a time.
constexpr int64_t ITEM_ELEMENTS = 32768;
// Of sixteen rows at a time with inner > 1: the longest box.
constexpr int64_t TILE = 128;

template <bool AFFINE, int BITS>
void treat(const Task& task, const Run& run, Scratch& scratch) {
    const Codec<AFFINE, BITS> codec{task, run, scratch};
    if (!task.in) return codec.unpack();
    task.codes ? codec.pack() : codec.quantize();
}

using Treat = void (*)(const Task&, const Run&, Scratch&);

template <bool AFFINE>
Treat treat_of(int64_t bits) {
    constexpr Treat by_bits[] = {treat<AFFINE, 2>, treat<AFFINE, 3>, treat<AFFINE, 4>, treat<AFFINE, 5>,
                                 treat<AFFINE, 6>, treat<AFFINE, 7>, treat<AFFINE, 8>};
    return bits == 16 ? treat<false, 16> : by_bits[bits - 2];
}

// Up to RUN elements of a row, or of sixteen rows with inner > 1, which lie beside each other in memory.
void treat_run(const Task& task, Treat treat, int64_t row, int64_t column, int64_t most, Scratch& scratch) {
    const int64_t boxes_per_row = ceil_div(task.columns, task.box), length = std::min(most, task.columns - column);
    Run run{row, column, length, ceil_div(length, task.box) * task.box, row * boxes_per_row + column / task.box};
    if (task.inner == 1) return treat(task, run, scratch);

    float turned[LANES * TILE], line[LANES];
    const int64_t rows = std::min(LANES, task.inner - row % task.inner);
    const int64_t first = (row / task.inner * task.columns + column) * task.inner + row % task.inner;
    for (int64_t i = 0; i < run.padded; ++i) {
        to_fp32(task, first + std::min(i, length - 1) * task.inner, rows, line);
        for (int64_t j = 0; j < rows; ++j) turned[j * TILE + i] = line[j];
    }
    for (int64_t j = 0; j < rows; ++j) {
        run.own = turned + j * TILE;
        treat(task, run, scratch);
        run.first_box += boxes_per_row;
    }
    for (int64_t i = 0; i < length; ++i) {
        for (int64_t j = 0; j < rows; ++j) line[j] = turned[j * TILE + i];
        from_fp32(task, first + i * task.inner, rows, line);
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void block_float(const Task* given, int64_t threads) {
    Task task = *given;
    if (task.columns % task.box == 0 && task.inner == 1) {  // rows end with boxes, so they need not be told apart
        task.columns *= task.rows;
        task.rows = 1;
    }
    if (task.rows * task.columns == 0) return;
    const Treat treat = task.affine ? treat_of<true>(task.bits) : treat_of<false>(task.bits);
    const int64_t most = task.inner == 1 ? RUN : TILE, runs_per_row = ceil_div(task.columns, most);
    // Rows that lie beside each other are treated sixteen at a time, and those of one index before the axis never with
    // those of the next.
    const int64_t together = task.inner == 1 ? 1 : LANES, groups = ceil_div(task.inner, together);
    const int64_t runs = task.rows / task.inner * groups * runs_per_row;
    const int64_t runs_per_item = std::max<int64_t>(1, ITEM_ELEMENTS / (together * std::min(most, task.columns)));
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        Scratch scratch;
        for (int64_t first; (first = next.fetch_add(runs_per_item)) < runs;) {
            for (int64_t i = first; i < std::min(first + runs_per_item, runs); ++i) {
                const int64_t group = i / runs_per_row, row = group / groups * task.inner + group % groups * together;
                treat_run(task, treat, row, i % runs_per_row * most, most, scratch);
            }
        }
    };
    workers->run(work, std::min(threads, ceil_div(runs, runs_per_item)) - 1);
}
