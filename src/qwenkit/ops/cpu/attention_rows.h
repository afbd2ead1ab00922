// Queries against a tile: their scores, the weights these become, and the weighted values, which are added to what the rows have so
// far. A row is one head of one token.
#pragma once
#include <cfloat>
#include <cmath>

#include "attention_tile.h"

namespace {

constexpr int INTO_L2 = 2;  // for __builtin_prefetch: a load to L1 would keep one of few places until memory answers

// Ask for line `line` of the keys or values ahead; a half has as many lines of them as a key has vectors.
inline void prefetch_keys(const Tile& tile, int64_t line) {
  __builtin_prefetch(tile.keys_ahead[0] + line * tile.stride, 0, INTO_L2);
  __builtin_prefetch(tile.keys_ahead[1] + line * tile.stride, 0, INTO_L2);
}

inline void prefetch_values(const Tile& tile, int64_t line) {
  __builtin_prefetch(tile.values_ahead[0] + line * 64, 0, INTO_L2);
  __builtin_prefetch(tile.values_ahead[1] + line * 64, 0, INTO_L2);
}

// Scores of R queries against fp32 or bf16 keys.
template <int PACK, int R>
QK_NOINLINE void score_floats(const float* const* queries, const Tile& tile, int64_t dim, float scale, float (*scores)[KEYS]) {
  F16 low[R], high[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) low[r] = high[r] = f_zero();
  const uint8_t *k0 = tile.keys[0], *k1 = tile.keys[1];
  for (int64_t d = 0; d < dim; d += PACK, k0 += tile.stride, k1 += tile.stride) {
    prefetch_keys(tile, d / PACK);
    prefetch_values(tile, d / PACK);
    if (PACK == 1) {
      const F16 key0 = f_load((const float*)k0), key1 = f_load((const float*)k1);
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        const F16 query = f_set1(queries[r][d]);
        low[r] = f_fma(query, key0, low[r]);
        high[r] = f_fma(query, key1, high[r]);
      }
    } else {
      const I16 pair0 = i_load(k0), pair1 = i_load(k1);
      const F16 even0 = f_even_bf16(pair0), odd0 = f_odd_bf16(pair0), even1 = f_even_bf16(pair1), odd1 = f_odd_bf16(pair1);
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        const F16 even = f_set1(queries[r][d]), odd = f_set1(queries[r][d + 1]);
        low[r] = f_fma(odd, odd0, f_fma(even, even0, low[r]));
        high[r] = f_fma(odd, odd1, f_fma(even, even1, high[r]));
      }
    }
  }
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    f_store(scores[r], f_mul(low[r], f_set1(scale)));
    f_store(scores[r] + LANES, f_mul(high[r], f_set1(scale)));
  }
}

// Adds R queries times the rotated bias to their scores.
template <int R>
QK_NOINLINE void add_bias(const Pass& pass, const KeyBias& bias, int first, const Tile& tile, float (*scores)[KEYS]) {
  F16 low[R], high[R];
  const float* turns[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    low[r] = f_load(scores[r]), high[r] = f_load(scores[r] + LANES);
    turns[r] = pass.turns + (first + r) * 2 * bias.half;
  }
  for (int i = 0; i < pass.num_angles; i++) {
    const int64_t at = pass.angles[i] * bias.length;
    const F16 cos0 = f_load(tile.cos[0] + at), cos1 = f_load(tile.cos[1] + at);
    const F16 sin0 = f_load(tile.sin[0] + at), sin1 = f_load(tile.sin[1] + at);
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const F16 a = f_set1(turns[r][2 * i]), b = f_set1(turns[r][2 * i + 1]);
      low[r] = f_fma(b, sin0, f_fma(a, cos0, low[r]));
      high[r] = f_fma(b, sin1, f_fma(a, cos1, high[r]));
    }
  }
  QK_UNROLL
  for (int r = 0; r < R; r++) f_store(scores[r], low[r]), f_store(scores[r] + LANES, high[r]);
}

// Scores of R queries, from the `first` of a pass, against int8 or int4 keys.
template <int PACK, int R>
QK_NOINLINE void score_bytes(const Pass& pass, int first, const Tile& tile, int64_t dim, float scale, float (*scores)[KEYS]) {
  I16 coarse[2][R], fine[2][R];
  const int8_t* queries[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    queries[r] = pass.queries + (first + r) * 2 * dim;
    coarse[0][r] = coarse[1][r] = i_set1(pass.query_rows[first + r].start[0]);
    fine[0][r] = fine[1][r] = i_set1(pass.query_rows[first + r].start[1]);
  }
  const uint8_t *k0 = tile.keys[0], *k1 = tile.keys[1];
  for (int64_t d = 0; d < dim; d += PACK, k0 += tile.stride, k1 += tile.stride) {
    prefetch_keys(tile, d / PACK);
    if (!multiplies_bytes<PACK>(dim)) prefetch_values(tile, d / PACK);
    const I16 lanes0 = i_load(k0), lanes1 = i_load(k1);
    QK_UNROLL
    for (int part = 0; part < PACK / 4; part++) {
      const I16 key0 = PACK == CACHE_INT8 ? lanes0 : part ? i_high_nibbles(lanes0) : i_low_nibbles(lanes0);
      const I16 key1 = PACK == CACHE_INT8 ? lanes1 : part ? i_high_nibbles(lanes1) : i_low_nibbles(lanes1);
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        const I16 high = i_broadcast(queries[r] + d + part * 4), low = i_broadcast(queries[r] + dim + d + part * 4);
        coarse[0][r] = i_dot(coarse[0][r], key0, high);
        coarse[1][r] = i_dot(coarse[1][r], key1, high);
        fine[0][r] = i_dot(fine[0][r], key0, low);
        fine[1][r] = i_dot(fine[1][r], key1, low);
      }
    }
  }
  if (PACK == CACHE_INT4) {
    const I16 pair0 = i_load(tile.key_pairs), pair1 = i_load(tile.key_pairs + 2 * LANES);
    const F16 scale0 = f_mul(f_even_bf16(pair0), f_set1(scale)), scale1 = f_mul(f_even_bf16(pair1), f_set1(scale));
    const F16 offset0 = f_mul(f_odd_bf16(pair0), f_set1(scale)), offset1 = f_mul(f_odd_bf16(pair1), f_set1(scale));
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const QueryRow& row = pass.query_rows[first + r];
      const F16 step = f_set1(row.scale), steps = f_set1(256.0f), total = f_set1(row.total);
      const F16 sum0 = f_mul(f_fma(f_of_i(coarse[0][r]), steps, f_of_i(fine[0][r])), step);
      const F16 sum1 = f_mul(f_fma(f_of_i(coarse[1][r]), steps, f_of_i(fine[1][r])), step);
      f_store(scores[r], f_fma(sum0, scale0, f_mul(total, offset0)));
      f_store(scores[r] + LANES, f_fma(sum1, scale1, f_mul(total, offset1)));
    }
    return;
  }
  const F16 scale0 = f_mul(f_load(tile.key_scale), f_set1(scale)), scale1 = f_mul(f_load(tile.key_scale + LANES), f_set1(scale));
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    const F16 step = f_set1(pass.query_rows[first + r].scale), steps = f_set1(256.0f);
    f_store(scores[r], f_mul(f_mul(f_fma(f_of_i(coarse[0][r]), steps, f_of_i(fine[0][r])), step), scale0));
    f_store(scores[r] + LANES, f_mul(f_mul(f_fma(f_of_i(coarse[1][r]), steps, f_of_i(fine[1][r])), step), scale1));
  }
}

// For R rows: what they have so far times its correction, plus the values weighted by their scores, V vectors of 16 at a time.
template <int R, int V>
QK_NOINLINE void add_values(float* const* rows, const float* corrections, const float (*weights)[KEYS], const Tile& tile, int64_t dim, int64_t d) {
  F16 sums[R][V];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    QK_UNROLL
    for (int v = 0; v < V; v++) sums[r][v] = f_mul(f_load(rows[r] + d + v * LANES), f_set1(corrections[r]));
  }
  for (int half = 0; half < 2; half++) {
    const float* values = tile.values[half] + d;
    for (int j = half * LANES; j < (half + 1) * LANES; j++, values += dim) {
      F16 value[V];
      QK_UNROLL
      for (int v = 0; v < V; v++) value[v] = f_load(values + v * LANES);
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        const F16 weight = f_set1(weights[r][j]);
        QK_UNROLL
        for (int v = 0; v < V; v++) sums[r][v] = f_fma(weight, value[v], sums[r][v]);
      }
    }
  }
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    QK_UNROLL
    for (int v = 0; v < V; v++) f_store(rows[r] + d + v * LANES, sums[r][v]);
  }
}

template <int R>
inline void add_all_values(float* const* rows, const float* corrections, const float (*weights)[KEYS], const Tile& tile, int64_t dim) {
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) add_values<R, 4>(rows, corrections, weights, tile, dim, d);
  for (; d + 16 <= dim; d += 16) add_values<R, 1>(rows, corrections, weights, tile, dim, d);
  for (; d < dim; d++)
    for (int r = 0; r < R; r++) {
      float sum = rows[r][d] * corrections[r];
      for (int j = 0; j < KEYS; j++) sum += weights[r][j] * tile.values[j / LANES][j % LANES * dim + d];
      rows[r][d] = sum;
    }
}

// The weights of one row for byte values, in a tile's steps.
struct ByteWeights {
  alignas(64) uint8_t of[KEYS];
};

// For R rows: what they have so far times its correction, plus the weighted int8 values times `scales`, V vectors of 16 at a time.
template <int R, int V>
QK_NOINLINE void add_bytes(float* const* rows, const float* corrections, const float* scales, const ByteWeights* weights, const Tile& tile,
                           int64_t dim, int64_t d) {
  I16 sums[R][V];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    QK_UNROLL
    for (int v = 0; v < V; v++) sums[r][v] = i_set1(0);
  }
  for (int j = 0; j < KEYS; j += 4) {
    const int8_t* values = tile.bytes[j / LANES] + (j % LANES * dim + 4 * d);
    prefetch_values(tile, d / 4 + j / 4);
    I16 value[V];
    QK_UNROLL
    for (int v = 0; v < V; v++) value[v] = i_load(values + v * 64);
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const I16 four = i_broadcast(weights[r].of + j);
      QK_UNROLL
      for (int v = 0; v < V; v++) sums[r][v] = i_dot(sums[r][v], four, value[v]);
    }
  }
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    QK_UNROLL
    for (int v = 0; v < V; v++) {
      float* sum = rows[r] + d + v * LANES;
      f_store(sum, f_fma(f_of_i(sums[r][v]), f_set1(scales[r]), f_mul(f_load(sum), f_set1(corrections[r]))));
    }
  }
}

template <int R>
inline void add_all_bytes(float* const* rows, const float* corrections, const float* scales, const ByteWeights* weights, const Tile& tile,
                          int64_t dim) {
  int64_t d = 0;
  for (; d + 32 <= dim; d += 32) add_bytes<R, 2>(rows, corrections, scales, weights, tile, dim, d);
  for (; d < dim; d += 16) add_bytes<R, 1>(rows, corrections, scales, weights, tile, dim, d);
}

// Calls does(count, r) for R rows in fours, and last for those that are left: more sums than four rows have do not fit the registers.
template <int R, class Does>
inline void by_fours(Does does) {
  for (int r = 0; r + 4 <= R; r += 4) does(Count<4>(), r);
  if constexpr (R % 4 > 0) does(Count<R % 4>(), R / 4 * 4);
}

// Rows `first` .. `first + R` of a pass against the keys from position `start`. A row is one head of one token.
template <int PACK, int R>
inline void attend_rows(const Heads& h, const KeyBias* bias, Pass& pass, const Tile& tile, int first, int64_t start, int64_t first_position) {
  const int64_t dim = h.dim;
  float* sums[R];
  alignas(64) float scores[R][KEYS];
  ByteWeights byte_weights[R];
  const bool bytes = multiplies_bytes<PACK>(dim);
  for (int r = 0; r < R; r++) sums[r] = pass.sums + (first + r) * dim;
  if (PACK >= CACHE_INT8) {
    by_fours<R>([&](auto count, int r) {
      score_bytes<PACK, count.value>(pass, first + r, tile, dim, h.scale, scores + r);
      if (bias) add_bias<count.value>(pass, *bias, first + r, tile, scores + r);
    });
  } else {
    score_floats<PACK, R>(pass.query_of + first, tile, dim, h.scale, scores);
  }
  alignas(64) float highest[LANES], scales[LANES], corrections[LANES];
  bool edge[R];
  for (int r = 0; r < R; r++) {
    const int64_t position = first_position + pass.token_of[first + r];
    const int64_t last = position - start, before = h.window > 0 ? position - h.window - start : -1;
    edge[r] = last < KEYS - 1 || before >= 0;  // keys after `last`, and up to `before`, are hidden from this row
    if (edge[r])
      for (int j = 0; j < KEYS; j++)
        if (j > last || j <= before) scores[r][j] = -INFINITY;
    highest[r] = f_hmax(f_max(f_load(scores[r]), f_load(scores[r] + LANES)));
  }
  // Weights are relative to the tile's own peak. Then, of what was and what comes, one keeps its size and the other shrinks. Where
  // nothing is visible yet both are -inf, and -inf + inf would be NaN: FLT_MAX stands in for infinity.
  for (int r = R; r < LANES; r++) highest[r] = 0;
  const F16 was = f_load(pass.largest + first), comes = f_max(f_load(highest), f_set1(-FLT_MAX)), now = f_max(was, comes);
  f_store(corrections, f_exp2(f_sub(was, now)));
  f_store(scales, f_exp2(f_sub(comes, now)));
  f_store(highest, comes);
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    const F16 peak = f_set1(highest[r]), hidden = f_set1(-FLT_MAX), score0 = f_load(scores[r]), score1 = f_load(scores[r] + LANES);
    F16 weight0 = f_exp2(f_sub(score0, peak)), weight1 = f_exp2(f_sub(score1, peak));
    if (edge[r]) weight0 = f_if(score0, hidden, weight0), weight1 = f_if(score1, hidden, weight1);  // 2^-inf is not quite 0 here
    float* sum = pass.weight_sums + (first + r) * LANES;
    f_store(sum, f_fma(f_load(sum), f_set1(corrections[r]), f_mul(f_add(weight0, weight1), f_set1(scales[r]))));
    if (bytes) {
      ByteSteps steps = tile.steps;
      if (edge[r]) steps = byte_steps(f_if(score0, hidden, f_load(tile.value_scale)), f_if(score1, hidden, f_load(tile.value_scale + LANES)));
      i_store_u8(byte_weights[r].of, i_of_f(f_mul(weight0, steps.of[0])));
      i_store_u8(byte_weights[r].of + LANES, i_of_f(f_mul(weight1, steps.of[1])));
      scales[r] *= steps.step;
    } else {
      if (PACK == CACHE_INT8) {
        weight0 = f_mul(weight0, f_load(tile.value_scale));
        weight1 = f_mul(weight1, f_load(tile.value_scale + LANES));
      }
      f_store(scores[r], f_mul(weight0, f_set1(scales[r])));
      f_store(scores[r] + LANES, f_mul(weight1, f_set1(scales[r])));
    }
  }
  for (int r = 0; r < R; r++) pass.largest[first + r] = pass.largest[first + r] > highest[r] ? pass.largest[first + r] : highest[r];
  by_fours<R>([&](auto count, int r) {
    if (bytes) add_all_bytes<count.value>(sums + r, corrections + r, scales + r, byte_weights + r, tile, dim);
    else add_all_values<count.value>(sums + r, corrections + r, scores + r, tile, dim);
  });
}

// The last rows of a head, up to R of them.
template <int PACK, int R>
inline void attend_last_rows(int rows, const Heads& h, const KeyBias* bias, Pass& pass, const Tile& tile, int first, int64_t start,
                             int64_t first_position) {
  if (rows == R) attend_rows<PACK, R>(h, bias, pass, tile, first, start, first_position);
  else if constexpr (R > 1) attend_last_rows<PACK, R - 1>(rows, h, bias, pass, tile, first, start, first_position);
}

}  // namespace
