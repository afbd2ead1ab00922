// Linear layers: packed weights of 4 or 8 bits times int8 activations, bf16 weights times fp32 activations, and rows of either
// as embeddings.
//
// Layout of packed weights. Rows (output channels) are taken 16 at a time, one row a lane, so that one activation is broadcast
// to all lanes and weights are read in the order of memory. For every 4 inputs (8 bits) or 8 inputs (4 bits) a block of 16 rows
// has 64 bytes: lane r holds row r's 4 unsigned values, or its 8 nibbles, of which the low ones are inputs k..k+3 and the high
// ones k+4..k+7. bf16: for every 2 inputs 64 bytes, lane r holding row r's pair. Rows are padded to a multiple of 32.
// A weight is scale * (q - zero), zero = 8 or 128, with fp16 scales [block][group][16]; or scale * q + offset with fp16 offsets
// beside them; or, per channel, row_scale[row] * (q - zero) with fp32 row scales.
//
// Quantized activations: int8 q[token][k], and for each group of inputs scale[token][group] and sum[token][group], which is
// scale * (sum of q), so that zero points cost one multiplication a group.
#pragma once
#include "program.h"
#include "simd.h"

namespace {

struct Packed {
  const uint8_t* q;
  const uint16_t* scale;
  const uint16_t* offset;
  const float* row_scale;
  int64_t rows, cols, group;
};

struct Quantized {
  const int8_t* q;
  const float* scale;
  const float* sum;
};

struct Target {
  float* y;
  int64_t stride;
  const float* bias;
};

inline void store_rows(const Target& to, int64_t token, int64_t row, int64_t rows, F16 out) {
  if (row >= rows) return;
  if (to.bias) out = f_add(out, f_load(to.bias + row));  // bias is padded like the rows
  float* y = to.y + token * to.stride + row;
  if (row + 16 <= rows) {
    f_store(y, out);
  } else {
    float tail[16];
    f_store(tail, out);
    memcpy(y, tail, (rows - row) * sizeof(float));
  }
}

enum Scales { PER_GROUP, PER_GROUP_OFFSET, PER_CHANNEL };

// How far ahead of its use memory is asked for. A tile of one or two tokens reads four streams and waits for memory: a line is asked
// for the second-level cache first and for the first level later, because the few places that the first level has for lines on their
// way would be taken for all the time that memory needs. A tile reads its blocks side by side and the next tile the blocks after them,
// so near the end of its block a stream goes on in the next tile's; not where many tokens come back to the same two blocks.
template <int R>
struct Ahead {
  static constexpr int64_t NEAR = R == 2 ? 2048 : 1024, FAR = 2048;
  int64_t near, far;
  Ahead(int64_t at, int64_t block_bytes) : near(from(at, NEAR, block_bytes)), far(from(at, FAR, block_bytes)) {}
  void ask(const uint8_t* line) const {
    if (R > 2) __builtin_prefetch(line + far, 0, 2);
    __builtin_prefetch(line + near, 0, 3);
  }

 private:
  static int64_t from(int64_t at, int64_t ahead, int64_t block_bytes) {
    return R == 2 || at + ahead < block_bytes ? ahead : ahead + (R - 1) * block_bytes;
  }
};

// Four inputs of R blocks and MT tokens, whose rows lie `stride` bytes apart.
template <int R, int MT>
inline void add_products(I16 (&sum)[R][MT], const I16 (&q)[R], const int8_t* x, int64_t stride) {
  QK_UNROLL
  for (int t = 0; t < MT; t++) {
    const I16 four = i_broadcast(x + t * stride);
    for (int r = 0; r < R; r++) sum[r][t] = i_dot(sum[r][t], q[r], four);
  }
}

inline float sum_of(const float* x, int64_t count) {
  F16 sum = f_zero();
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) sum = f_add(sum, f_load(x + k));
  float total = f_sum(sum);
  for (; k < count; k++) total += x[k];
  return total;
}

// R blocks of 16 rows times MT tokens. int32 sums of one group live in registers, fp32 sums of all groups beside them.
template <int BITS, Scales MODE, int R, int MT>
inline void packed_tile(const Packed& w, int64_t block, const Quantized& a, int64_t token, const Target& to) {
  const int64_t groups = w.cols / w.group, group_bytes = w.group * 2 * BITS, block_bytes = w.cols * 2 * BITS;
  const float zero = BITS == 4 ? 8.0f : 128.0f;
  F16 total[R][MT];
  QK_UNROLL
  for (int r = 0; r < R; r++)
    QK_UNROLL
    for (int t = 0; t < MT; t++) total[r][t] = f_zero();
  if (MT > 2)  // results of many tokens lie far apart and in no cache
    for (int t = 0; t < MT; t++)
      for (int r = 0; r < R; r++) __builtin_prefetch(to.y + (token + t) * to.stride + (block + r) * 16, 1);
  for (int64_t g = 0; g < groups; g++) {
    const uint8_t* from = w.q + block * block_bytes + g * group_bytes;
    const int8_t* x = a.q + token * w.cols + g * w.group;
    const Ahead<R> ahead(g * group_bytes, block_bytes);
    I16 sum[R][MT];
    QK_UNROLL
    for (int r = 0; r < R; r++)
      QK_UNROLL
      for (int t = 0; t < MT; t++) sum[r][t] = i_set1(0);
    for (int64_t bytes = 0; bytes < group_bytes; bytes += 64, x += 32 / BITS) {
      I16 q[R], low[R];
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        q[r] = i_load(from + r * block_bytes + bytes);
        ahead.ask(from + r * block_bytes + bytes);
        low[r] = BITS == 4 ? i_low_nibbles(q[r]) : q[r];
      }
      add_products<R, MT>(sum, low, x, w.cols);
      if (BITS == 4) {
        QK_UNROLL
        for (int r = 0; r < R; r++) q[r] = i_high_nibbles(q[r]);
        add_products<R, MT>(sum, q, x + 4, w.cols);
      }
    }
    F16 scale[R], offset[R];
    if (MODE != PER_CHANNEL)
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        const int64_t at = ((block + r) * groups + g) * 16, in_next_tile = at + R * groups * 16;
        if (R > 2) __builtin_prefetch(w.scale + in_next_tile);
        if (R > 2 && MODE == PER_GROUP_OFFSET) __builtin_prefetch(w.offset + in_next_tile);
        scale[r] = f_half(w.scale + at);
        offset[r] = MODE == PER_GROUP_OFFSET ? f_half(w.offset + at) : f_mul(scale[r], f_set1(-zero));
      }
    QK_UNROLL
    for (int t = 0; t < MT; t++) {
      const F16 xs = f_set1(a.scale[(token + t) * groups + g]), xsum = f_set1(a.sum[(token + t) * groups + g]);
      QK_UNROLL
      for (int r = 0; r < R; r++) {
        const F16 products = f_of_i(sum[r][t]);
        if (MODE == PER_CHANNEL)
          total[r][t] = f_fma(products, xs, total[r][t]);
        else
          total[r][t] = f_fma(xsum, offset[r], f_fma(products, f_mul(scale[r], xs), total[r][t]));
      }
    }
  }
  QK_UNROLL
  for (int t = 0; t < MT; t++) {
    // per channel all groups have the same zero, which is taken off once
    const F16 zeros = f_set1(MODE == PER_CHANNEL ? -zero * sum_of(a.sum + (token + t) * groups, groups) : 0);
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      const int64_t row = (block + r) * 16;
      store_rows(to, token + t, row, w.rows, MODE == PER_CHANNEL ? f_mul(f_add(total[r][t], zeros), f_load(w.row_scale + row)) : total[r][t]);
    }
  }
}

// Blocks of rows are dealt to threads in pairs; a span of tokens whose activations fit the second-level cache meets all of a thread's
// rows before the next one does. One or two tokens wait for memory, which gives more to four streams than to two. `tile` is called
// with its shape (blocks, tokens) as types, a block and a token.
template <class Tile>
inline void over_tiles(int64_t tokens, int64_t rows, int64_t token_bytes, int thread, int threads, Tile tile) {
  const int64_t pairs = (rows + 31) / 32, first = pairs * thread / threads, last = pairs * (thread + 1) / threads;
  if (tokens == 1 || tokens == 2) {
    const auto few = [&](auto blocks, int64_t pair) {
      tokens == 1 ? tile(blocks, Count<1>(), 2 * pair, 0) : tile(blocks, Count<2>(), 2 * pair, 0);
    };
    int64_t pair = first;
    for (; pair + 2 <= last; pair += 2) few(Count<4>(), pair);
    if (pair < last) few(Count<2>(), pair);
    return;
  }
  int64_t span = (600 << 10) / token_bytes / 12 * 12;
  if (span < 12) span = 12;
  for (int64_t from = 0; from < tokens; from += span) {
    const int64_t end = from + span < tokens ? from + span : tokens;
    for (int64_t pair = first; pair < last; pair++) {
      int64_t t = from;
      for (; t + 12 <= end; t += 12) tile(Count<2>(), Count<12>(), 2 * pair, t);
      for (; t + 4 <= end; t += 4) tile(Count<2>(), Count<4>(), 2 * pair, t);
      for (; t + 2 <= end; t += 2) tile(Count<2>(), Count<2>(), 2 * pair, t);
      for (; t < end; t++) tile(Count<2>(), Count<1>(), 2 * pair, t);
    }
  }
}

template <int BITS, Scales MODE>
inline void packed_linear(const Packed& w, const Quantized& a, const Target& to, int64_t tokens, int thread, int threads) {
  over_tiles(tokens, w.rows, w.cols, thread, threads, [&](auto blocks, auto count, int64_t block, int64_t token) {
    packed_tile<BITS, MODE, blocks.value, count.value>(w, block, a, token, to);
  });
}

inline Packed packed_of(const Op& op) {
  return {(const uint8_t*)op.p[1], (const uint16_t*)op.p[2], (const uint16_t*)op.p[3], (const float*)op.p[4],
          op.n[1], op.n[2], op.n[3]};
}

// p: y, q, scale, offset, row_scale, x.q, x.scale, x.sum, bias; n: tokens, rows, cols, group, bits
void linear(const Op& op, int thread, int threads) {
  const Packed w = packed_of(op);
  const Quantized a = {(const int8_t*)op.p[5], (const float*)op.p[6], (const float*)op.p[7]};
  const Target to = {(float*)op.p[0], w.rows, (const float*)op.p[8]};
  const int64_t tokens = op.n[0];
  if (op.n[4] == 4) {
    if (w.row_scale) packed_linear<4, PER_CHANNEL>(w, a, to, tokens, thread, threads);
    else if (w.offset) packed_linear<4, PER_GROUP_OFFSET>(w, a, to, tokens, thread, threads);
    else packed_linear<4, PER_GROUP>(w, a, to, tokens, thread, threads);
  } else {
    if (w.row_scale) packed_linear<8, PER_CHANNEL>(w, a, to, tokens, thread, threads);
    else if (w.offset) packed_linear<8, PER_GROUP_OFFSET>(w, a, to, tokens, thread, threads);
    else packed_linear<8, PER_GROUP>(w, a, to, tokens, thread, threads);
  }
}

// R blocks of 16 rows times MT tokens, fp32 sums in registers; the two bf16 of a lane become two fp32 vectors.
template <int R, int MT>
inline void bf16_tile(const uint8_t* q, int64_t rows, int64_t cols, int64_t block, const float* x, int64_t token, const Target& to) {
  const int64_t block_bytes = cols * 32;
  const uint8_t* from = q + block * block_bytes;
  F16 total[R][MT];
  QK_UNROLL
  for (int r = 0; r < R; r++)
    QK_UNROLL
    for (int t = 0; t < MT; t++) total[r][t] = f_zero();
  for (int64_t k = 0; k < cols; k += 2, from += 64) {
    const Ahead<R> ahead(k * 32, block_bytes);
    I16 pair[R];
    QK_UNROLL
    for (int r = 0; r < R; r++) {
      pair[r] = i_load(from + r * block_bytes);
      ahead.ask(from + r * block_bytes);
    }
    QK_UNROLL
    for (int t = 0; t < MT; t++) {
      const float* at = x + (token + t) * cols + k;
      const F16 even = f_set1(at[0]), odd = f_set1(at[1]);
      QK_UNROLL
      for (int r = 0; r < R; r++)
        total[r][t] = f_fma(f_odd_bf16(pair[r]), odd, f_fma(f_even_bf16(pair[r]), even, total[r][t]));
    }
  }
  QK_UNROLL
  for (int t = 0; t < MT; t++)
    QK_UNROLL
    for (int r = 0; r < R; r++) store_rows(to, token + t, (block + r) * 16, rows, total[r][t]);
}

// p: y, q, -, -, -, x, -, -, bias; n: tokens, rows, cols (even)
void linear_bf16(const Op& op, int thread, int threads) {
  const uint8_t* q = (const uint8_t*)op.p[1];
  const float* x = (const float*)op.p[5];
  const int64_t rows = op.n[1], cols = op.n[2];
  const Target to = {(float*)op.p[0], rows, (const float*)op.p[8]};
  over_tiles(op.n[0], rows, cols * 4, thread, threads, [&](auto blocks, auto count, int64_t block, int64_t token) {
    bf16_tile<blocks.value, count.value>(q, rows, cols, block, x, token, to);
  });
}

// p: y, q, scale, offset, row_scale, ids (int64); n: tokens, rows, cols, group, bits (4, 8 or 16). Gathers rows as fp32.
void embed(const Op& op, int thread, int threads) {
  const Packed w = packed_of(op);
  const int64_t* ids = (const int64_t*)op.p[5];
  const int64_t bits = op.n[4], groups = w.cols / w.group;
  for (int64_t token = op.n[0] * thread / threads; token < op.n[0] * (thread + 1) / threads; token++) {
    const int64_t block = ids[token] / 16, lane = ids[token] % 16;
    const uint8_t* q = w.q + block * w.cols * 2 * bits + lane * 4;
    float* y = (float*)op.p[0] + token * w.cols;
    for (int64_t k = 0; k < w.cols; k++) {
      if (bits == 16) {
        uint32_t pair;
        memcpy(&pair, q + k / 2 * 64, 4);
        const uint32_t wide = k % 2 ? pair & 0xffff0000u : pair << 16;
        memcpy(y + k, &wide, 4);
        continue;
      }
      const int value = bits == 8 ? q[k / 4 * 64 + k % 4] : (q[k / 8 * 64 + k % 4] >> (k % 8 / 4 * 4)) & 15;
      const int zero = bits == 8 ? 128 : 8;
      const int64_t at = (block * groups + k / w.group) * 16 + lane;
      if (w.row_scale) y[k] = w.row_scale[ids[token]] * (value - zero);
      else if (w.offset) y[k] = _cvtsh_ss(w.scale[at]) * value + _cvtsh_ss(w.offset[at]);
      else y[k] = _cvtsh_ss(w.scale[at]) * (value - zero);
    }
  }
}

}  // namespace
