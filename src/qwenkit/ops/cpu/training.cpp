// Runs a kernel of training on the threads that the caller's matrix products run on: a second pool would fight with them for the
// cores. The OpenMP runtime is the one that torch has loaded, so its functions come as pointers and nothing is linked to one.
#include <cstring>

#include "training_kinds.h"

namespace {

typedef void (*Parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);  // GOMP_parallel
typedef int (*Number)();

struct Task {
  Kernel kernel;
  const Op* op;
  Number thread, threads;
};

void share(void* data) {
  const Task& task = *(const Task*)data;
  task.kernel(*task.op, task.thread(), task.threads());
}

}  // namespace

extern "C" {

// thread and threads: omp_get_thread_num and omp_get_num_threads.
//
// A forked child computes on one thread: GCC's OpenMP runtime has none of its threads there, and would wait for them.
void qk_train(const char* isa, const Op* op, int most, Parallel parallel, Number thread, Number threads) {
  const Kernel kernel = (std::strcmp(isa, "avx512") ? qk_training_avx2() : qk_training_avx512())[op->kind];
  if (most < 2 || qk_forked()) {
    kernel(*op, 0, 1);
    return;
  }
  Task task = {kernel, op, thread, threads};
  parallel(share, &task, (unsigned)most, 0);
}
}
