// The thread pool that runs programs. The caller's thread is thread 0, the others belong to the pool.
//
// Waiting. A thread that waits (at a barrier, for the end of a program, for the next program) spins for some microseconds, because what
// it waits for usually comes at once, and then sleeps on a futex: where other processes want the cores too, a thread that spins keeps
// away the very one that it waits for.
//
// Active threads. Another process that keeps a core busy takes it from one of our threads for milliseconds, and all others wait for
// that one at the next barrier. ActiveThreads sees this and lets programs run on fewer threads, trying all of them again from time to
// time. A program runs on the same number of threads from its first operation to its last, and no kernel's result depends on it.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>

#include <immintrin.h>

#include "program.h"

namespace {

constexpr int64_t MICROSECOND = 1000, MILLISECOND = 1000 * MICROSECOND;

inline int64_t read_clock(clockid_t clock) {
  timespec t;
  return clock_gettime(clock, &t) ? 0 : t.tv_sec * 1000000000LL + t.tv_nsec;
}
inline int64_t now() { return read_clock(CLOCK_MONOTONIC); }

static_assert(sizeof(std::atomic<uint32_t>) == 4, "a futex is 4 bytes");
// Sleep while *word == value. May return early.
inline void futex_wait(std::atomic<uint32_t>* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
inline void futex_wake(std::atomic<uint32_t>* word, int count) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0); }

// How many threads the next program runs on. A change-point test (CUSUM): time lost to threads that had no core is added up, a share
// of the time that passes is taken off, and at BUDGET one thread fewer is used. The share is what that thread is worth, so that a
// process that takes a core only now and then changes nothing.
class ActiveThreads {
 public:
  static constexpr int64_t BUDGET = 4 * MILLISECOND;  // more than one time slice of the usual schedulers

  void reset(int threads) { *this = ActiveThreads(), threads_ = active_ = settled_ = threads; }

  int active() const { return active_; }

  // Before a program.
  int choose() {
    if (active_ < threads_ && now() >= retry_at_) {
      settled_ = active_, active_ = threads_;
      raised_at_ = last_ = now();
      lost_ = BUDGET / 2;  // the last attempt failed, so less evidence is enough
    }
    return active_;
  }

  // After a program on more than one thread, during which `stalled` nanoseconds were spent waiting for a thread without a core.
  void record(int64_t stalled) {
    const int64_t time = now(), passed = time - last_;
    last_ = time;
    lost_ = std::max<int64_t>(0, lost_ + stalled - passed * WORTH_PERCENT / (100 * active_));
    if (lost_ < BUDGET) return;
    const bool again = raised_at_ && time - raised_at_ < LONGEST_RETRY;
    retry_after_ = again ? std::min(2 * retry_after_, LONGEST_RETRY) : FIRST_RETRY;
    active_ = std::max(1, again ? std::min(settled_, active_ - 1) : active_ - 1);
    retry_at_ = time + std::max(retry_after_, RETRY_COST * stalled);  // of a large model one program may lose much
    lost_ = 0;
  }

 private:
  static constexpr int64_t WORTH_PERCENT = 60;        // of a thread's share; memory is shared, so less than all of it
  static constexpr int64_t FIRST_RETRY = 100 * MILLISECOND, LONGEST_RETRY = 1000 * MILLISECOND;
  static constexpr int64_t RETRY_COST = 20;  // a program that lost x is followed by at least 20 x without another attempt

  int threads_ = 1, active_ = 1, settled_ = 1;
  int64_t lost_ = 0, last_ = 0, raised_at_ = 0, retry_at_ = 0, retry_after_ = FIRST_RETRY;
};

class Pool {
 public:
  // Of fewer threads where the system gives no more.
  explicit Pool(int threads) : pool_threads_(new PoolThread[threads]) {
    try {
      for (; threads_ < threads; threads_++) {
        PoolThread& added = pool_threads_[threads_];
        added.thread = std::thread([this, id = threads_] { work(id); });
        pthread_getcpuclockid(added.thread.native_handle(), &added.clock);
      }
    } catch (const std::system_error&) {
    }
    active_threads_.reset(threads_);
  }

  ~Pool() {
    leaving_ = true;
    publish(threads_);
    for (int id = 1; id < threads_; id++) pool_threads_[id].thread.join();
  }

  int threads() const { return threads_; }
  int active() const { return active_threads_.active(); }

  void run(const Kernel* kernels, const Op* ops, int64_t count) {
    kernels_ = kernels, ops_ = ops, count_ = count;
    const int active = threads_ > 1 ? active_threads_.choose() : 1;
    if (active == 1) {
      for (int64_t i = 0; i < count; i++) kernels[ops[i].kind](ops[i], 0, 1);
      return;
    }
    pthread_getcpuclockid(pthread_self(), &pool_threads_[0].clock);
    stalled_.store(0, std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    for (int id = 0; id < active; id++) pool_threads_[id].arrived.store(0, std::memory_order_relaxed);
    publish(active);
    const uint32_t barriers = execute(0, active);
    arrive(0, active, barriers);
    wait_at_barrier(0, active, barriers);
    active_threads_.record(stalled_.load(std::memory_order_relaxed));
  }

 private:
  static constexpr int SPINS_BEFORE_CLOCK = 512;  // 5 to 25 us, in which no clock is read
  static constexpr int64_t BARRIER_SPIN = 100 * MICROSECOND, PROGRAM_SPIN = 1 * MILLISECOND;
  static constexpr int64_t LATE = 50 * MICROSECOND;  // shorter waits without a core are not counted

  struct alignas(64) PoolThread {
    std::atomic<uint32_t> arrived{0};  // barriers of this program at which the thread has arrived
    std::atomic<uint32_t> asleep{0};   // 1 while the thread sleeps between programs, or is about to
    clockid_t clock = CLOCK_THREAD_CPUTIME_ID;
    int64_t cpu_time = 0;  // scratch of the thread that observes this one
    std::thread thread;
  };

  // Begin a program on the threads 0 .. active - 1 and wake those of them that sleep.
  void publish(int active) {
    const uint64_t generation = (uint32_t)program_.load(std::memory_order_relaxed) + 1u;
    program_.store((uint64_t)active << 32 | (uint32_t)generation);
    for (int id = 1; id < active; id++)
      if (pool_threads_[id].asleep.load() && pool_threads_[id].asleep.exchange(0)) futex_wake(&pool_threads_[id].asleep, 1);
  }

  // One thread's share of a program. Returns the number of the barrier that ends it.
  uint32_t execute(int id, int active) {
    uint32_t barriers = 0;
    for (int64_t i = 0; i < count_; i++) {
      if (ops_[i].wait) {
        arrive(id, active, ++barriers);
        wait_at_barrier(id, active, barriers);
      }
      kernels_[ops_[i].kind](ops_[i], id, active);
    }
    return barriers + 1;
  }

  void arrive(int id, int active, uint32_t barrier) {
    pool_threads_[id].arrived.store(barrier, std::memory_order_relaxed);
    if (arrived_.fetch_add(1) + 1 == barrier * active && sleepers_.load()) futex_wake(&arrived_, INT_MAX);
  }

  void wait_at_barrier(int id, int active, uint32_t barrier) {
    const uint32_t all = barrier * active;
    for (int spins = 0; spins < SPINS_BEFORE_CLOCK; spins++) {
      if (arrived_.load(std::memory_order_acquire) >= all) return;
      _mm_pause();
    }
    wait_long(id, active, barrier);
  }

  __attribute__((noinline)) void wait_long(int id, int active, uint32_t barrier) {
    const uint32_t all = barrier * active;
    // Thread 0 observes the others, and thread 1 observes thread 0.
    const int first = id == 0 ? 1 : 0, last = id == 0 ? active : id == 1 ? 1 : 0;
    const int64_t start = now();
    for (int other = first; other < last; other++)
      pool_threads_[other].cpu_time = pool_threads_[other].arrived.load(std::memory_order_relaxed) < barrier ? read_clock(pool_threads_[other].clock) : -1;
    bool open = false;
    while (!(open = arrived_.load(std::memory_order_acquire) >= all) && now() - start < BARRIER_SPIN)
      for (int spins = 0; spins < 32 && arrived_.load(std::memory_order_relaxed) < all; spins++) _mm_pause();
    if (open) return;
    sleepers_.fetch_add(1);
    for (uint32_t seen; (seen = arrived_.load()) < all;) futex_wait(&arrived_, seen);
    sleepers_.fetch_sub(1);
    const int64_t waited = now() - start;
    for (int other = first; other < last; other++) {
      if (pool_threads_[other].cpu_time < 0) continue;
      const int64_t without_core = waited - (read_clock(pool_threads_[other].clock) - pool_threads_[other].cpu_time);
      if (without_core >= LATE) return (void)stalled_.fetch_add(std::min(without_core, ActiveThreads::BUDGET));
    }
  }

  // The life of a thread of the pool.
  void work(int id) {
    PoolThread& own = pool_threads_[id];
    uint64_t last = 0;  // program that this thread took part in
    const auto has_work = [&] {
      const uint64_t program = program_.load();
      return program != last && (int)(program >> 32) > id;
    };
    for (;;) {
      while (!has_work()) {
        own.asleep.store(1);
        if (!has_work()) futex_wait(&own.asleep, 1);
        own.asleep.store(0);
      }
      while (has_work()) {
        last = program_.load();  // stays the same until all threads that take part have arrived at its end
        if (leaving_) return;
        const int active = (int)(last >> 32);
        arrive(id, active, execute(id, active));
        for (const int64_t start = now(); program_.load() == last && now() - start < PROGRAM_SPIN;)
          for (int spins = 0; spins < 32 && program_.load(std::memory_order_relaxed) == last; spins++) _mm_pause();
      }
    }
  }

  int threads_ = 1;
  bool leaving_ = false;
  std::unique_ptr<PoolThread[]> pool_threads_;
  ActiveThreads active_threads_;
  // Number of active threads << 32 | generation: one word, because a thread that takes no part in a program may look at any time.
  alignas(64) std::atomic<uint64_t> program_{0};
  alignas(64) std::atomic<uint32_t> arrived_{0};  // arrivals of all threads at all barriers of this program
  std::atomic<uint32_t> sleepers_{0};             // at barriers
  std::atomic<int64_t> stalled_{0};
  const Kernel* kernels_ = nullptr;
  const Op* ops_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace
