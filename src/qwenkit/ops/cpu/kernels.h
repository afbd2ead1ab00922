// All kernels of one instruction set, in the order of `Kind`. Included by one file for each set, compiled with its flags.
#pragma once
#include "attention.h"
#include "cache.h"
#include "elementwise.h"
#include "linear.h"
#include "sample.h"

static const Kernel kernels[QK_KINDS] = {embed,    rms_norm, quantize, linear,   linear_bf16, rotate, write_cache,
                                         attend,   silu_mul, add,      penalize, peaks,       sample};
