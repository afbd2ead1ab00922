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
  const F16 old = f_exp2(f_set1(was - now)), fresh = f_exp2(f_set1(comes - now));
  int64_t d = 0;
  for (; d + LANES <= dim + LANES; d += LANES) f_store(total + d, f_fma(f_load(part + d), fresh, f_mul(f_load(total + d), old)));
  if (d < dim + LANES) {  // head_dim is no multiple of 16: the last sums and the weights, one by one
    for (; d < dim + LANES; d++) total[d] = std::fma(part[d], f_first(fresh), total[d] * f_first(old));
  }
  total[dim + LANES] = now;
}

// A row's sums divided by the sum of its weights, as the result.
inline void write_row(const float* total, int64_t dim, float* to) {
  const F16 inverse = f_set1(1.0f / f_sum(f_load(total + dim)));
  int64_t d = 0;
  for (; d + LANES <= dim; d += LANES) f_store(to + d, f_mul(f_load(total + d), inverse));
  for (; d < dim; d++) to[d] = total[d] * f_first(inverse);
}

// Some tokens of a request with one key head, or one token with several: which queries, where their result goes, what their keys are.
struct Item {
  const float* q;
  float* out;
  const int32_t* table;
  int64_t kv_head;
  int kv_heads;
  int64_t first_position;
  int tokens;
  const KeyBias* bias;  // or null
  int64_t first_place;  // in the bias's table, of the request's first token

  int64_t last() const { return first_position + tokens - 1; }
  // Where row `r` of one of the item's key heads has its query, and its result.
  int64_t row_at(const Heads& h, int head, int r) const { return (r / h.group() * h.heads + head * h.group() + r % h.group()) * h.dim; }
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
  const int group = (int)h.group(), rows = item.tokens * group;
  pass.num_angles = 0;
  for (int64_t d = 0; item.bias && d < item.bias->half; d++) {
    bool turns = false;
    for (int head = 0; head < item.kv_heads; head++) {
      const float* b = item.bias->of(item.kv_head + head, h.dim);
      turns |= b[d] != 0 || b[item.bias->half + d] != 0;
    }
    if (turns) pass.angles[pass.num_angles++] = d;
  }
  for (int head = 0; head < item.kv_heads; head++)
    for (int r = 0; r < rows; r++) {
      const int row = head * rows + r;
      const float* query = item.q + item.row_at(h, head, r);
      pass.query_of[row] = query;
      pass.token_of[row] = r / group;
      if (PACK >= CACHE_INT8) quantize_query<PACK>(query, h.dim, pass.query_rows[row], pass.queries + row * 2 * h.dim);
      if (item.bias)
        turn_query(pass, query, item.bias->of(item.kv_head + head, h.dim), item.bias->half, h.scale, pass.turns + row * 2 * item.bias->half);
    }
}

// What an item gathers from one part of its keys. It is the same, bit for bit, whoever computes the other parts and however many
// tokens or heads the item has.
template <int PACK>
inline void attend_part(const Heads& h, const Cache& cache, const Item& item, int64_t part, Pass& pass) {
  const int group = (int)h.group(), rows = item.tokens * group, all = item.kv_heads * rows;
  const int64_t last = item.last();
  for (int r = 0; r < all + LANES; r++) pass.largest[r] = -INFINITY;
  memset(pass.weight_sums, 0, all * LANES * sizeof(float));
  memset(pass.sums, 0, all * h.dim * sizeof(float));
  Tile tile;
  const int64_t from = std::max(part * PART_KEYS, item.start(h) / KEYS * KEYS), end = std::min((part + 1) * PART_KEYS, last + 1);
  for (int64_t start = from; start < end; start += KEYS)
    for (int head = 0; head < item.kv_heads; head++) {
      look_ahead(cache, item.table, item.kv_head + head, start, last, tile);
      open_tile<PACK>(cache, item.table, item.kv_head + head, start, last, pass, tile);
      for (int half = 0; item.bias && half < 2; half++) {
        tile.cos[half] = item.bias->table + item.first_place + start + half * LANES;
        tile.sin[half] = tile.cos[half] + item.bias->half * item.bias->length;
      }
      const int first = head * rows, stop = first + rows;
      int r = first + (start > item.first_position ? (int)(start - item.first_position) * group : 0);  // earlier tokens see none of these
      for (; r + 8 <= stop; r += 8) attend_rows<PACK, 8>(h, item.bias, pass, tile, r, start, item.first_position);
      attend_last_rows<PACK, 7>(stop - r, h, item.bias, pass, tile, r, start, item.first_position);
    }
}

// Calls each(row, out) for the rows of an item: its place in the pass, and where its result goes.
template <class Each>
inline void each_row(const Heads& h, const Item& item, Each each) {
  const int rows = item.tokens * (int)h.group();
  for (int head = 0; head < item.kv_heads; head++)
    for (int r = 0; r < rows; r++) each(head * rows + r, item.out + item.row_at(h, head, r));
}

// A whole item on one thread.
template <int PACK>
inline void attend_item(const Heads& h, const Cache& cache, const Item& item) {
  Pass& pass = pass_of_thread();
  const int64_t dim = h.dim, stride = dim + ACCUMULATOR;
  read_queries<PACK>(h, item, pass);
  const int64_t first = item.start(h) / PART_KEYS, parts = item.last() / PART_KEYS + 1;
  for (int64_t part = first; part < parts; part++) {
    attend_part<PACK>(h, cache, item, part, pass);
    each_row(h, item, [&](int row, float*) {
      store_row(pass, row, dim, part == first ? pass.totals + row * stride : pass.row);
      if (part > first) fold(pass.totals + row * stride, pass.row, dim);
    });
  }
  each_row(h, item, [&](int row, float* out) { write_row(pass.totals + row * stride, dim, out); });
}

// Memory in which threads that share an item meet: `slots` with an accumulator for each row of a part, and a counter for each item, 0
// before and after.
struct Meeting {
  float* slots;
  int32_t* counters;
  int64_t num_slots;
};

// Parts `begin` .. `end` of the `parts` of a one-token item, counted from its first; whoever finishes last adds them up.
template <int PACK>
inline void attend_shared(const Heads& h, const Cache& cache, const Item& item, int64_t begin, int64_t end, int64_t parts, float* slots,
                          int32_t* counter) {
  Pass& pass = pass_of_thread();
  const int64_t rows = item.kv_heads * h.group(), dim = h.dim, stride = dim + ACCUMULATOR, first = item.start(h) / PART_KEYS;
  read_queries<PACK>(h, item, pass);
  for (int64_t part = begin; part < end; part++) {
    attend_part<PACK>(h, cache, item, first + part, pass);
    each_row(h, item, [&](int row, float*) { store_row(pass, row, dim, slots + (part * rows + row) * stride); });
  }
  if (__atomic_add_fetch(counter, (int32_t)(end - begin), __ATOMIC_ACQ_REL) < parts) return;
  each_row(h, item, [&](int row, float* out) {
    for (int64_t part = 1; part < parts; part++) fold(slots + row * stride, slots + (part * rows + row) * stride, dim);
    write_row(slots + row * stride, dim, out);
  });
  __atomic_store_n(counter, 0, __ATOMIC_RELEASE);
}

// The items of a step: calls whole(item) or, where a request that decodes has several parts and there are slots for them, shared(item,
// parts, slot, place among those that are shared, keys of those before it). `together` key heads of a token that decodes are one item.
// Returns the keys of all that are shared, once for each of their key heads.
template <class Whole, class Shared>
inline int64_t deal(const Op& op, const Heads& h, const KeyBias* bias, int64_t num_slots, int together, Whole whole, Shared shared) {
  const int64_t *starts = (const int64_t*)op.p[7], *lengths = (const int64_t*)op.p[8];
  const int64_t group = h.group(), step = std::min<int64_t>(MAX_PASS / group, QUERIES);
  int64_t slot = 0, place = 0, keys = 0;
  for (int64_t row = 0; row < op.n[0]; row++) {
    const int64_t tokens = starts[row + 1] - starts[row], history = lengths[row] - tokens;
    const int64_t first_place = bias ? bias->places[starts[row]] - history : 0;
    const int heads = tokens == 1 ? together : 1;
    for (int64_t from = 0; from < tokens; from += step)
      for (int64_t kv_head = 0; kv_head < h.kv_heads; kv_head += heads) {
        const int64_t at = ((starts[row] + from) * h.heads + kv_head * group) * h.dim;
        const Item item = {(const float*)op.p[1] + at, (float*)op.p[0] + at, (const int32_t*)op.p[6] + row * h.max_blocks, kv_head,
                           (int)std::min<int64_t>(heads, h.kv_heads - kv_head), history + from, (int)std::min(step, tokens - from), bias,
                           first_place};
        const int64_t first = item.start(h) / PART_KEYS, parts = item.last() / PART_KEYS + 1 - first, slots = parts * item.kv_heads;
        if (item.tokens > 1 || parts == 1 || slot + slots > num_slots) {
          whole(item);
        } else {
          shared(item, parts, slot, place++, keys);
          slot += slots;
          keys += (item.last() + 1 - first * PART_KEYS) * item.kv_heads;
        }
      }
  }
  return keys;
}

// All key heads of a position lie side by side in memory, which is read fastest in that order: they are one item, unless that would
// leave too few parts for the threads.
inline int heads_together(const Op& op, const Heads& h, int threads) {
  const int64_t *starts = (const int64_t*)op.p[7], *lengths = (const int64_t*)op.p[8];
  int64_t parts = 0;
  for (int64_t row = 0; row < op.n[0]; row++)
    if (starts[row + 1] - starts[row] == 1) parts += ((h.window > 0 ? std::min(h.window, lengths[row]) : lengths[row]) - 1) / PART_KEYS + 1;
  return parts < 4 * threads ? 1 : (int)std::min<int64_t>(h.kv_heads, MAX_PASS / h.group());
}

// Whole items go round the threads. The keys of shared ones are cut into one range for each thread, as even as parts allow, so that it
// reads its keys in order.
template <int PACK>
inline void attend_all(const Op& op, const Heads& h, const Cache& cache, const Meeting& meeting, int thread, int threads) {
  const KeyBias* bias = PACK >= CACHE_INT8 ? (const KeyBias*)op.p[9] : nullptr;
  const int64_t slot_floats = h.group() * (h.dim + ACCUMULATOR);
  const int together = heads_together(op, h, threads);
  const int64_t keys = deal(op, h, bias, meeting.num_slots, together, [](const Item&) {}, [](const Item&, int64_t, int64_t, int64_t, int64_t) {});
  int64_t turn = 0;
  deal(
      op, h, bias, meeting.num_slots, together,
      [&](const Item& item) {
        if (turn++ % threads == thread) attend_item<PACK>(h, cache, item);
      },
      [&](const Item& item, int64_t parts, int64_t slot, int64_t place, int64_t before) {
        const auto cut = [&](int64_t at) {  // the part of this item at which the range of thread `at` begins
          const int64_t part = PART_KEYS * item.kv_heads, nearest = (keys * at / threads - before + part / 2) / part;
          return at == threads ? parts : std::max<int64_t>(0, std::min(parts, nearest));
        };
        const int64_t begin = cut(thread), end = cut(thread + 1);
        if (begin < end) attend_shared<PACK>(h, cache, item, begin, end, parts, meeting.slots + slot * slot_floats, meeting.counters + place);
      });
}

// p: out, q, keys, values, key scales, value scales, block tables (int32), query starts (int64, rows + 1), context lengths (int64),
// KeyBias (as five int64, or null), slots (fp32), counters (int32 zeros, one for each row and key head); n: rows, heads, kv_heads, head_dim, block_size, blocks in a
// table, window (0: none), pack, number of slots; x: scale of the scores. q and out are [tokens][heads][head_dim].
void attend(const Op& op, int thread, int threads) {
  const Heads h = {op.n[1], op.n[2], op.n[3], op.n[4], op.n[5], op.n[6], (float)(op.x * LOG2_E)};
  const Cache cache = {(uint8_t*)op.p[2], (uint8_t*)op.p[3], (uint16_t*)op.p[4], (uint16_t*)op.p[5], h.kv_heads, h.dim, h.block_size, (int)op.n[7]};
  const Meeting meeting = {(float*)op.p[10], (int32_t*)op.p[11], op.n[8]};
  if (cache.pack == CACHE_FP32) attend_all<CACHE_FP32>(op, h, cache, meeting, thread, threads);
  else if (cache.pack == CACHE_BF16) attend_all<CACHE_BF16>(op, h, cache, meeting, thread, threads);
  else if (cache.pack == CACHE_INT4) attend_all<CACHE_INT4>(op, h, cache, meeting, thread, threads);
  else attend_all<CACHE_INT8>(op, h, cache, meeting, thread, threads);
}

}  // namespace
