#include "kernels.h"

extern "C" const Kernel* qk_kernels_avx512() { return kernels; }
