// Attention over paged keys, flash-style: scores of 32 keys at a time, a running maximum and sum, never a whole row of scores.
// Decoding, chunked prefill and both in one batch are the same loop; all heads that share a key head read it together.
#pragma once
#include <cfloat>
#include <cmath>

#include "cache.h"
#include "program.h"
#include "simd.h"

namespace {

constexpr int QUERIES = 16;    // tokens of one row that share a pass over the keys
constexpr int KEYS = 32;       // keys that are scored together: two vectors of 16 lanes
constexpr int MAX_PASS = 128;  // tokens times heads of a pass
constexpr int PAD = 8;         // rows that fill up the last tile; they repeat the last row and are thrown away

struct Heads {
  int64_t heads, kv_heads, dim, block_size, max_blocks, window;
  float scale;
};

// A query for int8 and int4 keys: 16 bits as a coarse and a fine row of int8. The sums of products begin at `start`, which takes the
// 128 away that every int8 key has too much. `total` is the sum of the query's channels, for what is added to int4 keys.
struct QueryRow {
  float scale, total;
  int32_t start[2];
};

struct Pass {
  alignas(64) float sums[(MAX_PASS + PAD) * MAX_DIM];
  float largest[MAX_PASS + PAD], weight_sum[MAX_PASS + PAD];
  alignas(64) uint8_t keys[2][MAX_DIM * LANES * 4];  // lanes gathered from blocks that are not multiples of 16 long
  alignas(64) float values[KEYS * MAX_DIM];          // values of a tile as fp32
  QueryRow query_rows[MAX_PASS];
  alignas(64) int8_t queries[MAX_PASS * 2 * MAX_DIM];  // [row][coarse, fine][dim]
  float turns[MAX_PASS * MAX_DIM];                     // [row][angle]: what its cosine and its sine add to the row's scores
  int64_t angles[MAX_DIM / 2];                         // those whose pairs of channels have a bias
  int num_angles;
};

// What a tile of 32 positions reads. keys[half] has a vector of 16 lanes every `stride` bytes; scales are those of its lanes.
struct Tile {
  const uint8_t* keys[2];
  int64_t stride;
  alignas(64) float key_scale[KEYS], value_scale[KEYS];
  const float* values[KEYS];
  const float *cos[2], *sin[2];  // of the first angle at the positions of each half, with a key bias
};

template <int PACK>
inline void quantize_query(const float* q, int64_t dim, QueryRow& row, int8_t* out) {
  float largest = 0;
  for (int64_t d = 0; d < dim; d++) largest = std::fabs(q[d]) > largest ? std::fabs(q[d]) : largest;
  float nothing = 0;  // NaN if a value is not finite
  for (int64_t d = 0; d < dim; d++) nothing += q[d] - q[d];
  const float steps = 127.0f * 256.0f, inverse = largest > 0 && nothing == 0 ? steps / largest : 0;
  int32_t sums[2] = {0, 0};
  for (int64_t d = 0; d < dim; d++) {
    const int32_t whole = (int32_t)std::lrintf(q[d] * inverse), coarse = (whole + 128) >> 8;
    const int32_t fine = whole - coarse * 256 < 127 ? whole - coarse * 256 : 127;
    out[d] = (int8_t)coarse, out[dim + d] = (int8_t)fine;
    sums[0] += coarse, sums[1] += fine;
  }
  row.scale = largest / steps + nothing;
  row.total = row.scale * ((float)sums[0] * 256.0f + (float)sums[1]);
  row.start[0] = PACK == CACHE_INT8 ? -128 * sums[0] : 0, row.start[1] = PACK == CACHE_INT8 ? -128 * sums[1] : 0;
}

// With a key bias b: what queries times its rotation are, as weights of the cosine and the sine of each angle. Channels that do not
// rotate add the same to all of a query's scores, which changes no probability.
inline void turn_queries(const Heads& h, const KeyBias& bias, const float* b, const float* q, int64_t q_stride, int rows, Pass& pass) {
  const int64_t group = h.heads / h.kv_heads, half = bias.half;
  pass.num_angles = 0;
  for (int64_t d = 0; d < half; d++)
    if (b[d] != 0 || b[half + d] != 0) pass.angles[pass.num_angles++] = d;
  for (int r = 0; r < rows; r++) {
    const float* query = q + r / group * q_stride + r % group * h.dim;
    float* turns = pass.turns + r * 2 * half;
    for (int i = 0; i < pass.num_angles; i++) {
      const int64_t d = pass.angles[i];
      turns[2 * i] = h.scale * (query[d] * b[d] + query[half + d] * b[half + d]);
      turns[2 * i + 1] = h.scale * (query[half + d] * b[d] - query[d] * b[half + d]);
    }
  }
}

// Adds R queries times the rotated bias to their scores.
template <int R>
inline void add_bias(const Pass& pass, const KeyBias& bias, const int* rows, const Tile& tile, float (*scores)[KEYS]) {
  F16 low[R], high[R];
  const float* turns[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    low[r] = f_load(scores[r]), high[r] = f_load(scores[r] + LANES);
    turns[r] = pass.turns + rows[r] * 2 * bias.half;
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

// Scores of R queries against fp32 or bf16 keys.
template <int PACK, int R>
inline void score_floats(const float* const* queries, const Tile& tile, int64_t dim, float scale, float (*scores)[KEYS]) {
  F16 low[R], high[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) low[r] = high[r] = f_zero();
  const uint8_t *k0 = tile.keys[0], *k1 = tile.keys[1];
  for (int64_t d = 0; d < dim; d += PACK, k0 += tile.stride, k1 += tile.stride) {
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

// Scores of R queries against int8 or int4 keys; rows[r] is the place of a query in the pass.
template <int PACK, int R>
inline void score_bytes(const Pass& pass, const int* rows, const Tile& tile, int64_t dim, float scale, float (*scores)[KEYS]) {
  I16 coarse[2][R], fine[2][R];
  const int8_t* queries[R];
  QK_UNROLL
  for (int r = 0; r < R; r++) {
    queries[r] = pass.queries + rows[r] * 2 * dim;
    coarse[0][r] = coarse[1][r] = i_set1(pass.query_rows[rows[r]].start[0]);
    fine[0][r] = fine[1][r] = i_set1(pass.query_rows[rows[r]].start[1]);
  }
  const uint8_t *k0 = tile.keys[0], *k1 = tile.keys[1];
  for (int64_t d = 0; d < dim; d += PACK, k0 += tile.stride, k1 += tile.stride) {
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
    const I16 pair0 = i_load(tile.key_scale), pair1 = i_load(tile.key_scale + LANES);
    const F16 scale0 = f_mul(f_even_bf16(pair0), f_set1(scale)), scale1 = f_mul(f_even_bf16(pair1), f_set1(scale));
    const F16 offset0 = f_mul(f_odd_bf16(pair0), f_set1(scale)), offset1 = f_mul(f_odd_bf16(pair1), f_set1(scale));
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const QueryRow& row = pass.query_rows[rows[r]];
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
    const F16 step = f_set1(pass.query_rows[rows[r]].scale), steps = f_set1(256.0f);
    f_store(scores[r], f_mul(f_mul(f_fma(f_of_i(coarse[0][r]), steps, f_of_i(fine[0][r])), step), scale0));
    f_store(scores[r] + LANES, f_mul(f_mul(f_fma(f_of_i(coarse[1][r]), steps, f_of_i(fine[1][r])), step), scale1));
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

// Rows `first` .. `first + R` of a pass against the keys from position `start`. A row is one head of one token.
template <int PACK, int R>
inline void attend_rows(const Heads& h, const KeyBias* bias, Pass& pass, const Tile& tile, int first, int rows, const float* q,
                        int64_t q_stride, int64_t start, int64_t first_position) {
  const int64_t group = h.heads / h.kv_heads, dim = h.dim;
  int row_of[R];
  float* sums[R];
  float corrections[R];
  alignas(64) float scores[R][KEYS];
  for (int r = 0; r < R; r++) {
    row_of[r] = first + r < rows ? first + r : rows - 1;
    sums[r] = pass.sums + (first + r) * dim;
  }
  if (PACK >= CACHE_INT8) {
    constexpr int PART = R < 4 ? R : 4;
    for (int r = 0; r < R; r += PART) {
      score_bytes<PACK, PART>(pass, row_of + r, tile, dim, h.scale, scores + r);
      if (bias) add_bias<PART>(pass, *bias, row_of + r, tile, scores + r);
    }
  } else {
    const float* queries[R];
    for (int r = 0; r < R; r++) queries[r] = q + row_of[r] / group * q_stride + row_of[r] % group * dim;
    score_floats<PACK, R>(queries, tile, dim, h.scale, scores);
  }
  for (int r = 0; r < R; r++) {
    const int64_t position = first_position + row_of[r] / group;
    const int64_t last = position - start, before = h.window > 0 ? position - h.window - start : -1;
    const bool edge = last < KEYS - 1 || before >= 0;  // keys after `last`, and up to `before`, are hidden from this row
    if (edge)
      for (int j = 0; j < KEYS; j++)
        if (j > last || j <= before) scores[r][j] = -INFINITY;
    float& largest = pass.largest[first + r];
    const float highest = f_hmax(f_max(f_load(scores[r]), f_load(scores[r] + LANES)));
    const float now = highest > largest ? highest : largest;
    if (now == -INFINITY) {  // nothing visible yet: exp(-inf + inf) would make a NaN of it
      for (int j = 0; j < KEYS; j++) scores[r][j] = 0;
      corrections[r] = 1;
      continue;
    }
    F16 weight0 = f_exp(f_sub(f_load(scores[r]), f_set1(now))), weight1 = f_exp(f_sub(f_load(scores[r] + LANES), f_set1(now)));
    if (edge) {  // e^-inf is not quite 0 here
      f_store(scores[r], weight0);
      f_store(scores[r] + LANES, weight1);
      for (int j = 0; j < KEYS; j++)
        if (j > last || j <= before) scores[r][j] = 0;
      weight0 = f_load(scores[r]), weight1 = f_load(scores[r] + LANES);
    }
    corrections[r] = largest == now ? 1.0f : std::exp(largest - now);
    largest = now;
    pass.weight_sum[first + r] = pass.weight_sum[first + r] * corrections[r] + f_sum(f_add(weight0, weight1));
    if (PACK == CACHE_INT8) {
      weight0 = f_mul(weight0, f_load(tile.value_scale));
      weight1 = f_mul(weight1, f_load(tile.value_scale + LANES));
    }
    f_store(scores[r], weight0);
    f_store(scores[r] + LANES, weight1);
  }
  if (R == 8) {
    add_all_values<4>(sums, corrections, scores, tile.values, dim);
    add_all_values<4>(sums + 4 % R, corrections + 4 % R, scores + 4 % R, tile.values, dim);
  } else {
    add_all_values<R>(sums, corrections, scores, tile.values, dim);
  }
}

// Finds the positions start .. start + 31 of a request. Those beyond `last` are never looked at as values (memory that was never
// written may hold NaN, and 0 times NaN is NaN): they repeat `last`, and the caller hides them from every row.
template <int PACK>
inline void open_tile(const Cache& cache, const int32_t* table, int64_t kv_head, int64_t start, int64_t last, Pass& pass, Tile& tile) {
  const int64_t size = cache.block_size, dim = cache.dim;
  for (int half = 0; half < 2; half++) {
    const int64_t from = start + half * LANES <= last ? start + half * LANES : start;
    const int64_t block = from / size, inside = from % size;
    if (size % LANES == 0) {
      tile.keys[half] = cache.key_lane(table[block], kv_head, inside);
      tile.stride = size * 4;
      if (PACK >= CACHE_INT8)
        f_store(tile.key_scale + half * LANES, f_load(cache.key_scale + cache.head_of(table[block], kv_head) * size + inside));
    } else {
      tile.keys[half] = pass.keys[half];
      tile.stride = LANES * 4;
      for (int j = 0; j < LANES; j++) {
        const int64_t position = from + j < last ? from + j : last, at = table[position / size];
        const uint8_t* lane = cache.key_lane(at, kv_head, position % size);
        for (int64_t d = 0; d < dim / PACK; d++) memcpy(pass.keys[half] + (d * LANES + j) * 4, lane + d * size * 4, 4);
        if (PACK >= CACHE_INT8) tile.key_scale[half * LANES + j] = cache.key_scale[cache.head_of(at, kv_head) * size + position % size];
      }
    }
  }
  int64_t position = start, block = start / size, inside = start % size;
  for (int j = 0; j < KEYS; j++) {
    const uint8_t* row = cache.value_row(table[block], kv_head, inside);
    if (PACK == CACHE_FP32) {
      tile.values[j] = (const float*)row;
    } else {
      tile.values[j] = pass.values + j * dim;
      const float* scale = cache.value_scale + cache.head_of(table[block], kv_head) * size + inside;
      if (PACK == CACHE_INT4) widen_nibbles(row, (const uint8_t*)scale, pass.values + j * dim, dim);
      else widen<PACK>(row, pass.values + j * dim, dim);
      if (PACK == CACHE_INT8) tile.value_scale[j] = *scale;
    }
    if (position < last) {
      position++;
      if (++inside == size) inside = 0, block++;
    }
  }
}

// Ask for the keys and values of the blocks that the positions start .. start + 31 begin in.
inline void prefetch_tile(const Cache& cache, const int32_t* table, int64_t kv_head, int64_t start, int64_t last) {
  for (int64_t from = start; from <= last && from < start + KEYS; from += cache.block_size) {
    const int64_t block = cache.head_of(table[from / cache.block_size], kv_head) * cache.head_bytes();
    for (int64_t byte = 0; byte < cache.head_bytes(); byte += 64) {
      __builtin_prefetch(cache.keys + block + byte);
      __builtin_prefetch(cache.values + block + byte);
    }
  }
}

template <int PACK>
inline void attend_pass(const Heads& h, const Cache& cache, const KeyBias* bias, int64_t first_place, const float* q, int64_t q_stride,
                        float* out, const int32_t* table, int64_t kv_head, int64_t first_position, int tokens) {
  static thread_local Pass pass;
  const int64_t group = h.heads / h.kv_heads, dim = h.dim;
  const int rows = (int)(tokens * group);
  for (int r = 0; r < rows + PAD; r++) pass.largest[r] = -INFINITY, pass.weight_sum[r] = 0;
  memset(pass.sums, 0, (rows + PAD) * dim * sizeof(float));
  if (PACK >= CACHE_INT8)
    for (int r = 0; r < rows; r++)
      quantize_query<PACK>(q + r / group * q_stride + r % group * dim, dim, pass.query_rows[r], pass.queries + r * 2 * dim);
  if (bias) turn_queries(h, *bias, bias->bias + kv_head * dim, q, q_stride, rows, pass);
  const int64_t last_position = first_position + tokens - 1;
  const int64_t start_at = h.window > 0 && first_position >= h.window ? first_position - h.window + 1 : 0;
  Tile tile;
  for (int64_t start = start_at / KEYS * KEYS; start <= last_position; start += KEYS) {
    prefetch_tile(cache, table, kv_head, start + KEYS, last_position);
    open_tile<PACK>(cache, table, kv_head, start, last_position, pass, tile);
    for (int half = 0; bias && half < 2; half++) {
      tile.cos[half] = bias->table + first_place + start + half * LANES;
      tile.sin[half] = tile.cos[half] + bias->half * bias->length;
    }
    int r = start > first_position ? (int)((start - first_position) * group) : 0;  // earlier tokens see none of these keys
    for (; r + 4 < rows; r += 8) attend_rows<PACK, 8>(h, bias, pass, tile, r, rows, q, q_stride, start, first_position);
    for (; r + 1 < rows; r += 4) attend_rows<PACK, 4>(h, bias, pass, tile, r, rows, q, q_stride, start, first_position);
    for (; r < rows; r++) attend_rows<PACK, 1>(h, bias, pass, tile, r, rows, q, q_stride, start, first_position);
  }
  for (int r = 0; r < rows; r++) {
    float* to = out + r / group * q_stride + r % group * dim;
    const float inverse = 1.0f / pass.weight_sum[r];
    for (int64_t d = 0; d < dim; d++) to[d] = pass.sums[r * dim + d] * inverse;
  }
}

template <int PACK>
inline void attend_all(const Op& op, const Heads& h, const Cache& cache, int thread, int threads) {
  const KeyBias* bias = PACK >= CACHE_INT8 ? (const KeyBias*)op.p[9] : nullptr;
  const int64_t *starts = (const int64_t*)op.p[7], *lengths = (const int64_t*)op.p[8];
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
        const int64_t first_place = bias ? bias->places[starts[row]] - history : 0;
        attend_pass<PACK>(h, cache, bias, first_place, (const float*)op.p[1] + at, q_stride, (float*)op.p[0] + at,
                          (const int32_t*)op.p[6] + row * h.max_blocks, kv_head, history + from, count);
      }
  }
}

// p: out, q, keys, values, key scales, value scales, block tables (int32), query starts (int64, rows + 1), context lengths (int64),
// KeyBias (as five int64, or null); n: rows, heads, kv_heads, head_dim, block_size, blocks in a table, window (0: none), pack; x: scale of the scores.
// q and out are [tokens][heads][head_dim].
void attend(const Op& op, int thread, int threads) {
  const Heads h = {op.n[1], op.n[2], op.n[3], op.n[4], op.n[5], op.n[6], (float)op.x};
  const Cache cache = {(uint8_t*)op.p[2], (uint8_t*)op.p[3], (float*)op.p[4], (float*)op.p[5], h.kv_heads, h.dim, h.block_size, (int)op.n[7]};
  if (cache.pack == CACHE_FP32) attend_all<CACHE_FP32>(op, h, cache, thread, threads);
  else if (cache.pack == CACHE_BF16) attend_all<CACHE_BF16>(op, h, cache, thread, threads);
  else if (cache.pack == CACHE_INT4) attend_all<CACHE_INT4>(op, h, cache, thread, threads);
  else attend_all<CACHE_INT8>(op, h, cache, thread, threads);
}

}  // namespace
