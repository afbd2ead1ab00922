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

// Activations as int8: for each token and group its values q, a scale, and scale * (sum of q). Symmetric, the largest value becomes 127.
struct QuantizeTo {
  int8_t* q;
  float *scale, *sum;
  int64_t dim, group;  // the group is a multiple of 16 that divides dim

  int64_t groups() const { return dim / group; }
  int64_t grain() const { return group < 256 ? 256 / group : 1; }  // groups that are dealt together

  // One group, of values x. A value that is not finite makes the scale NaN, so that it is not lost.
  void quantize(int64_t token, int64_t index, const float* x) const {
    F16 largest = f_zero(), nothing = f_zero();
    for (int64_t k = 0; k < group; k += 16) {
      const F16 v = f_load(x + k);
      largest = f_max(largest, f_abs(v));
      nothing = f_add(nothing, f_sub(v, v));
    }
    const float step = f_hmax(largest) / 127.0f + f_sum(nothing);
    const F16 inverse = f_set1(step > 0 ? 1.0f / step : 0.0f);
    int8_t* to = q + token * dim + index * group;
    I16 total = i_set1(0);
    for (int64_t k = 0; k < group; k += 16) {
      const I16 rounded = i_of_f(f_mul(f_load(x + k), inverse));
      total = i_add(total, rounded);
      i_store_i8(to + k, rounded);
    }
    scale[token * groups() + index] = step;
    sum[token * groups() + index] = step * (float)i_sum(total);
  }
};

// p: q, scale, sum, x; n: tokens, dim, group
void quantize(const Op& op, int thread, int threads) {
  const QuantizeTo to = {(int8_t*)op.p[0], (float*)op.p[1], (float*)op.p[2], op.n[1], op.n[2]};
  const Share items = share_of(op.n[0] * to.groups(), to.grain(), thread, threads);
  for (int64_t item = items.first; item < items.last; item++)
    to.quantize(item / to.groups(), item % to.groups(), (const float*)op.p[3] + item * to.group);
}

// The mean square of x, or of total = x + added. The whole row is read, total is written from column `first` to `last` only: threads
// that share a row each need the mean of all of it.
inline float mean_square(const float* x, const float* added, float* total, int64_t dim, int64_t first, int64_t last) {
  F16 squares = f_zero();
  int64_t k = 0;
  for (; k + 16 <= dim; k += 16) {
    F16 v = f_load(x + k);
    if (added) {
      v = f_add(v, f_load(added + k));
      if (k >= first && k < last) f_store(total + k, v);
    }
    squares = f_fma(v, v, squares);
  }
  float sum = f_sum(squares);
  for (; k < dim; k++) {
    float v = x[k];
    if (added) {
      v += added[k];
      if (k >= first && k < last) total[k] = v;
    }
    sum += v * v;
  }
  return sum / dim;
}

// p: y, x, weight, added, total, q, scale, sum; n: rows, dim, group; x: eps. y = weight * x / rms(x); where `added` is given,
// total = x + added takes the place of x; where q is given, y is also quantized.
void rms_norm(const Op& op, int thread, int threads) {
  const float *weight = (const float*)op.p[2], eps = (float)op.x;
  const int64_t dim = op.n[1];
  const bool quantized = op.p[5] != nullptr;
  const QuantizeTo to = {(int8_t*)op.p[5], (float*)op.p[6], (float*)op.p[7], dim, quantized ? op.n[2] : dim};
  const int64_t parts = to.groups();  // of a row; threads may share one
  const Share items = share_of(op.n[0] * parts, quantized ? to.grain() : 1, thread, threads);
  for (int64_t item = items.first; item < items.last;) {
    const int64_t row = item / parts, begin = item % parts;
    const int64_t end = items.last - row * parts < parts ? items.last - row * parts : parts;
    const int64_t first = begin * to.group, last = end * to.group;
    const float* x = (const float*)op.p[1] + row * dim;
    const float* added = op.p[3] ? (const float*)op.p[3] + row * dim : nullptr;
    float* total = op.p[3] ? (float*)op.p[4] + row * dim : nullptr;
    float* y = (float*)op.p[0] + row * dim;
    const float scale = 1.0f / std::sqrt(mean_square(x, added, total, dim, first, last) + eps);
    if (added) x = total;
    int64_t k = first;
    for (; k + 16 <= last; k += 16) f_store(y + k, f_mul(f_load(weight + k), f_mul(f_load(x + k), f_set1(scale))));
    for (; k < last; k++) y[k] = weight[k] * (x[k] * scale);
    if (quantized)
      for (int64_t index = begin; index < end; index++) to.quantize(row, index, y + index * to.group);
    item = row * parts + end;
  }
}

// The first 2 * half channels of a head turn, channel j with j + half; the rest is copied.
inline void rotate_head(const float* x, const float* cos, const float* sin, float* y, int64_t dim, int64_t half) {
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

// p: y, x, cos, sin; n: tokens, heads, head_dim, half
void rotate(const Op& op, int thread, int threads) {
  const int64_t heads = op.n[1], dim = op.n[2], half = op.n[3];
  const Share items = share_of(op.n[0] * heads, 4, thread, threads);
  for (int64_t item = items.first; item < items.last; item++) {
    const float *cos = (const float*)op.p[2] + item / heads * half, *sin = (const float*)op.p[3] + item / heads * half;
    rotate_head((const float*)op.p[1] + item * dim, cos, sin, (float*)op.p[0] + item * dim, dim, half);
  }
}

inline void silu_mul_span(const float* gate, const float* up, float* y, int64_t first, int64_t last) {
  int64_t k = first;
  for (; k + 16 <= last; k += 16) {
    const F16 g = f_load(gate + k);
    const F16 sigmoid = f_div(f_set1(1.0f), f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), g))));
    f_store(y + k, f_mul(f_mul(g, sigmoid), f_load(up + k)));
  }
  for (; k < last; k++) y[k] = gate[k] / (1.0f + std::exp(-gate[k])) * up[k];
}

// p: y, gate, up, q, scale, sum; n: count, dim, group. y = silu(gate) * up; where q is given, y is also quantized.
void silu_mul(const Op& op, int thread, int threads) {
  const float *gate = (const float*)op.p[1], *up = (const float*)op.p[2];
  float* y = (float*)op.p[0];
  if (!op.p[3]) {
    const Share share = share_of(op.n[0], 1024, thread, threads);
    silu_mul_span(gate, up, y, share.first, share.last);
    return;
  }
  const QuantizeTo to = {(int8_t*)op.p[3], (float*)op.p[4], (float*)op.p[5], op.n[1], op.n[2]};
  const Share items = share_of(op.n[0] / to.group, to.grain(), thread, threads);
  silu_mul_span(gate, up, y, items.first * to.group, items.last * to.group);
  for (int64_t item = items.first; item < items.last; item++)
    to.quantize(item / to.groups(), item % to.groups(), y + item * to.group);
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
