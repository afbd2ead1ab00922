// The kernels of training.h by number: the `kind` of an Op that qk_train runs, as training.py counts them.
#pragma once
#include "program.h"

enum TrainingKind : int32_t {
  QK_RMS_NORM_FORWARD,
  QK_RMS_NORM_BACKWARD,
  QK_SILU_MUL_FORWARD,
  QK_SILU_MUL_BACKWARD,
  QK_TURN,
  QK_CROSS_ENTROPY,
  QK_TRAINING_KINDS
};

extern "C" {
const Kernel* qk_training_avx2();
const Kernel* qk_training_avx512();
int qk_forked();
}
