// The C interface. An operation is plain data, a program is an array of operations, and one call runs a program on all
// threads: running a single operation and replaying a whole recorded decode step are the same thing.
#pragma once
#include <cstdint>

enum Kind : int32_t {
  QK_EMBED,
  QK_RMS_NORM,
  QK_QUANTIZE,
  QK_LINEAR,
  QK_LINEAR_BF16,
  QK_ROTATE,
  QK_WRITE_CACHE,
  QK_ATTEND,
  QK_SILU_MUL,
  QK_ADD,
  QK_PENALIZE,
  QK_PEAKS,
  QK_SAMPLE,
  QK_KINDS
};

// `wait` is 1 where all threads must have finished what came before. What p, n and x mean is said at each kernel.
struct Op {
  int32_t kind;
  int32_t wait;
  void* p[12];
  int64_t n[12];
  double x;
};

// A kernel does thread `thread`'s share of an operation.
typedef void (*Kernel)(const Op& op, int thread, int threads);
extern "C" {
const Kernel* qk_kernels_avx2();
const Kernel* qk_kernels_avx512();
}
