// Choosing a token from each row of logits: penalties, temperature, top_k, top_p, min_p, then one draw with a given uniform number. Rows
// are dealt to threads. The vocabulary is never sorted: top_k selects, and top_p narrows down the weight from which tokens are kept.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <memory>
#include <vector>

#include "program.h"
#include "simd.h"

namespace {

struct Candidate {
  float logit;
  int32_t id;
};

// Types of this namespace give instances of the standard library's templates internal linkage (see simd.h).
template <class T>
struct Allocator {
  typedef T value_type;
  Allocator() = default;
  template <class U>
  Allocator(const Allocator<U>&) {}
  T* allocate(size_t count) { return std::allocator<T>().allocate(count); }
  void deallocate(T* memory, size_t count) { std::allocator<T>().deallocate(memory, count); }
  template <class U>
  bool operator==(const Allocator<U>&) const { return true; }
  template <class U>
  bool operator!=(const Allocator<U>&) const { return false; }
};
typedef std::vector<float, Allocator<float>> Floats;

struct Greater {
  bool operator()(float a, float b) const { return a > b; }
};

// Likelier first; of equals the one with the smaller id, so that the order does not depend on how it was found.
inline bool likelier(const Candidate& a, const Candidate& b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

// Calls `take(k)` for every k with from[k] > bound; take may raise the bound.
template <class Take>
inline void scan(const float* from, int64_t size, const float& bound, Take take) {
  int64_t k = 0;
  for (; k + 16 <= size; k += 16)
    for (uint32_t lanes = f_gt(f_load(from + k), f_set1(bound)); lanes; lanes &= lanes - 1) {
      const int64_t lane = k + __builtin_ctz(lanes);
      if (from[lane] > bound) take(lane);
    }
  for (; k < size; k++)
    if (from[k] > bound) take(k);
}

// The largest logit; NaN if one of them is.
inline float peak_of(const float* row, int64_t size) {
  F16 largest = f_set1(-INFINITY);
  uint32_t nan = 0;
  float peak = -INFINITY;
  int64_t k = 0;
  for (; k + 16 <= size; k += 16) {
    const F16 x = f_load(row + k);
    nan |= f_nan(x);
    largest = f_max(largest, x);
  }
  for (int64_t left = size % 16; left > 0; left--, k++) {
    nan |= row[k] != row[k];
    peak = row[k] > peak ? row[k] : peak;
  }
  return nan ? NAN : std::max(peak, f_hmax(largest));
}

// The first k whose logit is the peak.
inline int64_t first_of(const float* row, int64_t size, float peak) {
  int64_t k = 0;
  for (; k + 16 <= size; k += 16)
    if (const uint32_t lanes = f_ge(f_load(row + k), f_set1(peak))) return k + __builtin_ctz(lanes);
  while (row[k] != peak) k++;
  return k;
}

// weights[k] = exp((row[k] - peak) * inverse); returns their sum.
inline double weigh(const float* row, int64_t size, float peak, float inverse, float* weights) {
  F16 sum = f_zero();
  double total = 0;
  const F16 top = f_set1(peak), by = f_set1(inverse), floor = f_set1(-87.0f);
  int64_t k = 0;
  for (int64_t block = 0; k + 16 <= size; k += 16) {
    const F16 z = f_mul(f_sub(f_load(row + k), top), by);
    F16 weight = f_zero();
    if (f_ge(z, floor)) weight = f_exp(z);
    f_store(weights + k, weight);
    sum = f_add(sum, weight);
    if (++block == 64) total += f_sum(sum), sum = f_zero(), block = 0;  // in fp32 a long sum would lose its tail
  }
  total += f_sum(sum);
  for (; k < size; k++) total += weights[k] = std::exp((row[k] - peak) * inverse);
  return total;
}

// A row is looked through for its peak in parts, each by the thread that has most likely just written it.
constexpr int64_t PEAK_PARTS = 64;
inline int64_t part_start(int64_t size, int64_t part) { return size / 32 * part / PEAK_PARTS * 32; }
inline int64_t part_end(int64_t size, int64_t part) { return part + 1 == PEAK_PARTS ? size : part_start(size, part + 1); }

// The k likeliest, in no order. k parts of the row have a logit as large as the k-th of their peaks, so nothing below it is among them.
inline void likeliest(const float* row, int64_t size, const float* peaks, int64_t k, std::vector<Candidate>& out) {
  float bound = -INFINITY;
  if (k <= PEAK_PARTS) {
    float sorted[PEAK_PARTS];
    std::copy(peaks, peaks + PEAK_PARTS, sorted);
    std::nth_element(sorted, sorted + (k - 1), sorted + PEAK_PARTS, Greater());
    bound = std::nextafter(sorted[k - 1], -INFINITY);
  }
  out.clear();
  const size_t room = 2 * k + 1024;
  for (int64_t part = 0; part < PEAK_PARTS; part++) {
    const int64_t start = part_start(size, part);
    if (peaks[part] <= bound) continue;
    scan(row + start, part_end(size, part) - start, bound, [&](int64_t id) {
      out.push_back({row[start + id], (int32_t)(start + id)});
      if (out.size() == room) {
        std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), likelier);
        out.resize(k);
        bound = out[k - 1].logit;
      }
    });
  }
  if ((int64_t)out.size() > k) {
    std::nth_element(out.begin(), out.begin() + (k - 1), out.end(), likelier);
    out.resize(k);
  }
}

constexpr int BOUNDS = 6;  // thresholds that are tried in one pass
constexpr int64_t BLOCK = 1024;
constexpr float DEEPEST = 88;  // weights below e^-88 are 0
constexpr double FEW = 1024;  // tokens that are told apart one by one rather than by another pass

// masses[i] = sum of the weights above bounds[i].
inline void masses_above(const float* weights, int64_t size, const float* bounds, double* masses) {
  std::fill(masses, masses + BOUNDS, 0.0);
  for (int64_t from = 0; from < size; from += BLOCK) {
    F16 sums[BOUNDS];
    QK_UNROLL
    for (int i = 0; i < BOUNDS; i++) sums[i] = f_zero();
    const int64_t end = std::min(from + BLOCK, size);
    int64_t k = from;
    for (; k + 16 <= end; k += 16) {
      const F16 weight = f_load(weights + k);
      QK_UNROLL
      for (int i = 0; i < BOUNDS; i++) sums[i] = f_add_if_gt(sums[i], weight, f_set1(bounds[i]));
    }
    for (int i = 0; i < BOUNDS; i++) masses[i] += f_sum(sums[i]);
    for (; k < end; k++)
      for (int i = 0; i < BOUNDS; i++) masses[i] += weights[k] > bounds[i] ? weights[k] : 0;
  }
}

// What is kept of a vocabulary: the tokens whose weight is above `above`, which have `mass` together, and some more by name.
struct Kept {
  float above;
  double mass;
  std::vector<Candidate>& more;
};

// Where the likeliest tokens end that have a wanted mass together, in logarithms of weights: those above e^-shallow have `less`, those
// above e^-deep have `enough`.
struct Edge {
  float shallow, deep;
  double less, enough;
};

// One pass over the weights: the edge lies between two neighbours of `depths`.
inline void narrow(const float* weights, int64_t size, double wanted, const float* depths, Edge& edge) {
  float bounds[BOUNDS];
  double masses[BOUNDS];
  for (int i = 0; i < BOUNDS; i++) bounds[i] = std::exp(-depths[i]);
  masses_above(weights, size, bounds, masses);
  for (int i = 0; i < BOUNDS; i++) {
    if (masses[i] >= wanted) {
      edge.deep = depths[i], edge.enough = masses[i];
      return;
    }
    edge.shallow = depths[i], edge.less = masses[i];
  }
}

// The next thresholds: at first most of them near the peak, where most distributions are decided, then evenly spaced.
inline void thresholds(const Edge& edge, float* depths) {
  for (int i = 0; i < BOUNDS; i++)
    depths[i] = edge.shallow > 0 ? edge.shallow + (edge.deep - edge.shallow) * (i + 1) / (BOUNDS + 1) : std::ldexp(edge.deep, i - BOUNDS);
}

// Thresholds close around the edge as one vector in sixteen has it; a wrong guess costs a pass, never a token. False where these
// vectors are not like the whole, or hold too few tokens that matter.
inline bool guess(const float* weights, int64_t size, double all, double wanted, float* depths) {
  static thread_local Floats some;
  some.clear();
  F16 sum = f_zero(), squares = f_zero();
  for (int64_t k = 0; k + 16 <= size; k += 256) {
    const F16 x = f_load(weights + k);
    sum = f_add(sum, x), squares = f_fma(x, x, squares);
    some.insert(some.end(), weights + k, weights + k + 16);
  }
  const double mass = f_sum(sum), square = f_sum(squares), share = wanted / all;
  const double like = mass * size / (all * some.size());
  if (!(mass * mass >= 100 * square && like > 0.8 && like < 1.25)) return false;
  const double error = 3 * std::sqrt(share * (1 - share) * square) / mass;  // three standard deviations
  Edge ends[2];
  for (int end = 0; end < 2; end++) {
    ends[end] = {0, DEEPEST, 0, mass};
    const double here = end ? share + std::min(error, 0.75 * (1 - share)) : share - error;
    for (int pass = 0; pass < 4; pass++) {
      thresholds(ends[end], depths);
      narrow(some.data(), some.size(), here * mass, depths, ends[end]);
    }
  }
  for (int i = 0; i < BOUNDS; i++) depths[i] = ends[0].shallow + (ends[1].deep - ends[0].shallow) * i / (BOUNDS - 1);
  return true;
}

// The tokens whose weight is above `low` and not above `high`.
inline void collect(const float* row, const float* weights, int64_t size, float low, float high, std::vector<Candidate>& out) {
  int64_t k = 0;
  for (; k + 16 <= size; k += 16) {
    const F16 weight = f_load(weights + k);
    uint32_t lanes = f_gt(weight, f_set1(low)) & ~f_gt(weight, f_set1(high));
    if (!lanes) continue;
    size_t count = out.size();
    out.resize(count + __builtin_popcount(lanes));
    for (; lanes; lanes &= lanes - 1) out[count++] = {row[k + __builtin_ctz(lanes)], (int32_t)(k + __builtin_ctz(lanes))};
  }
  for (; k < size; k++)
    if (weights[k] > low && weights[k] <= high) out.push_back({row[k], (int32_t)k});
}

// The fewest likeliest tokens whose mass reaches `wanted`. The edge is narrowed down a few thresholds at a time until few tokens can
// be left between two; among these it is selected: half of them is certain at each step.
inline void keep_most(const float* row, const float* weights, int64_t size, double all, double wanted, Kept& kept) {
  Edge edge = {0, DEEPEST, 0, all};
  float depths[BOUNDS];
  bool guessed = guess(weights, size, all, wanted, depths);
  for (int pass = 0; pass < 4 && edge.enough - edge.less > FEW * std::exp(-edge.deep); pass++) {
    if (pass > 0 || !guessed) thresholds(edge, depths);
    narrow(weights, size, wanted, depths, edge);
  }
  kept.mass = edge.less;
  kept.above = edge.shallow > 0 ? std::exp(-edge.shallow) : FLT_MAX;
  collect(row, weights, size, std::exp(-edge.deep), kept.above, kept.more);
  auto first = kept.more.begin(), last = kept.more.end();  // what is before has less than is wanted, with these it is enough
  for (double mass = edge.less; last - first > 1;) {
    const auto middle = first + (last - first) / 2;
    if (!std::is_sorted(first, last, likelier)) std::nth_element(first, middle, last, likelier);  // equals come sorted
    double half = 0;
    for (auto c = first; c != middle; ++c) half += weights[c->id];
    if (mass + half >= wanted) last = middle;
    else mass += half, first = middle;
  }
  kept.more.erase(last, kept.more.end());
}

// p: logits (changed), ids (int64), counts, lengths (int64), penalties (repetition, frequency and presence of each row); n: rows,
// vocabulary, most ids of a row
void penalize(const Op& op, int thread, int threads) {
  const int64_t size = op.n[1], most = op.n[2];
  for (int64_t row = thread; row < op.n[0]; row += threads) {
    float* logits = (float*)op.p[0] + row * size;
    const int64_t *ids = (const int64_t*)op.p[1] + row * most, length = ((const int64_t*)op.p[3])[row];
    const float *counts = (const float*)op.p[2] + row * most, *penalties = (const float*)op.p[4] + row * 3;
    for (int64_t i = 0; i < length; i++) {
      float& logit = logits[ids[i]];
      logit = logit > 0 ? logit / penalties[0] : logit * penalties[0];
      if (counts[i] > 0) logit -= penalties[1] * counts[i] + penalties[2];
    }
  }
}

// p: peaks out (rows, PEAK_PARTS), logits; n: rows, vocabulary
void peaks(const Op& op, int thread, int threads) {
  const int64_t size = op.n[1];
  for (int64_t row = 0; row < op.n[0]; row++)
    for (int64_t part = PEAK_PARTS * thread / threads; part < PEAK_PARTS * (thread + 1) / threads; part++) {
      const int64_t start = part_start(size, part), count = part_end(size, part) - start;
      ((float*)op.p[0])[row * PEAK_PARTS + part] = peak_of((const float*)op.p[1] + row * size + start, count);
    }
}

inline int64_t draw(const float* row, int64_t size, const float* peaks, float temperature, int64_t top_k, float top_p, float min_p,
                    double uniform) {
  static thread_local std::vector<Candidate> candidates;
  static thread_local Floats weights;
  const float peak = peak_of(peaks, PEAK_PARTS);
  if (!std::isfinite(peak)) return -1;
  const int64_t start = part_start(size, first_of(peaks, PEAK_PARTS, peak));
  const int64_t likeliest_id = start + first_of(row + start, size - start, peak);
  if (temperature <= 0) return likeliest_id;
  const float inverse = 1.0f / temperature;
  weights.resize(size);
  candidates.clear();
  Kept kept = {FLT_MAX, 0, candidates};
  if (top_k > 0 && top_k < size) {
    likeliest(row, size, peaks, top_k, candidates);
    std::sort(candidates.begin(), candidates.end(), likelier);
    double all = 0, mass = 0;
    for (const Candidate& c : candidates) all += weights[c.id] = std::exp((c.logit - peak) * inverse);
    size_t count = 0;
    while (count < candidates.size() && (top_p >= 1 || mass < top_p * all)) mass += weights[candidates[count++].id];
    candidates.resize(std::max<size_t>(count, 1));
  } else {
    const double all = weigh(row, size, peak, inverse, weights.data());
    if (top_p < 1) keep_most(row, weights.data(), size, all, top_p * all, kept);
    else kept.above = 0, kept.mass = all;
    if (min_p > 0 && kept.above < min_p) {
      float bounds[BOUNDS];
      double masses[BOUNDS];
      std::fill(bounds, bounds + BOUNDS, std::nextafter(min_p, 0.0f));
      masses_above(weights.data(), size, bounds, masses);
      kept.above = bounds[0], kept.mass = masses[0];
    }
  }
  double target = kept.mass;
  if (min_p > 0)
    candidates.erase(std::remove_if(candidates.begin(), candidates.end(), [&](const Candidate& c) { return weights[c.id] < min_p; }),
                     candidates.end());
  for (const Candidate& c : candidates) target += weights[c.id];
  target *= uniform;
  for (const Candidate& c : candidates) {
    target -= weights[c.id];
    if (target < 0) return c.id;
  }
  if (kept.mass <= 0) return candidates.empty() ? likeliest_id : candidates.front().id;
  int64_t chosen = likeliest_id;  // where rounding runs past the last token that is kept
  for (int64_t from = 0; from < size; from += BLOCK) {
    const int64_t end = std::min(from + BLOCK, size);
    double mass = 0;
    F16 sum = f_zero();
    int64_t k = from;
    for (; k + 16 <= end; k += 16) sum = f_add_if_gt(sum, f_load(weights.data() + k), f_set1(kept.above));
    mass = f_sum(sum);
    for (; k < end; k++) mass += weights[k] > kept.above ? weights[k] : 0;
    if (target >= mass) {
      target -= mass;
      continue;
    }
    for (k = from; k < end; k++) {
      if (weights[k] <= kept.above) continue;
      chosen = k;
      if (weights[k] > target) return k;
      target -= weights[k];
    }
    return chosen;
  }
  return chosen;
}

// p: tokens out (int64), logits, temperature, top_k (int64), top_p, min_p, uniform (double), peaks; n: rows, vocabulary. Temperature 0
// takes the likeliest, top_k 0 and top_p 1 cut nothing. -1 where a row has no finite largest logit.
void sample(const Op& op, int thread, int threads) {
  const int64_t size = op.n[1];
  for (int64_t row = thread; row < op.n[0]; row += threads) {
    const float *logits = (const float*)op.p[1] + row * size, *peaks = (const float*)op.p[7] + row * PEAK_PARTS;
    const float temperature = ((const float*)op.p[2])[row], top_p = ((const float*)op.p[4])[row], min_p = ((const float*)op.p[5])[row];
    const int64_t top_k = ((const int64_t*)op.p[3])[row];
    ((int64_t*)op.p[0])[row] = draw(logits, size, peaks, temperature, top_k, top_p, min_p, ((const double*)op.p[6])[row]);
  }
}

}  // namespace
