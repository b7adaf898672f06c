// A small pool of threads, sharing nothing with torch's: two OpenMP runtimes in a process are a known source of hangs.

#pragma once

#include <pthread.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

// Threads that sleep between steps. They are never joined: the process's end takes them, and a forked child, which
// has none of them, begins with a new set.
class Workers {
   public:
    // Runs `work` on the calling thread and on up to `helpers` others at once; it must return when nothing is left.
    void run(const std::function<void()>& work, int64_t helpers) {
        std::unique_lock<std::mutex> one_caller(busy_, std::try_to_lock);
        if (!one_caller || helpers < 1) return work();  // another thread of the program is here: do it alone
        {
            std::lock_guard<std::mutex> lock(mutex_);
            start(helpers);
            work_ = &work;
            seats_ = helpers;
        }
        wake_.notify_all();
        work();
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;  // who has not woken by now is not needed
        done_.wait(lock, [this] { return active_ == 0; });
    }

   private:
    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void()>* work_ = nullptr;
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
            const std::function<void()>& work = *work_;
            lock.unlock();
            work();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }
};

Workers* workers = nullptr;
void new_workers() { workers = new Workers; }
const int registered = (new_workers(), pthread_atfork(nullptr, nullptr, new_workers));

}  // namespace
