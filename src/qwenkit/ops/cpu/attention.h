// Attention over paged keys, flash-style: scores of 32 keys at a time, a running maximum and sum, never a whole row of scores.
// Decoding, chunked prefill and both in one batch are the same loop; all heads that share a key head read it together.
#pragma once
#include <cfloat>
#include <cmath>

#include "program.h"
#include "simd.h"

namespace {

constexpr int QUERIES = 16;    // tokens of one row that share a pass over the keys
constexpr int KEYS = 32;       // keys that are scored together
constexpr int MAX_DIM = 256;   // largest head_dim
constexpr int MAX_PASS = 128;  // tokens times heads of a pass
constexpr int PAD = 8;         // rows that fill up the last tile; they repeat the last row and are thrown away

struct Heads {
  int64_t heads, kv_heads, dim, block_size, max_blocks, window;
  float scale;
};

// The keys of some positions as [dim][KEYS], so that lanes are positions.
inline void transpose_keys(const float* const* keys, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 16 <= dim; d += 16)
    for (int j = 0; j < KEYS; j += 16) {
      const float* rows[16];
      for (int i = 0; i < 16; i++) rows[i] = keys[j + i] + d;
      f_transpose16(rows, out + d * KEYS + j, KEYS);
    }
  for (; d < dim; d++)
    for (int j = 0; j < KEYS; j++) out[d * KEYS + j] = keys[j][d];
}

// Scores of R queries against the keys.
template <int R>
inline void score_rows(const float* const* queries, const float* transposed, int64_t dim, float scale, float (*scores)[KEYS]) {
  F16 low[R], high[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) low[r] = high[r] = f_zero();
  for (int64_t d = 0; d < dim; d++) {
    const F16 key0 = f_load(transposed + d * KEYS), key1 = f_load(transposed + d * KEYS + 16);
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const F16 query = f_set1(queries[r][d]);
      low[r] = f_fma(query, key0, low[r]);
      high[r] = f_fma(query, key1, high[r]);
    }
  }
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    f_store(scores[r], f_mul(low[r], f_set1(scale)));
    f_store(scores[r] + 16, f_mul(high[r], f_set1(scale)));
  }
}

// For R rows: what they have so far times its correction, plus the values weighted by their scores, V vectors of 16 at a time.
template <int R, int V>
inline void add_values(float* const* rows, const float* corrections, float (*weights)[KEYS], const float* const* values, int64_t d) {
  F16 sums[R][V];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    QK_UNROLL
    for (int v = 0; v < V; v++) sums[r][v] = f_mul(f_load(rows[r] + d + v * 16), f_set1(corrections[r]));
  }
  for (int j = 0; j < KEYS; j++) {
    F16 value[V];
    QK_UNROLL
    for (int v = 0; v < V; v++) value[v] = f_load(values[j] + d + v * 16);
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const F16 weight = f_set1(weights[r][j]);
      QK_UNROLL
      for (int v = 0; v < V; v++) sums[r][v] = f_fma(weight, value[v], sums[r][v]);
    }
  }
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    QK_UNROLL
    for (int v = 0; v < V; v++) f_store(rows[r] + d + v * 16, sums[r][v]);
  }
}

template <int R>
inline void add_all_values(float* const* rows, const float* corrections, float (*weights)[KEYS], const float* const* values, int64_t dim) {
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) add_values<R, 4>(rows, corrections, weights, values, d);
  for (; d + 16 <= dim; d += 16) add_values<R, 1>(rows, corrections, weights, values, d);
  for (; d < dim; d++)
    for (int r = 0; r < R; r++) {
      float sum = rows[r][d] * corrections[r];
      for (int j = 0; j < KEYS; j++) sum += weights[r][j] * values[j][d];
      rows[r][d] = sum;
    }
}

struct Pass {
  alignas(64) float sums[(MAX_PASS + PAD) * MAX_DIM];
  float largest[MAX_PASS + PAD], weight_sum[MAX_PASS + PAD];
  alignas(64) float transposed[MAX_DIM * KEYS];
};

// Rows `first` .. `first + R` of a pass against the keys from position `start`. A row is one head of one token.
template <int R>
inline void attend_rows(const Heads& h, Pass& pass, int first, int rows, const float* q, int64_t q_stride, const float* const* values,
                        int64_t start, int64_t first_position) {
  const int64_t group = h.heads / h.kv_heads, dim = h.dim;
  const float* queries[R];
  float* sums[R];
  float corrections[R];
  alignas(64) float scores[R][KEYS];
  for (int r = 0; r < R; r++) {
    const int64_t row = first + r < rows ? first + r : rows - 1;
    queries[r] = q + row / group * q_stride + row % group * dim;
    sums[r] = pass.sums + (first + r) * dim;
  }
  score_rows<R>(queries, pass.transposed, dim, h.scale, scores);
  for (int r = 0; r < R; r++) {
    const int64_t row = first + r < rows ? first + r : rows - 1;
    const int64_t position = first_position + row / group;
    const int64_t last = position - start, before = h.window > 0 ? position - h.window - start : -1;
    const bool edge = last < KEYS - 1 || before >= 0;  // keys after `last`, and up to `before`, are hidden from this row
    if (edge)
      for (int j = 0; j < KEYS; j++)
        if (j > last || j <= before) scores[r][j] = -INFINITY;
    float& largest = pass.largest[first + r];
    const float highest = f_hmax(f_max(f_load(scores[r]), f_load(scores[r] + 16)));
    const float now = highest > largest ? highest : largest;
    if (now == -INFINITY) {  // nothing visible yet: exp(-inf + inf) would make a NaN of it
      for (int j = 0; j < KEYS; j++) scores[r][j] = 0;
      corrections[r] = 1;
      continue;
    }
    F16 weight0 = f_exp(f_sub(f_load(scores[r]), f_set1(now))), weight1 = f_exp(f_sub(f_load(scores[r] + 16), f_set1(now)));
    f_store(scores[r], weight0);
    f_store(scores[r] + 16, weight1);
    if (edge) {  // e^-inf is not quite 0 here
      for (int j = 0; j < KEYS; j++)
        if (j > last || j <= before) scores[r][j] = 0;
      weight0 = f_load(scores[r]), weight1 = f_load(scores[r] + 16);
    }
    corrections[r] = largest == now ? 1.0f : std::exp(largest - now);
    largest = now;
    pass.weight_sum[first + r] = pass.weight_sum[first + r] * corrections[r] + f_sum(f_add(weight0, weight1));
  }
  if (R == 8) {
    add_all_values<4>(sums, corrections, scores, values, dim);
    add_all_values<4>(sums + 4 % R, corrections + 4 % R, scores + 4 % R, values, dim);
  } else {
    add_all_values<R>(sums, corrections, scores, values, dim);
  }
}

inline void attend_pass(const Heads& h, const float* q, int64_t q_stride, float* out, const float* keys, const float* values,
                        const int32_t* table, int64_t kv_head, int64_t first_position, int tokens) {
  static thread_local Pass pass;
  const int64_t group = h.heads / h.kv_heads, dim = h.dim, token_floats = h.kv_heads * dim;
  const int rows = (int)(tokens * group);
  for (int r = 0; r < rows + PAD; r++) pass.largest[r] = -INFINITY, pass.weight_sum[r] = 0;
  memset(pass.sums, 0, (rows + PAD) * dim * sizeof(float));
  const int64_t last_position = first_position + tokens - 1;
  const int64_t start_at = h.window > 0 && first_position >= h.window ? first_position - h.window + 1 : 0;
  // Where each position lies in the caches, walked without a division a key; positions beyond the last repeat it and are hidden
  // from every row.
  int64_t start = start_at / KEYS * KEYS, position = start, block = start / h.block_size, inside = start % h.block_size;
  int64_t here[KEYS], next[KEYS];
  const auto locate = [&](int64_t* offsets) {
    for (int j = 0; j < KEYS; j++) {
      offsets[j] = ((int64_t)table[block] * h.block_size + inside) * token_floats + kv_head * dim;
      if (position < last_position) {
        position++;
        if (++inside == h.block_size) inside = 0, block++;
      }
    }
  };
  locate(next);
  for (; start <= last_position; start += KEYS) {
    memcpy(here, next, sizeof(here));
    locate(next);
    const float *key_at[KEYS], *value_at[KEYS];
    for (int j = 0; j < KEYS; j++) {
      key_at[j] = keys + here[j];
      value_at[j] = values + here[j];
      for (int64_t d = 0; d < dim; d += 16) {
        __builtin_prefetch(keys + next[j] + d);
        __builtin_prefetch(values + next[j] + d);
      }
    }
    transpose_keys(key_at, dim, pass.transposed);
    int r = start > first_position ? (int)((start - first_position) * group) : 0;  // earlier tokens see none of these keys
    for (; r + 4 < rows; r += 8) attend_rows<8>(h, pass, r, rows, q, q_stride, value_at, start, first_position);
    for (; r + 1 < rows; r += 4) attend_rows<4>(h, pass, r, rows, q, q_stride, value_at, start, first_position);
    for (; r < rows; r++) attend_rows<1>(h, pass, r, rows, q, q_stride, value_at, start, first_position);
  }
  for (int r = 0; r < rows; r++) {
    float* to = out + r / group * q_stride + r % group * dim;
    const float inverse = 1.0f / pass.weight_sum[r];
    for (int64_t d = 0; d < dim; d++) to[d] = pass.sums[r * dim + d] * inverse;
  }
}

// p: out, q, key cache, value cache, block tables (int32), query starts (int64, rows + 1), context lengths (int64);
// n: rows, heads, kv_heads, head_dim, block_size, blocks in a table, window (0: none); x: scale of the scores.
// q and out are [tokens][heads][head_dim]; caches [blocks][block_size][kv_heads][head_dim].
void attend(const Op& op, int thread, int threads) {
  const Heads h = {op.n[1], op.n[2], op.n[3], op.n[4], op.n[5], op.n[6], (float)op.x};
  const int64_t *starts = (const int64_t*)op.p[5], *lengths = (const int64_t*)op.p[6];
  const int64_t group = h.heads / h.kv_heads, q_stride = h.heads * h.dim;
  int64_t step = MAX_PASS / group;
  if (step > QUERIES) step = QUERIES;
  int64_t item = 0;
  for (int64_t row = 0; row < op.n[0]; row++) {
    const int64_t tokens = starts[row + 1] - starts[row], history = lengths[row] - tokens;
    for (int64_t from = 0; from < tokens; from += step)
      for (int64_t kv_head = 0; kv_head < h.kv_heads; kv_head++, item++) {
        if (item % threads != thread) continue;
        const int count = (int)(from + step <= tokens ? step : tokens - from);
        const int64_t at = (starts[row] + from) * q_stride + kv_head * group * h.dim;
        attend_pass(h, (const float*)op.p[1] + at, q_stride, (float*)op.p[0] + at, (const float*)op.p[2], (const float*)op.p[3],
                    (const int32_t*)op.p[4] + row * h.max_blocks, kv_head, history + from, count);
      }
  }
}

}  // namespace
