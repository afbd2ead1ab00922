// The paged cache of keys and values: how it lies in memory, and writing a step's tokens to it.
//
// Layout of a cache. Keys of one block and head: [head_dim / pack][block_size][pack] with pack = 1 (fp32), 2 (bf16) or 4 (int8), so
// that 16 positions are the lanes of a vector whatever the type, and a query's channels are broadcast to them. Values:
// [block_size][head_dim]. int8 keys are stored plus 128 (the instruction multiplies unsigned by signed bytes), int8 values as they
// are; both have an fp32 scale for each token and head, [block_size].
#pragma once
#include <cmath>

#include "program.h"
#include "simd.h"

namespace {

enum CacheType { CACHE_FP32 = 1, CACHE_BF16 = 2, CACHE_INT8 = 4 };  // the number is `pack`

constexpr int LANES = 16;
constexpr int MAX_DIM = 256;  // largest head_dim

struct Cache {
  uint8_t *keys, *values;
  float *key_scale, *value_scale;
  int64_t kv_heads, dim, block_size;
  int pack;

  // Element size is 4 / pack, so the lane of one position in a row of keys is always 4 bytes.
  int64_t head_bytes() const { return block_size * dim * 4 / pack; }
  int64_t head_of(int64_t block, int64_t head) const { return block * kv_heads + head; }
  uint8_t* key_lane(int64_t block, int64_t head, int64_t inside) const { return keys + head_of(block, head) * head_bytes() + inside * 4; }
  uint8_t* value_row(int64_t block, int64_t head, int64_t inside) const {
    return values + head_of(block, head) * head_bytes() + inside * dim * 4 / pack;
  }
};

// `count` values of a cache as fp32.
template <int PACK>
inline void widen(const uint8_t* from, float* to, int64_t count) {
  int64_t d = 0;
  for (; d + LANES <= count; d += LANES)
    f_store(to + d, PACK == CACHE_INT8 ? f_of_i8((const int8_t*)from + d) : f_bf16((const uint16_t*)from + d));
  for (; d < count; d++) {
    if (PACK == CACHE_INT8) {
      to[d] = ((const int8_t*)from)[d];
    } else {
      const uint32_t wide = (uint32_t)((const uint16_t*)from)[d] << 16;
      memcpy(to + d, &wide, 4);
    }
  }
}

inline uint16_t bf16_of(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One token and head as int8: the largest becomes 127. A value that is not finite makes the scale NaN.
inline float bytes_of(const float* x, int64_t dim, int8_t* out) {
  float largest = 0, nothing = 0;
  for (int64_t d = 0; d < dim; d++) {
    largest = std::fabs(x[d]) > largest ? std::fabs(x[d]) : largest;
    nothing += x[d] - x[d];
  }
  const float inverse = largest > 0 && nothing == 0 ? 127.0f / largest : 0;
  for (int64_t d = 0; d < dim; d++) out[d] = (int8_t)std::lrintf(x[d] * inverse);
  return largest / 127.0f + nothing;
}

// p: k, v, keys, values, key scales, value scales, slots (int64); n: tokens, kv_heads, head_dim, block_size, pack
void write_cache(const Op& op, int thread, int threads) {
  const int64_t heads = op.n[1], dim = op.n[2], size = op.n[3], items = op.n[0] * heads;
  const int64_t* slots = (const int64_t*)op.p[6];
  const Cache cache = {(uint8_t*)op.p[2], (uint8_t*)op.p[3], (float*)op.p[4], (float*)op.p[5], heads, dim, size, (int)op.n[4]};
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int64_t token = item / heads, head = item % heads, block = slots[token] / size, inside = slots[token] % size;
    const float *k = (const float*)op.p[0] + item * dim, *v = (const float*)op.p[1] + item * dim;
    uint8_t *lane = cache.key_lane(block, head, inside), *row = cache.value_row(block, head, inside);
    if (cache.pack == CACHE_FP32) {
      for (int64_t d = 0; d < dim; d++) memcpy(lane + d * size * 4, k + d, 4);
      memcpy(row, v, dim * 4);
    } else if (cache.pack == CACHE_BF16) {
      for (int64_t d = 0; d < dim; d += 2) {
        const uint16_t pair[2] = {bf16_of(k[d]), bf16_of(k[d + 1])};
        memcpy(lane + d / 2 * size * 4, pair, 4);
      }
      for (int64_t d = 0; d < dim; d++) ((uint16_t*)row)[d] = bf16_of(v[d]);
    } else {
      const int64_t at = cache.head_of(block, head) * size + inside;
      int8_t bytes[MAX_DIM];
      cache.key_scale[at] = bytes_of(k, dim, bytes);
      for (int64_t d = 0; d < dim; d += 4) {
        const uint8_t four[4] = {(uint8_t)(bytes[d] + 128), (uint8_t)(bytes[d + 1] + 128), (uint8_t)(bytes[d + 2] + 128),
                                 (uint8_t)(bytes[d + 3] + 128)};
        memcpy(lane + d * size, four, 4);
      }
      cache.value_scale[at] = bytes_of(v, dim, (int8_t*)row);
    }
  }
}

}  // namespace
