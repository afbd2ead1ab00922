// The paged cache of keys and values: how it lies in memory, and writing a step's tokens to it.
//
// Layout of a cache. Keys of one block and head: [head_dim / pack][block_size][4 bytes], pack channels in 4 bytes: 1 (fp32), 2 (bf16),
// 4 (int8) or 8 (int4), so that 16 positions are the lanes of a vector whatever the type, and a query's channels are broadcast to
// them. Values: [block_size][head_dim], but of int8 [block_size / 4][head_dim][4]: four positions are multiplied with four weights at a
// time. int8 keys are stored plus 128 (the instruction multiplies unsigned by signed bytes), int8 values as they are; both have a bf16
// scale for each token and head, [block_size]. int4 numbers are 0 to 15; of 4 bytes of keys the
// low halves are the first four channels and the high ones the next, of a row of values the low halves are its first half. In the
// place of the scale are two: what a number is multiplied with, and what is then added.
#pragma once
#include <cmath>

#include "elementwise.h"
#include "program.h"
#include "simd.h"

namespace {

enum CacheType { CACHE_FP32 = 1, CACHE_BF16 = 2, CACHE_INT8 = 4, CACHE_INT4 = 8 };  // the number is `pack`

constexpr int LANES = 16;
constexpr int MAX_DIM = 256;  // largest head_dim

struct Place {
  int64_t block, inside;
};

struct Cache {
  uint8_t *keys, *values;
  uint16_t *key_scale, *value_scale;  // bf16
  int64_t kv_heads, dim, block_size;
  int pack;

  // An element takes 4 / pack bytes, so the lane of one position in a row of keys is always 4 bytes.
  int64_t head_bytes() const { return block_size * dim * 4 / pack; }
  // Where a position of a request lies. Sizes are nearly always 16, which needs no division.
  Place place_of(const int32_t* table, int64_t position) const {
    const int64_t index = block_size == 16 ? position / 16 : position / block_size;
    return {table[index], position - index * block_size};
  }
  int64_t head_of(int64_t block, int64_t head) const { return block * kv_heads + head; }
  // Where the scales of one position begin.
  int64_t scale_of(int64_t block, int64_t head, int64_t inside) const {
    return (head_of(block, head) * block_size + inside) * (pack == CACHE_INT4 ? 2 : 1);
  }
  uint8_t* key_lane(int64_t block, int64_t head, int64_t inside) const { return keys + head_of(block, head) * head_bytes() + inside * 4; }
  // Where the values of one position begin; the next channel's of int8 is 4 bytes further.
  uint8_t* value_row(int64_t block, int64_t head, int64_t inside) const {
    if (pack == CACHE_INT8) return values + (head_of(block, head) * ((block_size + 3) / 4) + inside / 4) * dim * 4 + inside % 4;
    return values + head_of(block, head) * head_bytes() + inside * dim * 4 / pack;
  }
};

inline float f_of_bf16(uint16_t x) {
  const uint32_t wide = (uint32_t)x << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

// `count` bf16 as fp32.
inline void widen(const uint16_t* from, float* to, int64_t count) {
  int64_t d = 0;
  for (; d + LANES <= count; d += LANES) f_store(to + d, f_bf16(from + d));
  for (; d < count; d++) to[d] = f_of_bf16(from[d]);
}

inline uint16_t bf16_of(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A row of int4 values as fp32.
inline void widen_nibbles(const uint8_t* from, const uint16_t* pair, float* to, int64_t dim) {
  alignas(64) int8_t bytes[MAX_DIM];
  for (int64_t i = 0; i < dim / 2; i++) bytes[i] = (int8_t)(from[i] & 15), bytes[dim / 2 + i] = (int8_t)(from[i] >> 4);
  const float scale = f_of_bf16(pair[0]), offset = f_of_bf16(pair[1]);
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) f_store(to + d, f_fma(f_of_i8(bytes + d), f_set1(scale), f_set1(offset)));
  for (; d < dim; d++) to[d] = bytes[d] * scale + offset;
}

// One token and head as int4, numbers 0 to 15 in bytes. Scale and offset are rounded first and the numbers follow them. A value that
// is not finite makes both NaN.
inline void nibbles_of(const float* x, int64_t dim, uint8_t* out, uint16_t* pair) {
  float low = x[0], high = x[0], nothing = 0;
  for (int64_t d = 0; d < dim; d++) {
    low = x[d] < low ? x[d] : low, high = x[d] > high ? x[d] : high;
    nothing += x[d] - x[d];
  }
  pair[1] = bf16_of(low + nothing);
  const float offset = f_of_bf16(pair[1]), range = high - offset;
  pair[0] = bf16_of((range > 0 ? range : 0) / 15.0f + nothing);
  const float scale = f_of_bf16(pair[0]), inverse = scale > 0 ? 1.0f / scale : 0;
  for (int64_t d = 0; d < dim; d++) {
    const float steps = inverse > 0 ? (x[d] - offset) * inverse : 0;
    out[d] = (uint8_t)std::lrintf(steps < 0 ? 0 : steps > 15 ? 15 : steps);
  }
}

// A key bias that quantized keys are kept without: R(k + b) = R(k) + R(b), so R(b) comes off the keys that are written, and queries
// times R(b) are added to scores. bias [kv_heads][dim]; table [2 * half][length]: cosines of the half angles of each place, then sines.
struct KeyBias {
  const float *bias, *table;
  const int64_t* places;  // of each token of the step: its position, from where its request's places begin
  int64_t length, half;

  const float* of(int64_t head, int64_t dim) const { return bias + head * dim; }

  // k without the rotated bias of a head.
  void take(const float* k, const float* b, int64_t dim, int64_t place, float* out) const {
    const float* cos = table + place;
    for (int64_t d = 0; d < half; d++) {
      const float c = cos[d * length], s = cos[(half + d) * length];
      out[d] = k[d] - (b[d] * c - b[half + d] * s);
      out[half + d] = k[half + d] - (b[half + d] * c + b[d] * s);
    }
    for (int64_t d = 2 * half; d < dim; d++) out[d] = k[d] - b[d];
  }
};

// One token and head as int8, -127 to 127. The scale is rounded first and the numbers follow it; a value that is not finite makes it NaN.
inline uint16_t bytes_of(const float* x, int64_t dim, int8_t* out) {
  float largest = 0, nothing = 0;
  for (int64_t d = 0; d < dim; d++) {
    largest = std::fabs(x[d]) > largest ? std::fabs(x[d]) : largest;
    nothing += x[d] - x[d];
  }
  const uint16_t word = bf16_of(largest / 127.0f + nothing);
  const float scale = f_of_bf16(word), inverse = scale > 0 ? 1.0f / scale : 0;
  for (int64_t d = 0; d < dim; d++) {
    const float steps = inverse > 0 ? x[d] * inverse : 0;
    out[d] = (int8_t)std::lrintf(steps < -127 ? -127 : steps > 127 ? 127 : steps);
  }
  return word;
}

// p: k, v, keys, values, key scales, value scales, slots (int64), key bias (or null), its table, places (int64), cos, sin (or null);
// n: tokens, kv_heads, head_dim, block_size, pack, length of the table, its angles, half. Where cos is given, k is rotated first.
void write_cache(const Op& op, int thread, int threads) {
  const int64_t heads = op.n[1], dim = op.n[2], size = op.n[3], items = op.n[0] * heads;
  const int64_t* slots = (const int64_t*)op.p[6];
  const Cache cache = {(uint8_t*)op.p[2], (uint8_t*)op.p[3], (uint16_t*)op.p[4], (uint16_t*)op.p[5], heads, dim, size, (int)op.n[4]};
  const KeyBias bias = {(const float*)op.p[7], (const float*)op.p[8], (const int64_t*)op.p[9], op.n[5], op.n[6]};
  float rotated[MAX_DIM], unbiased[MAX_DIM];
  for (int64_t item = items * thread / threads; item < items * (thread + 1) / threads; item++) {
    const int64_t token = item / heads, head = item % heads, block = slots[token] / size, inside = slots[token] % size;
    const float *k = (const float*)op.p[0] + item * dim, *v = (const float*)op.p[1] + item * dim;
    if (op.p[10]) {
      const float *cos = (const float*)op.p[10] + token * op.n[7], *sin = (const float*)op.p[11] + token * op.n[7];
      rotate_head(k, cos, sin, rotated, dim, op.n[7]);
      k = rotated;
    }
    if (bias.bias) {
      bias.take(k, bias.of(head, dim), dim, bias.places[token], unbiased);
      k = unbiased;
    }
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
    } else if (cache.pack == CACHE_INT4) {
      const int64_t at = cache.scale_of(block, head, inside);
      uint8_t numbers[MAX_DIM];
      nibbles_of(k, dim, numbers, cache.key_scale + at);
      for (int64_t d = 0; d < dim; d += 8)
        for (int64_t i = 0; i < 4; i++) lane[d / 8 * size * 4 + i] = (uint8_t)(numbers[d + i] | numbers[d + 4 + i] << 4);
      nibbles_of(v, dim, numbers, cache.value_scale + at);
      for (int64_t i = 0; i < dim / 2; i++) row[i] = (uint8_t)(numbers[i] | numbers[dim / 2 + i] << 4);
    } else {
      const int64_t at = cache.scale_of(block, head, inside);
      int8_t bytes[MAX_DIM];
      cache.key_scale[at] = bytes_of(k, dim, bytes);
      for (int64_t d = 0; d < dim; d += 4) {
        const uint8_t four[4] = {(uint8_t)(bytes[d] + 128), (uint8_t)(bytes[d + 1] + 128), (uint8_t)(bytes[d + 2] + 128),
                                 (uint8_t)(bytes[d + 3] + 128)};
        memcpy(lane + d * size, four, 4);
      }
      cache.value_scale[at] = bytes_of(v, dim, bytes);
      for (int64_t d = 0; d < dim; d++) row[4 * d] = (uint8_t)bytes[d];
    }
  }
}

}  // namespace
