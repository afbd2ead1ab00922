// Attention over paged keys, flash-style: scores of 32 keys at a time, a running maximum and sum, never a whole row of scores.
// Decoding, chunked prefill and both in one batch are the same loop; all heads that share a key head read it together. The keys of a
// request that decodes are dealt to threads in parts, so that few heads keep many cores busy.
#pragma once
#include <algorithm>

#include "attention_rows.h"

namespace {

// What a row has gathered from some keys: sums of values, sums of weights in each lane, and the largest score, which both are relative
// to. ACCUMULATOR floats and head_dim more.
constexpr int ACCUMULATOR = 2 * LANES;

inline void store_row(const Pass& pass, int r, int64_t dim, float* to) {
  memcpy(to, pass.sums + r * dim, dim * sizeof(float));
  memcpy(to + dim, pass.weight_sums + r * LANES, LANES * sizeof(float));
  to[dim + LANES] = pass.largest[r];
}

// total += part, both as store_row leaves them. Where nothing was seen the largest score is -inf or -FLT_MAX, and the sums are 0.
inline void fold(float* total, const float* part, int64_t dim) {
  const float was = total[dim + LANES], comes = part[dim + LANES], now = was > comes ? was : comes;
  if (now == -INFINITY) return;
  const F16 old = f_exp(f_set1(was - now)), fresh = f_exp(f_set1(comes - now));
  int64_t d = 0;
  for (; d + LANES <= dim + LANES; d += LANES) f_store(total + d, f_fma(f_load(part + d), fresh, f_mul(f_load(total + d), old)));
  if (d < dim + LANES) {  // head_dim is no multiple of 16: the last sums and the weights, one by one
    for (; d < dim + LANES; d++) total[d] = std::fma(part[d], f_first(fresh), total[d] * f_first(old));
  }
  total[dim + LANES] = now;
}

// A row's sums divided by the sum of its weights, as the result; those of bytes in the order of channels.
inline void write_row(const float* total, int64_t dim, bool bytes, float* to) {
  const F16 inverse = f_set1(1.0f / f_sum(f_load(total + dim)));
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) {
    alignas(64) float values[LANES];
    f_store(bytes ? values : to + d, f_mul(f_load(total + d), inverse));
    if (bytes)
      for (int part = 0; part < 4; part++) memcpy(to + d / 64 * 64 + part * 16 + d % 64 / 16 * 4, values + part * 4, 4 * sizeof(float));
  }
  for (; d < dim; d++) to[d] = total[d] * f_first(inverse);
}

// One key head of some tokens of a row: which queries, where their result goes, and what their keys are.
struct Item {
  const float* q;
  float* out;
  const int32_t* table;
  int64_t kv_head, first_position;
  int tokens;
  const KeyBias* bias;  // or null
  int64_t first_place;  // in the bias's table, of the request's first token

  int64_t last() const { return first_position + tokens - 1; }
  int64_t start(const Heads& h) const { return h.window > 0 && first_position >= h.window ? first_position - h.window + 1 : 0; }
};

inline Pass& pass_of_thread() {
  static thread_local Pass of_thread;
  Pass* address = &of_thread;
  __asm__("" : "+r"(address));  // or the compiler would ask for the thread's address again wherever it is used
  return *address;
}

template <int PACK>
inline void read_queries(const Heads& h, const Item& item, Pass& pass) {
  const int64_t group = h.heads / h.kv_heads;
  if (item.bias) turn_queries(h, *item.bias, item.bias->bias + item.kv_head * h.dim, item.q, (int)(item.tokens * group), pass);
  if (PACK >= CACHE_INT8)
    for (int r = 0; r < item.tokens * group; r++)
      quantize_query<PACK>(item.q + r / group * h.heads * h.dim + r % group * h.dim, h.dim, pass.query_rows[r], pass.queries + r * 2 * h.dim);
}

// What an item gathers from one part of its keys. It is the same, bit for bit, whoever computes the other parts and however many
// tokens the item has.
template <int PACK>
inline void attend_part(const Heads& h, const Cache& cache, const Item& item, int64_t part, Pass& pass) {
  const int64_t group = h.heads / h.kv_heads, last = item.last();
  const int rows = (int)(item.tokens * group);
  for (int r = 0; r < rows + PAD + LANES; r++) pass.largest[r] = -INFINITY;
  memset(pass.weight_sums, 0, (rows + PAD) * LANES * sizeof(float));
  memset(pass.sums, 0, (rows + PAD) * h.dim * sizeof(float));
  Tile tile;
  tile.largest_value_scale = 0;
  const int64_t from = std::max(part * PART_KEYS, item.start(h) / KEYS * KEYS), end = std::min((part + 1) * PART_KEYS, last + 1);
  for (int64_t start = from; start < end; start += KEYS) {
    prefetch_tile(cache, item.table, item.kv_head, start + KEYS, last);
    open_tile<PACK>(cache, item.table, item.kv_head, start, last, pass, tile);
    for (int half = 0; item.bias && half < 2; half++) {
      tile.cos[half] = item.bias->table + item.first_place + start + half * LANES;
      tile.sin[half] = tile.cos[half] + item.bias->half * item.bias->length;
    }
    int r = start > item.first_position ? (int)((start - item.first_position) * group) : 0;  // earlier tokens see none of these keys
    for (; r + 4 < rows; r += 8) attend_rows<PACK, 8>(h, item.bias, pass, tile, r, rows, item.q, start, item.first_position);
    for (; r + 1 < rows; r += 4) attend_rows<PACK, 4>(h, item.bias, pass, tile, r, rows, item.q, start, item.first_position);
    for (; r < rows; r++) attend_rows<PACK, 1>(h, item.bias, pass, tile, r, rows, item.q, start, item.first_position);
  }
}

// A whole item on one thread.
template <int PACK>
inline void attend_item(const Heads& h, const Cache& cache, const Item& item) {
  Pass& pass = pass_of_thread();
  const int64_t group = h.heads / h.kv_heads, dim = h.dim, stride = dim + ACCUMULATOR;
  const int rows = (int)(item.tokens * group);
  read_queries<PACK>(h, item, pass);
  const int64_t first = item.start(h) / PART_KEYS, parts = item.last() / PART_KEYS + 1;
  for (int64_t part = first; part < parts; part++) {
    attend_part<PACK>(h, cache, item, part, pass);
    for (int r = 0; r < rows; r++) {
      store_row(pass, r, dim, part == first ? pass.totals + r * stride : pass.row);
      if (part > first) fold(pass.totals + r * stride, pass.row, dim);
    }
  }
  for (int r = 0; r < rows; r++)
    write_row(pass.totals + r * stride, dim, multiplies_bytes<PACK>(dim), item.out + r / group * h.heads * dim + r % group * dim);
}

// Memory in which threads that share an item meet: `slots` accumulators of all rows of an item, and a counter for each item, 0 before
// and after.
struct Meeting {
  float* slots;
  int32_t* counters;
  int64_t num_slots;
};

// One part of a one-token item; whoever finishes last adds them up.
template <int PACK>
inline void attend_shared(const Heads& h, const Cache& cache, const Item& item, int64_t part, float* slots, int32_t* counter) {
  Pass& pass = pass_of_thread();
  const int64_t rows = h.heads / h.kv_heads, dim = h.dim, stride = dim + ACCUMULATOR;
  const int64_t first = item.start(h) / PART_KEYS, parts = item.last() / PART_KEYS + 1 - first;
  read_queries<PACK>(h, item, pass);
  attend_part<PACK>(h, cache, item, part, pass);
  for (int r = 0; r < rows; r++) store_row(pass, r, dim, slots + ((part - first) * rows + r) * stride);
  if (__atomic_add_fetch(counter, 1, __ATOMIC_ACQ_REL) < parts) return;
  for (int r = 0; r < rows; r++) {
    for (int64_t other = 1; other < parts; other++) fold(slots + r * stride, slots + (other * rows + r) * stride, dim);
    write_row(slots + r * stride, dim, multiplies_bytes<PACK>(dim), item.out + r * dim);
  }
  __atomic_store_n(counter, 0, __ATOMIC_RELEASE);
}

template <int PACK>
inline void attend_all(const Op& op, const Heads& h, const Cache& cache, const Meeting& meeting, int thread, int threads) {
  const KeyBias* bias = PACK >= CACHE_INT8 ? (const KeyBias*)op.p[9] : nullptr;
  const int64_t *starts = (const int64_t*)op.p[7], *lengths = (const int64_t*)op.p[8];
  const int64_t group = h.heads / h.kv_heads;
  const int64_t step = std::min<int64_t>(MAX_PASS / group, QUERIES);
  int64_t turn = 0, slot = 0, shared = 0;  // the same on every thread
  for (int64_t row = 0; row < op.n[0]; row++) {
    const int64_t tokens = starts[row + 1] - starts[row], history = lengths[row] - tokens;
    const int64_t first_place = bias ? bias->places[starts[row]] - history : 0;
    for (int64_t from = 0; from < tokens; from += step)
      for (int64_t kv_head = 0; kv_head < h.kv_heads; kv_head++) {
        const int64_t at = ((starts[row] + from) * h.heads + kv_head * group) * h.dim;
        const Item item = {(const float*)op.p[1] + at, (float*)op.p[0] + at, (const int32_t*)op.p[6] + row * h.max_blocks, kv_head,
                           history + from, (int)std::min(step, tokens - from), bias, first_place};
        const int64_t first = item.start(h) / PART_KEYS, parts = item.last() / PART_KEYS + 1 - first;
        if (item.tokens > 1 || parts == 1 || slot + parts > meeting.num_slots) {
          if (turn++ % threads == thread) attend_item<PACK>(h, cache, item);
          continue;
        }
        for (int64_t part = 0; part < parts; part++)
          if (turn++ % threads == thread)
            attend_shared<PACK>(h, cache, item, first + part, meeting.slots + slot * group * (h.dim + ACCUMULATOR), meeting.counters + shared);
        slot += parts, shared++;
      }
  }
}

// p: out, q, keys, values, key scales, value scales, block tables (int32), query starts (int64, rows + 1), context lengths (int64),
// KeyBias (as five int64, or null), slots (fp32), counters (int32 zeros, one for each row and key head); n: rows, heads, kv_heads, head_dim, block_size, blocks in a
// table, window (0: none), pack, number of slots; x: scale of the scores. q and out are [tokens][heads][head_dim].
void attend(const Op& op, int thread, int threads) {
  const Heads h = {op.n[1], op.n[2], op.n[3], op.n[4], op.n[5], op.n[6], (float)op.x};
  const Cache cache = {(uint8_t*)op.p[2], (uint8_t*)op.p[3], (float*)op.p[4], (float*)op.p[5], h.kv_heads, h.dim, h.block_size, (int)op.n[7]};
  const Meeting meeting = {(float*)op.p[10], (int32_t*)op.p[11], op.n[8]};
  if (cache.pack == CACHE_FP32) attend_all<CACHE_FP32>(op, h, cache, meeting, thread, threads);
  else if (cache.pack == CACHE_BF16) attend_all<CACHE_BF16>(op, h, cache, meeting, thread, threads);
  else if (cache.pack == CACHE_INT4) attend_all<CACHE_INT4>(op, h, cache, meeting, thread, threads);
  else attend_all<CACHE_INT8>(op, h, cache, meeting, thread, threads);
}

}  // namespace
