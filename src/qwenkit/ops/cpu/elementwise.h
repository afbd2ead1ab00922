// What stands between the linear layers: normalisation, quantization of activations, rotation, SiLU, addition, cache writes.
#pragma once
#include <cmath>

#include "program.h"
#include "simd.h"

namespace {

struct Share {
  int64_t first, last;
};
// Items are dealt in runs of `grain`: small work stays on one thread rather than paying for two caches.
inline Share share_of(int64_t items, int64_t grain, int thread, int threads) {
  const int64_t runs = (items + grain - 1) / grain;
  const int64_t first = runs * thread / threads * grain, last = runs * (thread + 1) / threads * grain;
  return {first < items ? first : items, last < items ? last : items};
}

// p: y, x, weight, added, total; n: rows, dim; x: eps. y = weight * x / rms(x); where `added` is given, total = x + added takes the
// place of x.
void rms_norm(const Op& op, int thread, int threads) {
  const float *weight = (const float*)op.p[2], eps = (float)op.x;
  const int64_t dim = op.n[1];
  const Share rows = share_of(op.n[0], 1, thread, threads);
  for (int64_t row = rows.first; row < rows.last; row++) {
    const float* x = (const float*)op.p[1] + row * dim;
    float* y = (float*)op.p[0] + row * dim;
    int64_t k = 0;
    if (op.p[3]) {
      const float* added = (const float*)op.p[3] + row * dim;
      float* total = (float*)op.p[4] + row * dim;
      for (; k + 16 <= dim; k += 16) f_store(total + k, f_add(f_load(x + k), f_load(added + k)));
      for (; k < dim; k++) total[k] = x[k] + added[k];
      x = total;
      k = 0;
    }
    F16 squares = f_zero();
    for (; k + 16 <= dim; k += 16) squares = f_fma(f_load(x + k), f_load(x + k), squares);
    float sum = f_sum(squares);
    for (; k < dim; k++) sum += x[k] * x[k];
    const float scale = 1.0f / std::sqrt(sum / dim + eps);
    const F16 s = f_set1(scale);
    for (k = 0; k + 16 <= dim; k += 16) f_store(y + k, f_mul(f_load(weight + k), f_mul(f_load(x + k), s)));
    for (; k < dim; k++) y[k] = weight[k] * (x[k] * scale);
  }
}

// One group of activations as int8: q, its scale and scale * (sum of q).
inline void store_group(const Op& op, int64_t row, int64_t group_index, const float* values, float scale) {
  const int64_t dim = op.n[1], group = op.n[2], at = row * (dim / group) + group_index;
  int8_t* q = (int8_t*)op.p[0] + row * dim + group_index * group;
  I16 total = i_set1(0);
  for (int64_t k = 0; k < group; k += 16) {
    const I16 rounded = i_of_f(f_load(values + k));
    total = i_add(total, rounded);
    i_store_i8(q + k, rounded);
  }
  ((float*)op.p[1])[at] = scale;
  ((float*)op.p[2])[at] = scale * (float)i_sum(total);
}

constexpr int64_t MAX_QUANTIZED_GROUP = 128;

// p: q, scale, sum, x; n: tokens, dim, group (a multiple of 16 up to 128 that divides dim), pairs. Symmetric, the largest value
// becomes 127. With pairs each token gives two rows, a coarse one and what it leaves in steps of 1/256: 16 bits in all.
// A value that is not finite makes its group's scale NaN, so that it is not lost.
void quantize(const Op& op, int thread, int threads) {
  const int64_t dim = op.n[1], group = op.n[2], groups = dim / group;
  const bool pairs = op.n[3];
  const float steps = pairs ? 127.0f * 256.0f : 127.0f;
  const Share items = share_of(op.n[0] * groups, 8, thread, threads);
  for (int64_t item = items.first; item < items.last; item++) {
    const int64_t token = item / groups, index = item % groups;
    const float* x = (const float*)op.p[3] + item * group;
    F16 largest = f_zero(), nothing = f_zero();
    for (int64_t k = 0; k < group; k += 16) {
      const F16 v = f_load(x + k);
      largest = f_max(largest, f_abs(v));
      nothing = f_add(nothing, f_sub(v, v));
    }
    const float scale = f_hmax(largest) / steps + f_sum(nothing);
    const F16 inverse = f_set1(scale > 0 ? 1.0f / scale : 0.0f);
    float coarse[MAX_QUANTIZED_GROUP], fine[MAX_QUANTIZED_GROUP];
    for (int64_t k = 0; k < group; k += 16) {
      const F16 whole = f_round(f_mul(f_load(x + k), inverse));
      const F16 high = pairs ? f_round(f_mul(whole, f_set1(1.0f / 256))) : whole;
      f_store(coarse + k, high);
      f_store(fine + k, f_min(f_set1(127.0f), f_sub(whole, f_mul(high, f_set1(256.0f)))));
    }
    if (pairs) {
      store_group(op, 2 * token, index, coarse, scale * 256);
      store_group(op, 2 * token + 1, index, fine, scale);
    } else {
      store_group(op, token, index, coarse, scale);
    }
  }
}

// p: y, x, cos, sin; n: tokens, heads, head_dim, half, row stride of x, row stride of y (both in floats); the first 2 * half
// channels of each head turn, channel j with j + half, the rest is copied.
void rotate(const Op& op, int thread, int threads) {
  const int64_t heads = op.n[1], dim = op.n[2], half = op.n[3];
  const Share tokens = share_of(op.n[0] * heads, 4, thread, threads);
  for (int64_t item = tokens.first; item < tokens.last; item++) {
    const int64_t token = item / heads, head = item % heads;
    const float* x = (const float*)op.p[1] + token * op.n[4] + head * dim;
    float* y = (float*)op.p[0] + token * op.n[5] + head * dim;
    const float *cos = (const float*)op.p[2] + token * half, *sin = (const float*)op.p[3] + token * half;
    int64_t j = 0;
    for (; j + 16 <= half; j += 16) {
      const F16 a = f_load(x + j), b = f_load(x + half + j), c = f_load(cos + j), s = f_load(sin + j);
      f_store(y + j, f_sub(f_mul(a, c), f_mul(b, s)));
      f_store(y + half + j, f_add(f_mul(b, c), f_mul(a, s)));
    }
    for (; j < half; j++) {
      const float a = x[j], b = x[half + j];
      y[j] = a * cos[j] - b * sin[j];
      y[half + j] = b * cos[j] + a * sin[j];
    }
    for (j = 2 * half; j < dim; j++) y[j] = x[j];
  }
}

// p: y, gate, up; n: count. y = silu(gate) * up
void silu_mul(const Op& op, int thread, int threads) {
  float* y = (float*)op.p[0];
  const float *gate = (const float*)op.p[1], *up = (const float*)op.p[2];
  const Share share = share_of(op.n[0], 1024, thread, threads);
  int64_t k = share.first;
  for (; k + 16 <= share.last; k += 16) {
    const F16 g = f_load(gate + k);
    const F16 sigmoid = f_div(f_set1(1.0f), f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g))));
    f_store(y + k, f_mul(f_mul(g, sigmoid), f_load(up + k)));
  }
  for (; k < share.last; k++) y[k] = gate[k] / (1.0f + std::exp(-gate[k])) * up[k];
}

// p: y, a, b; n: count. y = a + b
void add(const Op& op, int thread, int threads) {
  float* y = (float*)op.p[0];
  const float *a = (const float*)op.p[1], *b = (const float*)op.p[2];
  const Share share = share_of(op.n[0], 4096, thread, threads);
  int64_t k = share.first;
  for (; k + 16 <= share.last; k += 16) f_store(y + k, f_add(f_load(a + k), f_load(b + k)));
  for (; k < share.last; k++) y[k] = a[k] + b[k];
}

}  // namespace
