// The order of work of a compiled step: a tensor is stepped only after all of its gradient has been checked, so that
// one with a value that is not finite stays as it was, parameter and state.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "elements.h"
#include "workers.h"

namespace {

// What a thread claims at a time: its gradient, checked first, is still in the second-level cache when it is used.
constexpr int64_t ITEM_ELEMENTS = 65536;

// A tensor in a step, divided into items.
struct Checked {
    int64_t items = 1, first_ticket = 0;
    std::atomic<int64_t> checks_left{0};
    std::atomic<bool> finite{true};
};

// Whether none of the elements begin to end is NaN or has a magnitude above `largest`.
inline bool none_exceeds(const void* values, int64_t type, int64_t begin, int64_t end, float largest) {
    int32_t most = 0;
    if (type == FP32) {
        const float* floats = static_cast<const float*>(values);
#pragma omp simd reduction(max : most)
        for (int64_t i = begin; i < end; ++i) most = std::max(most, bit_cast<int32_t>(floats[i]) & 0x7FFFFFFF);
    } else {
        const uint16_t* halves = static_cast<const uint16_t*>(values);
#pragma omp simd reduction(max : most)
        for (int64_t i = begin; i < end; ++i) most = std::max(most, (static_cast<int32_t>(halves[i]) & 0x7FFF) << 16);
    }
    return most <= bit_cast<int32_t>(largest);  // the bits of infinities and NaN are larger than any number's
}

// Tickets are drawn in order: for each tensor first those that check its gradient, then those that step it. A tensor of
// one ticket is checked and stepped in one go. `Plan` is a Checked.
template <class Plan>
struct Job {
    explicit Job(int64_t count) : plans(static_cast<size_t>(count)) {}

    std::vector<Plan> plans;  // filled, `items` as well, before run()

    // make_scratch() makes what each thread works in; check(plan, item) returns whether the gradient is finite there;
    // step(plan, item, scratch) steps.
    template <class MakeScratch, class Check, class Step>
    void run(int64_t threads, MakeScratch make_scratch, Check check, Step step) {
        int64_t tickets = 0;
        for (Plan& plan : plans) {
            plan.first_ticket = tickets;
            plan.checks_left = plan.items;
            tickets += plan.items > 1 ? 2 * plan.items : 1;
        }
        std::atomic<int64_t> next{0};
        const auto work = [&] {
            auto scratch = make_scratch();
            size_t at = 0;
            for (int64_t ticket; (ticket = next.fetch_add(1)) < tickets;) {
                while (at + 1 < plans.size() && plans[at + 1].first_ticket <= ticket) ++at;
                Plan& plan = plans[at];
                const int64_t number = ticket - plan.first_ticket, item = number % plan.items;
                if (number < plan.items) {
                    if (!check(plan, item)) plan.finite = false;
                    --plan.checks_left;
                    if (plan.items > 1) continue;
                }
                // All checks have been claimed by now, so this waits for a fraction of one item at most.
                while (plan.checks_left) std::this_thread::yield();
                if (plan.finite) step(plan, item, scratch);
            }
        };
        workers->run(work, std::min(threads, tickets) - 1);
    }
};

}  // namespace
