// The thread pool that runs programs, and the choice of instruction set. The caller's thread is thread 0; the others sleep
// between programs and spin for a moment before they do, because the next program usually follows at once.
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include <immintrin.h>

#include "program.h"

namespace {

// How long a thread spins before it gives way: programs and barriers follow each other within microseconds, but where other
// processes want the cores too, a spinning thread keeps away the very one that it waits for.
constexpr int SPINS_BEFORE_YIELD = 2000;
constexpr int SPINS_BEFORE_SLEEP = 50000;

template <class Done>
inline void spin_until(Done done) {
  for (int spins = 0; !done(); spins++) {
    if (spins < SPINS_BEFORE_YIELD) _mm_pause();
    else std::this_thread::yield();
  }
}

class Pool {
 public:
  ~Pool() { resize(1); }

  // Only between programs.
  void resize(int threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      leaving_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    leaving_ = false;
    threads_ = threads;
    const int64_t seen = generation_.load();
    for (int id = 1; id < threads; id++) workers_.emplace_back([this, id, seen] { work(id, seen); });
  }

  int threads() const { return threads_; }

  void run(const Kernel* kernels, const Op* ops, int64_t count) {
    kernels_ = kernels, ops_ = ops, count_ = count;
    done_.store(0);
    arrived_.store(0);
    if (threads_ > 1) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        generation_.fetch_add(1);
      }
      wake_.notify_all();
    }
    execute(0);
    spin_until([&] { return done_.load(std::memory_order_acquire) == threads_ - 1; });
  }

 private:
  void execute(int id) {
    int64_t barriers = 0;
    for (int64_t i = 0; i < count_; i++) {
      if (ops_[i].wait) {
        barriers += threads_;
        arrived_.fetch_add(1, std::memory_order_acq_rel);
        spin_until([&] { return arrived_.load(std::memory_order_acquire) >= barriers; });
      }
      kernels_[ops_[i].kind](ops_[i], id, threads_);
    }
  }

  void work(int id, int64_t seen) {
    for (;;) {
      for (int spins = 0; spins < SPINS_BEFORE_SLEEP && generation_.load(std::memory_order_acquire) == seen; spins++) {
        if (spins < SPINS_BEFORE_YIELD) _mm_pause();
        else if (spins % 64 == 0) std::this_thread::yield();
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
      }
      seen = generation_.load(std::memory_order_acquire);
      if (leaving_) return;
      execute(id);
      done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int64_t> generation_{0}, arrived_{0};
  std::atomic<int> done_{0};
  bool leaving_ = false;
  int threads_ = 1;
  const Kernel* kernels_ = nullptr;
  const Op* ops_ = nullptr;
  int64_t count_ = 0;
};

struct State {
  Pool pool;
  std::mutex one_program;  // several Python threads may call; programs run one after the other
  const Kernel* kernels = nullptr;
};

// Never destroyed: threads that sleep at the end of the process need not be joined.
State& state() {
  static State* s = new State;
  return *s;
}

}  // namespace

extern "C" {

// Whether this machine has an instruction set: "avx2" or "avx512" (F, BW, VL, DQ and VNNI).
int qk_supports(const char* isa) {
  __builtin_cpu_init();
  if (!std::strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
  return 0;
}

// Choose the instruction set and the number of threads; 0 on success. Called before the first program.
int qk_configure(const char* isa, int threads) {
  if (!qk_supports(isa) || threads < 1) return 1;
  State& s = state();
  std::lock_guard<std::mutex> lock(s.one_program);
  s.kernels = std::strcmp(isa, "avx512") ? qk_kernels_avx2() : qk_kernels_avx512();
  if (s.pool.threads() != threads) s.pool.resize(threads);
  return 0;
}

void qk_run(const Op* ops, int64_t count) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.one_program);
  s.pool.run(s.kernels, ops, count);
}

int64_t qk_op_size() { return sizeof(Op); }
}
