#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// 16 lanes as one 512-bit register. Needs AVX-512 F, BW, DQ, VL; the dot products take VNNI and
// BF16 where the translation unit is built with them. The words are explained in simd/scalar.hpp.
namespace kt::KT_ISA {
namespace {

// 12 sums, 12 dot products under way, 2 rows of weights: 26 of 32 registers.
constexpr int kTokenBlock = 6;
// Sums of bfloat16 are finished only at the end of a group. Two units with a latency of 6 cycles
// want more than 12 of them (Zen 5).
constexpr int kBf16TokenBlock = 8;
#ifdef __AVX512VNNI__
constexpr int kInt8Offset = 128;  // vpdpbusd multiplies unsigned by signed: weights become w + 128
#else
constexpr int kInt8Offset = 0;
#endif

struct F32 {
  __m512 v;
  static F32 Set(float x) { return {_mm512_set1_ps(x)}; }
  static F32 Load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static F32 LoadBf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
  }
  static F32 LoadF16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void Store(float* p) const { _mm512_storeu_ps(p, v); }
};

struct I32 {
  __m512i v;
  static I32 Set(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I32 Load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static I32 LoadU8(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void Store(void* p) const { _mm512_storeu_si512(p, v); }
  void StoreI8(int8_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
};

inline F32 Add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 Sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 Mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 Div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 Min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 Max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 MulAdd(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 Abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 IfLess(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline float ReduceMax(F32 a) { return _mm512_reduce_max_ps(a.v); }
inline float ReduceAdd(F32 a) { return _mm512_reduce_add_ps(a.v); }

inline I32 Add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 Sub(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I32 Mul(I32 a, I32 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
inline I32 And(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
inline I32 Xor(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline I32 Shl(I32 a, int n) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))}; }
inline I32 Shr(I32 a, int n) { return {_mm512_srli_epi32(a.v, static_cast<unsigned>(n))}; }
inline I32 Sar(I32 a, int n) { return {_mm512_srai_epi32(a.v, static_cast<unsigned>(n))}; }
inline int32_t ReduceAdd(I32 a) { return _mm512_reduce_add_epi32(a.v); }

inline F32 ToF32(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 ToI32(F32 a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F32 AsF32(I32 a) { return {_mm512_castsi512_ps(a.v)}; }

inline I32 AsI32(F32 a) { return {_mm512_castps_si512(a.v)}; }

inline bool AnyByteClear(I32 a, I32 mask) { return _mm512_testn_epi8_mask(a.v, mask.v) != 0; }

// vpermw looks at 5 bits: the table stands there twice.
template <class Table>
struct TwiceHalves {
  alignas(64) uint16_t halves[32] = {};
  constexpr TwiceHalves() {
    for (int i = 0; i < 32; ++i) halves[i] = Table::kHalves[i % 16];
  }
};
template <class Table>
inline I32 LookupHalves(I32 a) {
  static constexpr TwiceHalves<Table> kTable;
  return {_mm512_permutexvar_epi16(a.v, I32::Load(kTable.halves).v)};
}

inline I32 Bf16Pair(F32 even, F32 odd) { return Xor(Shr(AsI32(even), 16), AsI32(odd)); }

#ifdef __AVX512BF16__
inline I32 PackBf16(F32 low, F32 high) { return {(__m512i)_mm512_cvtne2ps_pbh(high.v, low.v)}; }
#else
inline __m256i RoundToBf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  // Adding may carry a NaN out of its exponent.
  const __m512i nan = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(is_nan, sum, nan), 16));
}
inline I32 PackBf16(F32 low, F32 high) {
  return {_mm512_inserti64x4(_mm512_castsi256_si512(RoundToBf16(low.v)), RoundToBf16(high.v), 1)};
}
#endif

inline void Transpose8x8(I32 (&rows)[8]) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  // The first and third quarters of two rows, then their second and fourth.
  const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm512_permutex2var_epi64(fours[i], even, fours[i + 4]);
    rows[i + 4].v = _mm512_permutex2var_epi64(fours[i], odd, fours[i + 4]);
  }
}

inline __m512i Broadcast4(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}

#ifdef __AVX512VNNI__
// `w` holds w + kInt8Offset as unsigned bytes: see format/int8.hpp.
inline I32 DotI8(I32 acc, I32 w, const void* a) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, Broadcast4(a))};
}
inline I32 DotU8(I32 acc, I32 w, const void* a) { return DotI8(acc, w, a); }
#else
inline __m512i AddPairs(__m512i acc, __m512i products16) {
  return _mm512_add_epi32(acc, _mm512_madd_epi16(products16, _mm512_set1_epi16(1)));
}
// As in simd/avx2.hpp: the weights' signs move to the activations, nothing saturates.
inline I32 DotI8(I32 acc, I32 w, const void* a) {
  const __m512i x = Broadcast4(a);
  const __m512i signed_x =
      _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(w.v), _mm512_setzero_si512(), x);
  return {AddPairs(acc.v, _mm512_maddubs_epi16(_mm512_abs_epi8(w.v), signed_x))};
}
inline I32 DotU8(I32 acc, I32 w, const void* a) {
  return {AddPairs(acc.v, _mm512_maddubs_epi16(w.v, Broadcast4(a)))};
}
#endif

inline F32 DotBf16(F32 acc, I32 w, const void* a) {
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)w.v, (__m512bh)Broadcast4(a))};
#else
  const __m512i pair = Broadcast4(a);
  const __m512i high = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  const F32 even = {_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))};
  const F32 odd = {_mm512_castsi512_ps(_mm512_and_si512(pair, high))};
  return MulAdd(AsF32({_mm512_and_si512(w.v, high)}), odd, MulAdd(AsF32(Shl(w, 16)), even, acc));
#endif
}

template <bool kIsSigned>
inline I32 Dot(I32 acc, I32 w, const void* a) {
  return kIsSigned ? DotI8(acc, w, a) : DotU8(acc, w, a);
}

inline void Hide(I32& a) { asm volatile("" : "+v"(a.v)); }
inline void Hide(F32& a) { asm volatile("" : "+v"(a.v)); }

}  // namespace
}  // namespace kt::KT_ISA
