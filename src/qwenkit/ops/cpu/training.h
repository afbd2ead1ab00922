// What training does between the linear layers, forwards and backwards. Rows are dealt to threads whole, so that results do not
// depend on their number. Included by one file for each instruction set, as kernels.h is.
#pragma once
#include <cmath>

#include "elementwise.h"
#include "training_kinds.h"

namespace {

// p: y, x, weight, added, total, inverse; n: rows, dim; x: eps. inverse[row] = 1 / rms(x), y = weight * (x * inverse); where
// `added` is given, total = x + added takes the place of x.
void rms_norm_forward(const Op& op, int thread, int threads) {
  const float* weight = (const float*)op.p[2];
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
    const float inverse = 1.0f / std::sqrt(sum / dim + (float)op.x);
    ((float*)op.p[5])[row] = inverse;
    const F16 i = f_set1(inverse);
    for (k = 0; k + 16 <= dim; k += 16) f_store(y + k, f_mul(f_load(weight + k), f_mul(f_load(x + k), i)));
    for (; k < dim; k++) y[k] = weight[k] * (x[k] * inverse);
  }
}

// p: dx, x, weight, inverse, dy, dtotal; n: rows, dim. With g = weight * dy: dx = inverse * g - x * inverse^3 * mean(g * x), and
// dtotal more where it is given.
void rms_norm_backward(const Op& op, int thread, int threads) {
  const float* weight = (const float*)op.p[2];
  const int64_t dim = op.n[1];
  const Share rows = share_of(op.n[0], 1, thread, threads);
  for (int64_t row = rows.first; row < rows.last; row++) {
    const float *x = (const float*)op.p[1] + row * dim, *dy = (const float*)op.p[4] + row * dim;
    const float* more = op.p[5] ? (const float*)op.p[5] + row * dim : nullptr;
    float* dx = (float*)op.p[0] + row * dim;
    const float inverse = ((const float*)op.p[3])[row];
    F16 products = f_zero();
    int64_t k = 0;
    for (; k + 16 <= dim; k += 16) products = f_fma(f_mul(f_load(weight + k), f_load(dy + k)), f_load(x + k), products);
    float product = f_sum(products);
    for (; k < dim; k++) product += weight[k] * dy[k] * x[k];
    const float along = -inverse * inverse * inverse * (product / dim);
    const F16 i = f_set1(inverse), a = f_set1(along);
    for (k = 0; k + 16 <= dim; k += 16) {
      const F16 d = f_fma(f_load(x + k), a, f_mul(f_mul(f_load(weight + k), f_load(dy + k)), i));
      f_store(dx + k, more ? f_add(d, f_load(more + k)) : d);
    }
    for (; k < dim; k++) dx[k] = x[k] * along + weight[k] * dy[k] * inverse + (more ? more[k] : 0.0f);
  }
}

inline F16 f_sigmoid(F16 x) { return f_div(f_set1(1.0f), f_add(f_set1(1.0f), f_exp(f_sub(f_zero(), x)))); }

// p: y, gate, up; n: count. y = silu(gate) * up
void silu_mul_forward(const Op& op, int thread, int threads) {
  float* y = (float*)op.p[0];
  const float *gate = (const float*)op.p[1], *up = (const float*)op.p[2];
  const Share share = share_of(op.n[0], 1024, thread, threads);
  int64_t k = share.first;
  for (; k + 16 <= share.last; k += 16) {
    const F16 g = f_load(gate + k);
    f_store(y + k, f_mul(f_mul(g, f_sigmoid(g)), f_load(up + k)));
  }
  for (; k < share.last; k++) y[k] = gate[k] / (1.0f + std::exp(-gate[k])) * up[k];
}

// p: dgate, dup, gate, up, dy; n: count. With s = sigmoid(gate): dup = dy * gate * s, dgate = dy * up * s * (1 + gate * (1 - s)).
void silu_mul_backward(const Op& op, int thread, int threads) {
  float *dgate = (float*)op.p[0], *dup = (float*)op.p[1];
  const float *gate = (const float*)op.p[2], *up = (const float*)op.p[3], *dy = (const float*)op.p[4];
  const Share share = share_of(op.n[0], 1024, thread, threads);
  const F16 one = f_set1(1.0f);
  int64_t k = share.first;
  for (; k + 16 <= share.last; k += 16) {
    const F16 g = f_load(gate + k), s = f_sigmoid(g), d = f_mul(f_load(dy + k), s);
    f_store(dup + k, f_mul(d, g));
    f_store(dgate + k, f_mul(f_mul(d, f_load(up + k)), f_fma(g, f_sub(one, s), one)));
  }
  for (; k < share.last; k++) {
    const float s = 1.0f / (1.0f + std::exp(-gate[k])), d = dy[k] * s;
    dup[k] = d * gate[k];
    dgate[k] = d * up[k] * (1.0f + gate[k] * (1.0f - s));
  }
}

// p: y, x, cos, sin; n: tokens, heads, head_dim, half, floats from token to token and from head to head of x; x: 1, or -1 to turn
// back. The first 2 * half channels of each head turn, channel j with j + half, the rest is copied.
void turn(const Op& op, int thread, int threads) {
  const int64_t heads = op.n[1], dim = op.n[2], half = op.n[3];
  const float way = (float)op.x;
  const F16 w = f_set1(way);
  const Share tokens = share_of(op.n[0], 1, thread, threads);
  for (int64_t token = tokens.first; token < tokens.last; token++) {
    const float *cos = (const float*)op.p[2] + token * half, *sin = (const float*)op.p[3] + token * half;
    for (int64_t head = 0; head < heads; head++) {
      const float* x = (const float*)op.p[1] + token * op.n[4] + head * op.n[5];
      float* y = (float*)op.p[0] + (token * heads + head) * dim;
      int64_t j = 0;
      for (; j + 16 <= half; j += 16) {
        const F16 a = f_load(x + j), b = f_load(x + half + j), c = f_load(cos + j), s = f_mul(f_load(sin + j), w);
        f_store(y + j, f_sub(f_mul(a, c), f_mul(b, s)));
        f_store(y + half + j, f_add(f_mul(b, c), f_mul(a, s)));
      }
      for (; j < half; j++) {
        const float a = x[j], b = x[half + j], c = cos[j], s = sin[j] * way;
        y[j] = a * c - b * s;
        y[half + j] = b * c + a * s;
      }
      for (j = 2 * half; j < dim; j++) y[j] = x[j];
    }
  }
}

// p: logits, targets (int64), losses; n: rows, vocabulary; x: 1 where the gradient is wanted. losses[row] = log(sum(exp(logits))) -
// logits[target]; the gradient softmax - onehot then takes the place of the logits, which else are left as they are.
void cross_entropy(const Op& op, int thread, int threads) {
  const int64_t vocabulary = op.n[1];
  const bool gradient = op.x != 0;
  const Share rows = share_of(op.n[0], 1, thread, threads);
  for (int64_t row = rows.first; row < rows.last; row++) {
    float* logits = (float*)op.p[0] + row * vocabulary;
    const int64_t target = ((const int64_t*)op.p[1])[row];
    F16 highest = f_set1(-INFINITY), nothing = f_zero();
    int64_t k = 0;
    for (; k + 16 <= vocabulary; k += 16) {
      const F16 v = f_load(logits + k);
      highest = f_max(highest, v);
      nothing = f_add(nothing, f_sub(v, v));  // NaN where a logit is not finite, which a maximum may hide
    }
    float most = f_hmax(highest), lost = f_sum(nothing);
    for (; k < vocabulary; k++) {
      most = logits[k] > most ? logits[k] : most;
      lost += logits[k] - logits[k];
    }
    const float wanted = logits[target] - most;
    const F16 m = f_set1(most);
    F16 sums = f_zero();
    for (k = 0; k + 16 <= vocabulary; k += 16) {
      const F16 e = f_exp(f_sub(f_load(logits + k), m));
      if (gradient) f_store(logits + k, e);
      sums = f_add(sums, e);
    }
    float sum = f_sum(sums);
    for (; k < vocabulary; k++) {
      const float e = std::exp(logits[k] - most);
      if (gradient) logits[k] = e;
      sum += e;
    }
    ((float*)op.p[2])[row] = std::log(sum) - wanted + lost;
    if (!gradient) continue;
    const float scale = 1.0f / sum + lost;
    const F16 s = f_set1(scale);
    for (k = 0; k + 16 <= vocabulary; k += 16) f_store(logits + k, f_mul(f_load(logits + k), s));
    for (; k < vocabulary; k++) logits[k] *= scale;
    logits[target] -= 1.0f;
  }
}

const Kernel training_kernels[QK_TRAINING_KINDS] = {rms_norm_forward,  rms_norm_backward, silu_mul_forward,
                                                    silu_mul_backward, turn,              cross_entropy};

}  // namespace
