// Sixteen lanes, whatever the machine: one zmm register where AVX-512 VNNI is there, two ymm registers with AVX2.
// Every kernel is written once against these few functions and compiled once for each instruction set (kernels_*.cpp). What differs
// between the two has internal linkage: the linker keeps one of two weak symbols, and that may be the one that this machine cannot run.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Loops over lanes of a tile: only when they are unrolled do their sums stay in registers.
#define QK_UNROLL _Pragma("GCC unroll 16")
// Inner loops that are functions of their own: inlined into a large one their sums no longer fit the registers.
#define QK_NOINLINE __attribute__((noinline)) inline

// A number that is known when a lambda's body is compiled: it is the argument's type.
template <int N>
struct Count {
  static constexpr int value = N;
};

#if defined(__AVX512F__) && defined(__AVX512VNNI__)

struct F16 { __m512 v; };
struct I16 { __m512i v; };
static inline F16 f_zero() { return {_mm512_setzero_ps()}; }
static inline F16 f_set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F16 f_load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void f_store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
static inline F16 f_add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F16 f_sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F16 f_mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F16 f_div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F16 f_max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F16 f_min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F16 f_fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F16 f_abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
static inline float f_first(F16 a) { return _mm512_cvtss_f32(a.v); }
static inline float f_sum(F16 a) { return _mm512_reduce_add_ps(a.v); }
static inline float f_hmax(F16 a) { return _mm512_reduce_max_ps(a.v); }
// one bit a lane: a > b, a >= b, a is NaN
static inline uint32_t f_gt(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
static inline uint32_t f_ge(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
// sum + a where a > b, else sum
static inline F16 f_add_if_gt(F16 sum, F16 a, F16 b) {
  return {_mm512_mask_add_ps(sum.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ), sum.v, a.v)};
}
static inline F16 f_if(F16 a, F16 b, F16 x) { return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)}; }  // x where not a < b
static inline uint32_t f_nan(F16 a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
static inline F16 f_half(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline F16 f_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
static inline F16 f_of_i8(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
static inline F16 f_round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline F16 f_of_i(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I16 i_of_f(F16 a) { return {_mm512_cvtps_epi32(a.v)}; }
static inline F16 f_scale2(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a 2^n, n whole and -126 to 127
static inline I16 i_load(const void* p) { return {_mm512_loadu_si512(p)}; }
static inline I16 i_set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I16 i_broadcast(const void* p) {  // four bytes to every lane
  int32_t four;
  memcpy(&four, p, 4);
  return {_mm512_set1_epi32(four)};
}
static inline void i_store_i8(int8_t* p, I16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v)); }
static inline void i_store_u8(uint8_t* p, I16 a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }  // the lowest byte of each
static inline I16 i_add(I16 a, I16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline int32_t i_sum(I16 a) { return _mm512_reduce_add_epi32(a.v); }
static inline I16 i_low_nibbles(I16 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
static inline I16 i_high_nibbles(I16 a) { return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))}; }
// acc + for each lane the sum of four products of an unsigned and a signed byte. As an instruction rather than an intrinsic:
// GCC 12 copies the accumulator around the intrinsic, which halves the speed of the inner loops.
static inline I16 i_dot(I16 acc, I16 u, I16 s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(u.v), "v"(s.v));
  return acc;
}
// the lower and the upper bf16 of each 32-bit lane as fp32
static inline F16 f_even_bf16(I16 a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
static inline F16 f_odd_bf16(I16 a) { return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32((int)0xffff0000)))}; }

#else

struct F16 { __m256 a, b; };
struct I16 { __m256i a, b; };
#define QK_TWICE(f) {f(x.a, y.a), f(x.b, y.b)}
static inline F16 f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F16 f_set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F16 f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F16 x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
static inline F16 f_add(F16 x, F16 y) { return QK_TWICE(_mm256_add_ps); }
static inline F16 f_sub(F16 x, F16 y) { return QK_TWICE(_mm256_sub_ps); }
static inline F16 f_mul(F16 x, F16 y) { return QK_TWICE(_mm256_mul_ps); }
static inline F16 f_div(F16 x, F16 y) { return QK_TWICE(_mm256_div_ps); }
static inline F16 f_max(F16 x, F16 y) { return QK_TWICE(_mm256_max_ps); }
static inline F16 f_min(F16 x, F16 y) { return QK_TWICE(_mm256_min_ps); }
static inline F16 f_fma(F16 x, F16 y, F16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F16 f_abs(F16 x) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
static inline float f_first(F16 x) { return _mm256_cvtss_f32(x.a); }
static inline float f_sum8(__m256 x) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline float f_sum(F16 x) { return f_sum8(_mm256_add_ps(x.a, x.b)); }
static inline float f_hmax(F16 x) {
  __m256 m = _mm256_max_ps(x.a, x.b);
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline uint32_t f_masks(__m256 low, __m256 high) { return _mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8; }
static inline uint32_t f_gt(F16 x, F16 y) { return f_masks(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)); }
static inline uint32_t f_ge(F16 x, F16 y) { return f_masks(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)); }
static inline F16 f_add_if_gt(F16 sum, F16 x, F16 y) {
  return {_mm256_add_ps(sum.a, _mm256_and_ps(x.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ))),
          _mm256_add_ps(sum.b, _mm256_and_ps(x.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)))};
}
static inline F16 f_if(F16 x, F16 y, F16 z) {
  return {_mm256_and_ps(z.a, _mm256_cmp_ps(x.a, y.a, _CMP_NLT_UQ)), _mm256_and_ps(z.b, _mm256_cmp_ps(x.b, y.b, _CMP_NLT_UQ))};
}
static inline uint32_t f_nan(F16 x) { return f_masks(_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)); }
static inline F16 f_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline __m256 f_bf16x8(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F16 f_bf16(const uint16_t* p) { return {f_bf16x8(p), f_bf16x8(p + 8)}; }
static inline F16 f_of_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline F16 f_round(F16 x) {
  return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
static inline F16 f_of_i(I16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I16 i_of_f(F16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
static inline __m256 f_pow2x8(__m256 x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127)), 23));
}
static inline F16 f_scale2(F16 x, F16 n) { return {_mm256_mul_ps(x.a, f_pow2x8(n.a)), _mm256_mul_ps(x.b, f_pow2x8(n.b))}; }
static inline I16 i_load(const void* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)}; }
static inline I16 i_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline I16 i_broadcast(const void* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return i_set1(four);
}
static inline void i_store_i8(int8_t* p, I16 x) {
  __m256i w = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
static inline __m128i i_low_bytes8(__m256i x) {
  x = _mm256_and_si256(x, _mm256_set1_epi32(255));
  x = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
  return _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_castsi256_si128(x));
}
static inline void i_store_u8(uint8_t* p, I16 x) {
  _mm_storeu_si128((__m128i*)p, _mm_unpacklo_epi64(i_low_bytes8(x.a), i_low_bytes8(x.b)));
}
static inline I16 i_add(I16 x, I16 y) { return QK_TWICE(_mm256_add_epi32); }
static inline int32_t i_sum(I16 x) {
  __m256i t = _mm256_add_epi32(x.a, x.b);
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
static inline I16 i_low_nibbles(I16 x) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
static inline I16 i_high_nibbles(I16 x) { return i_low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}); }
// maddubs would saturate for weights above 127, so bytes are widened: even and odd bytes apart, exact in 32 bits
static inline __m256i i_dot8(__m256i acc, __m256i u, __m256i s) {
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
static inline I16 i_dot(I16 acc, I16 u, I16 s) { return {i_dot8(acc.a, u.a, s.a), i_dot8(acc.b, u.b, s.b)}; }
static inline F16 f_even_bf16(I16 x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
}
static inline F16 f_odd_bf16(I16 x) {
  const __m256i m = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(x.a, m)), _mm256_castsi256_ps(_mm256_and_si256(x.b, m))};
}
#undef QK_TWICE
#endif

// e^x for x <= 88, 0 below -87: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error below 3e-7.
static inline F16 f_exp(F16 x) {
  x = f_min(f_set1(88.0f), f_max(f_set1(-87.3f), x));  // in this order a NaN stays a NaN
  const F16 n = f_round(f_mul(x, f_set1(1.44269504f)));
  F16 r = f_fma(n, f_set1(-0.693359375f), x);
  r = f_fma(n, f_set1(2.12194440e-4f), r);
  F16 p = f_set1(1.0f / 720);
  p = f_fma(p, r, f_set1(1.0f / 120));
  p = f_fma(p, r, f_set1(1.0f / 24));
  p = f_fma(p, r, f_set1(1.0f / 6));
  p = f_fma(p, r, f_set1(0.5f));
  p = f_fma(p, r, f_set1(1.0f));
  p = f_fma(p, r, f_set1(1.0f));
  return f_scale2(p, n);
}

// 2^x for x <= 0, and 2^-126 below that: a polynomial of degree 5 on [-1/2, 1/2], the one of least relative error (1e-7) among those
// that are 1 at 0.
static inline F16 f_exp2(F16 x) {
  x = f_max(f_set1(-126.0f), x);  // in this order a NaN stays a NaN
  const F16 n = f_round(x), f = f_sub(x, n);
  F16 p = f_set1(1.3264727e-3f);
  p = f_fma(p, f, f_set1(9.6715128e-3f));
  p = f_fma(p, f, f_set1(5.5507337e-2f));
  p = f_fma(p, f, f_set1(2.4022242e-1f));
  p = f_fma(p, f, f_set1(6.9314698e-1f));
  return f_scale2(f_fma(p, f, f_set1(1.0f)), n);
}
