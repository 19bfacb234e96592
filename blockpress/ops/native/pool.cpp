// One thread pool for every operation in C++: no thread waits for a part that has not been started.
//
//     caller    publish parts -> take parts until none is left -> close -> wait for parts still running
//     worker    look for new parts (spins, then yields, then sleeps) -> take parts until none is left
//
// Parts are taken one by one, so a worker that the system has descheduled delays only the part it holds. A caller that
// finds the pool busy does its parts alone; so does a part that has parts of its own.
//
// Loaded once with global symbols (ops/compiled.py); pool.h declares the one function.

#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#include <sched.h>
#endif

namespace {

inline void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

inline void give_up_turn() { std::this_thread::yield(); }

// A worker that wakes on its caller's processor would wait for the caller: it moves to another processor.
#ifdef __linux__
inline int where() { return sched_getcpu(); }

void leave(int processor) {
  cpu_set_t all, rest;
  if (processor < 0 || sched_getcpu() != processor || sched_getaffinity(0, sizeof all, &all) || CPU_COUNT(&all) < 2) return;
  rest = all;
  CPU_CLR(processor, &rest);
  if (!sched_setaffinity(0, sizeof rest, &rest)) sched_setaffinity(0, sizeof all, &all);
}
#else
inline int where() { return -1; }
inline void leave(int) {}
#endif

// state: job number << 16 | OPEN | workers inside
constexpr uint64_t OPEN = 1 << 15, INSIDE = OPEN - 1, JOB = 1 << 16;
constexpr int PAUSES = 1000;  // some 30 us
constexpr auto AWAKE = std::chrono::microseconds(1000);  // Python's time between two calls; waking a thread takes 50 us

struct Pool {
  std::atomic<bool> taken{false};
  std::mutex asleep;
  std::condition_variable wake;
  std::atomic<uint64_t> state{0};
  std::atomic<long> next{0};
  std::atomic<int> sleepers{0};
  int workers = 0;
  long count = 0;
  std::atomic<uint64_t> most{0};  // workers that may take part
  std::atomic<int> caller{-1};    // the processor that the caller started on
  void (*part)(void*, long) = nullptr;
  void* data = nullptr;

  void take() {
    for (long i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) part(data, i);
  }

  void work() {
    uint64_t seen = 0;  // the last job that this worker finished
    for (;;) {
      uint64_t now = await(seen);
      if ((now & INSIDE) >= most) {
        seen = now & ~(JOB - 1);
        continue;
      }
      leave(caller.load(std::memory_order_relaxed));
      if (!state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
      take();
      seen = now & ~(JOB - 1);
      state.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  static bool offers(uint64_t state, uint64_t seen) { return (state & OPEN) && (state & ~(JOB - 1)) != seen; }

  uint64_t await(uint64_t seen) {
    for (;;) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < PAUSES || i % 16 || std::chrono::steady_clock::now() - start < AWAKE; i++) {
        const uint64_t now = state.load(std::memory_order_acquire);
        if (offers(now, seen)) return now;
        i < PAUSES ? rest() : give_up_turn();
      }
      {
        std::unique_lock<std::mutex> lock(asleep);
        sleepers++;
        const uint64_t last = state.load() & ~(JOB - 1);
        wake.wait(lock, [&] { return (state.load() & ~(JOB - 1)) != last; });
        sleepers--;
      }
      leave(caller.load(std::memory_order_relaxed));  // the job that woke it may be over, but another will follow soon
    }
  }

  void run(long parts, int threads, void (*function)(void*, long), void* argument) {
    try {
      for (; workers < threads - 1; workers++) std::thread([this] { work(); }).detach();
    } catch (const std::system_error&) {  // the system allows no more threads: use those that exist
    }
    part = function, data = argument, count = parts, most = threads - 1;
    next.store(0, std::memory_order_relaxed);
    caller.store(where(), std::memory_order_relaxed);
    state.store(((state.load() & ~(JOB - 1)) + JOB) | OPEN);
    if (sleepers.load()) {
      std::lock_guard<std::mutex> lock(asleep);
      wake.notify_all();
    }
    take();
    state.fetch_and(~OPEN);
    for (int i = 0; state.load(std::memory_order_acquire) & INSIDE; i++) i < PAUSES ? rest() : give_up_turn();
  }
};

Pool* pool = new Pool;  // never destroyed: workers end with the process

#if defined(__linux__) || defined(__APPLE__)
void renew() { pool = new Pool; }  // a forked process has no workers
const int registered = pthread_atfork(nullptr, nullptr, renew);
#endif

}  // namespace

extern "C" void blockpress_parallel(long parts, int threads, void (*part)(void*, long), void* data) {
  Pool* now = pool;
  if (threads > 1 && parts > 1 && !now->taken.exchange(true, std::memory_order_acquire)) {
    now->run(parts, threads < parts ? threads : static_cast<int>(parts), part, data);
    now->taken.store(false, std::memory_order_release);
    return;
  }
  for (long i = 0; i < parts; i++) part(data, i);
}
