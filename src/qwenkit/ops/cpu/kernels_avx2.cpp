#include "kernels.h"

extern "C" const Kernel* qk_kernels_avx2() { return kernels; }
