// The C interface: choice of the instruction set, the process's thread pool, and what becomes of it in a forked child.
#include <atomic>
#include <cstring>
#include <mutex>

#include <pthread.h>

#include "pool.h"
#include "program.h"

namespace {

struct State {
  std::mutex one_program;  // several Python threads may call; programs run one after the other
  Pool* pool = nullptr;    // made when it is first used
  int threads = 1;
  const Kernel* kernels = nullptr;
};

State& state();

std::atomic<bool> forked{false};

// fork waits for the program that runs, so that a child finds the lock free and all counters at rest. The child has none of the pool's
// threads: it forgets the pool, whose memory is not freed because its threads cannot be joined, and makes its own when it runs a program.
void before_fork() { state().one_program.lock(); }
void after_fork_in_parent() { state().one_program.unlock(); }
void after_fork_in_child() {
  forked = true;
  state().pool = nullptr;
  state().one_program.unlock();
}

// Never destroyed: threads that sleep at the end of the process need not be joined.
State& state() {
  static State* s = [] {
    State* made = new State;
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    return made;
  }();
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
  if (s.threads != threads) {
    delete s.pool;
    s.pool = nullptr;
    s.threads = threads;
  }
  return 0;
}

void qk_run(const Op* ops, int64_t count) {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.one_program);
  if (!s.pool) s.pool = new Pool(s.threads);
  s.pool->run(s.kernels, ops, count);
}

// How many threads the last program ran on or, if its end showed that there were too many, the next one will.
int qk_active_threads() {
  State& s = state();
  std::lock_guard<std::mutex> lock(s.one_program);
  return s.pool ? s.pool->active() : s.threads;
}

// 1 in a child that was forked after qk_configure, and in its children.
int qk_forked() { return forked; }

int64_t qk_op_size() { return sizeof(Op); }
}
