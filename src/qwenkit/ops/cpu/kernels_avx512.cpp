#include "kernels.h"
#include "training.h"

extern "C" const Kernel* qk_kernels_avx512() { return kernels; }
extern "C" const Kernel* qk_training_avx512() { return training_kernels; }
