#include "kernels.h"
#include "training.h"

extern "C" const Kernel* qk_kernels_avx2() { return kernels; }
extern "C" const Kernel* qk_training_avx2() { return training_kernels; }
