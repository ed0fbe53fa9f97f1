// How the threads of one parallel region meet and share work.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>

class Barrier {
   public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const int turn = turn_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; turn_.load(std::memory_order_acquire) == turn; spin++) {
#if defined(__x86_64__)
            __builtin_ia32_pause();  // leaves the core to its other hardware thread
#endif
            if (spin > 2000) sched_yield();  // another process has the core that is being waited for
        }
    }

   private:
    const int threads_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> turn_{0};
};

// Tasks 0 .. count-1, taken one by one by whoever is free.
class Tasks {
   public:
    void reset() { next_.store(0, std::memory_order_relaxed); }
    template <class Body>
    void run(int64_t count, Body body) {
        for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count;) body(task);
    }

   private:
    alignas(64) std::atomic<int64_t> next_{0};
};
