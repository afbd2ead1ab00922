// A tile of attention: what 32 positions of one key head hold, ready to be multiplied with queries, and what a thread needs to do it.
#pragma once
#include <algorithm>

#include "cache.h"
#include "program.h"
#include "simd.h"

namespace {

constexpr int QUERIES = 16;    // tokens of one row that share a pass over the keys
constexpr int PART_KEYS = 256;  // sums begin anew after so many keys, and are then added up: parts can be computed by several threads
constexpr int KEYS = 32;       // keys that are scored together: two vectors of 16 lanes
constexpr int KEYS_AHEAD = 2 * KEYS;
constexpr int MAX_PASS = 128;  // rows of a pass: a head of a token each

constexpr double LOG2_E = 1.4426950408889634;

struct Heads {
  int64_t heads, kv_heads, dim, block_size, max_blocks, window;
  float scale;  // of scores, times LOG2_E: weights are powers of 2

  int64_t group() const { return heads / kv_heads; }  // that share a key head
};

// A query for int8 and int4 keys: 16 bits as a coarse and a fine row of int8. The sums of products begin at `start`, which takes the
// 128 away that every int8 key has too much. `total` is the sum of the query's channels, for what is added to int4 keys.
struct QueryRow {
  float scale, total;
  int32_t start[2];
};

struct Pass {
  alignas(64) float sums[MAX_PASS * MAX_DIM];
  alignas(64) float weight_sums[MAX_PASS * LANES];  // of each lane
  float largest[MAX_PASS + LANES];
  alignas(64) uint8_t keys[2][MAX_DIM * LANES * 4];  // lanes gathered from blocks that are not multiples of 16 long
  alignas(64) float values[KEYS * MAX_DIM];          // values of a tile as fp32, or as int8 gathered from such blocks
  alignas(64) int8_t bytes[2][LANES * MAX_DIM];
  const float* query_of[MAX_PASS];
  int token_of[MAX_PASS];
  QueryRow query_rows[MAX_PASS];
  alignas(64) int8_t queries[MAX_PASS * 2 * MAX_DIM];  // [row][coarse, fine][dim]
  float turns[MAX_PASS * MAX_DIM];                     // [row][angle]: what its cosine and its sine add to the row's scores
  int64_t angles[MAX_DIM / 2];                         // those whose pairs of channels have a bias
  int num_angles;
  float totals[MAX_PASS * (MAX_DIM + 2 * LANES)], row[MAX_DIM + 2 * LANES];  // accumulators, see store_row
};

// Weights of int8 values as bytes: what a weight of 1 is at each position in steps, and what a step is. 255 steps are a weight of 1 for
// the largest scale among those that a row sees, so that what others see changes nothing.
struct ByteSteps {
  F16 of[2];
  float step;
};

inline ByteSteps byte_steps(F16 scale0, F16 scale1) {
  const float largest = f_hmax(f_max(scale0, scale1));
  const F16 steps = f_set1(largest > 0 ? 255.0f / largest : 0);
  return {{f_mul(scale0, steps), f_mul(scale1, steps)}, largest / 255.0f + 0.0f * f_sum(f_add(scale0, scale1))};  // NaN if a scale is
}

// What a tile of 32 positions reads, in two halves of 16: keys[half] has a vector of 16 lanes every `stride` bytes, values[half] the
// rows of these positions one after the other; scales are those of the lanes.
struct Tile {
  const uint8_t* keys[2];
  const float* values[2];
  const uint8_t *keys_ahead[2], *values_ahead[2];  // see look_ahead
  int64_t stride;
  alignas(64) float key_scale[KEYS], value_scale[KEYS];  // of int8
  alignas(64) uint16_t key_pairs[2 * KEYS];              // of int4: scale, offset
  const int8_t* bytes[2];  // int8 values of both halves, [4][dim][4], where `multiplies_bytes`, and their weights for who sees them all
  ByteSteps steps;
  const float *cos[2], *sin[2];  // of the first angle at the positions of each half, with a key bias
};

// int8 values are multiplied as they are, by weights of 8 bits; other shapes of them go through fp32.
template <int PACK>
inline bool multiplies_bytes(int64_t dim) {
  return PACK == CACHE_INT8 && dim % LANES == 0;
}

template <int PACK>
inline void quantize_query(const float* q, int64_t dim, QueryRow& row, int8_t* out) {
  alignas(64) float padded[MAX_DIM];
  alignas(64) int8_t coarse[MAX_DIM], fine[MAX_DIM];
  const int64_t vectors = (dim + LANES - 1) / LANES * LANES;
  memcpy(padded, q, dim * sizeof(float));
  for (int64_t d = dim; d < vectors; d++) padded[d] = 0;
  F16 largest = f_zero(), nothing = f_zero();  // NaN if a value is not finite
  for (int64_t d = 0; d < vectors; d += LANES) {
    const F16 x = f_load(padded + d);
    largest = f_max(largest, f_abs(x));
    nothing = f_add(nothing, f_sub(x, x));
  }
  row.scale = f_hmax(largest) / (127.0f * 256.0f) + f_sum(nothing);
  const F16 inverse = f_set1(row.scale > 0 ? 1.0f / row.scale : 0.0f);
  I16 sums[2] = {i_set1(0), i_set1(0)};
  for (int64_t d = 0; d < vectors; d += LANES) {
    const F16 whole = f_round(f_mul(f_load(padded + d), inverse)), high = f_round(f_mul(whole, f_set1(1.0f / 256)));
    const I16 parts[2] = {i_of_f(high), i_of_f(f_min(f_set1(127.0f), f_sub(whole, f_mul(high, f_set1(256.0f)))))};
    sums[0] = i_add(sums[0], parts[0]), sums[1] = i_add(sums[1], parts[1]);
    i_store_i8(coarse + d, parts[0]);
    i_store_i8(fine + d, parts[1]);
  }
  memcpy(out, coarse, dim);
  memcpy(out + dim, fine, dim);
  const int32_t totals[2] = {i_sum(sums[0]), i_sum(sums[1])};
  row.total = row.scale * ((float)totals[0] * 256.0f + (float)totals[1]);
  for (int part = 0; part < 2; part++) row.start[part] = PACK == CACHE_INT8 ? -128 * totals[part] : 0;
}

// With a key bias b: what a query times its rotation is, as weights of the cosine and the sine of each of the pass's angles. Channels
// that do not rotate add the same to all of a query's scores, which changes no probability.
inline void turn_query(const Pass& pass, const float* query, const float* b, int64_t half, float scale, float* turns) {
  for (int i = 0; i < pass.num_angles; i++) {
    const int64_t d = pass.angles[i];
    turns[2 * i] = scale * (query[d] * b[d] + query[half + d] * b[half + d]);
    turns[2 * i + 1] = scale * (query[half + d] * b[d] - query[d] * b[half + d]);
  }
}

// Finds the positions start .. start + 31 of a request. Those beyond `last` are hidden from every row by the caller; their values (but
// for bytes) and scales become 0 here, because memory that was never written may hold NaN, and 0 times NaN is NaN.
template <int PACK>
inline void open_tile(const Cache& cache, const int32_t* table, int64_t kv_head, int64_t start, int64_t last, Pass& pass, Tile& tile) {
  const int64_t size = cache.block_size, dim = cache.dim;
  const bool whole = size % LANES == 0;  // a half lies in one block
  tile.stride = whole ? size * 4 : LANES * 4;
  const bool bytes = multiplies_bytes<PACK>(dim);
  for (int half = 0; half < 2; half++) {
    const int64_t from = start + half * LANES;
    const int count = from > last ? 0 : from + LANES - 1 <= last ? LANES : (int)(last - from + 1);
    float* values = pass.values + half * LANES * dim;
    tile.values[half] = values;
    if (count < LANES) {
      if (!bytes) memset(values + count * dim, 0, (LANES - count) * dim * sizeof(float));
      memset(tile.key_scale + half * LANES, 0, LANES * sizeof(float));
      memset(tile.value_scale + half * LANES, 0, LANES * sizeof(float));
      memset(tile.key_pairs + half * 2 * LANES, 0, LANES * 4);
      if (count == 0) {
        tile.keys[half] = tile.keys[0];
        tile.bytes[half] = tile.bytes[0];
        continue;
      }
    }
    if (whole) {
      const auto [block, inside] = cache.place_of(table, from);
      const int64_t at = cache.scale_of(block, kv_head, inside);
      const uint8_t* rows = cache.value_row(block, kv_head, inside);
      tile.keys[half] = cache.key_lane(block, kv_head, inside);
      tile.bytes[half] = (const int8_t*)rows;
      if (PACK == CACHE_FP32 && count == LANES) tile.values[half] = (const float*)rows;
      if (PACK == CACHE_FP32 && count < LANES) memcpy(values, rows, count * dim * sizeof(float));
      if (PACK == CACHE_BF16) widen((const uint16_t*)rows, values, count * dim);
      if (PACK == CACHE_INT4) {
        for (int j = 0; j < count; j++) widen_nibbles(rows + j * dim / 2, cache.value_scale + at + 2 * j, values + j * dim, dim);
        memcpy(tile.key_pairs + half * 2 * LANES, cache.key_scale + at, count * 4);
      }
      if (PACK == CACHE_INT8) {
        for (int64_t i = 0; !bytes && i < count * dim; i++) values[i] = (int8_t)rows[i / dim / 4 * dim * 4 + i % dim * 4 + i / dim % 4];
        widen(cache.key_scale + at, tile.key_scale + half * LANES, count);
        widen(cache.value_scale + at, tile.value_scale + half * LANES, count);
      }
    } else {
      tile.keys[half] = pass.keys[half];
      tile.bytes[half] = pass.bytes[half];
      for (int j = 0; j < count; j++) {
        const auto [block, inside] = cache.place_of(table, from + j);
        const int64_t at = cache.scale_of(block, kv_head, inside);
        const uint8_t *lane = cache.key_lane(block, kv_head, inside), *row = cache.value_row(block, kv_head, inside);
        for (int64_t d = 0; d < dim / PACK; d++) memcpy(pass.keys[half] + (d * LANES + j) * 4, lane + d * size * 4, 4);
        if (PACK == CACHE_FP32) memcpy(values + j * dim, row, dim * sizeof(float));
        if (PACK == CACHE_BF16) widen((const uint16_t*)row, values + j * dim, dim);
        if (PACK == CACHE_INT4) widen_nibbles(row, cache.value_scale + at, values + j * dim, dim);
        for (int64_t d = 0; PACK == CACHE_INT8 && d < dim; d++) {
          if (bytes) pass.bytes[half][(j / 4 * dim + d) * 4 + j % 4] = (int8_t)row[4 * d];
          else values[j * dim + d] = (int8_t)row[4 * d];
        }
        if (PACK == CACHE_INT4) memcpy(tile.key_pairs + (half * LANES + j) * 2, cache.key_scale + at, 4);
        if (PACK == CACHE_INT8) {
          tile.key_scale[half * LANES + j] = f_of_bf16(cache.key_scale[at]);
          tile.value_scale[half * LANES + j] = f_of_bf16(cache.value_scale[at]);
        }
      }
    }
  }
  if (bytes) tile.steps = byte_steps(f_load(tile.value_scale), f_load(tile.value_scale + LANES));
}

// Tells a tile where the keys and values lie that follow KEYS_AHEAD later, or others where there are none. They are asked for line by
// line while this tile is multiplied: all at once they would fill the processor's few places for loads under way, and it would wait.
inline void look_ahead(const Cache& cache, const int32_t* table, int64_t kv_head, int64_t start, int64_t last, Tile& tile) {
  for (int half = 0; half < 2; half++) {
    const auto [block, place] = cache.place_of(table, std::min(start + KEYS_AHEAD + half * LANES, last));
    const int64_t inside = place / LANES * LANES;
    tile.keys_ahead[half] = cache.key_lane(block, kv_head, inside);
    tile.values_ahead[half] = cache.value_row(block, kv_head, inside);
    if (cache.key_scale) {
      const int64_t at = cache.scale_of(block, kv_head, inside);
      __builtin_prefetch(cache.key_scale + at);
      __builtin_prefetch(cache.value_scale + at);
    }
  }
}

}  // namespace
