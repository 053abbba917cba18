#pragma once
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// 16 lanes as two 256-bit registers. Needs AVX2, FMA, F16C; the int8 products take VNNI where the
// translation unit is built with it: as AVX-VNNI, or in the encoding of AVX-512VL, which is the
// same instruction on processors without AVX-VNNI. The words are explained in simd/scalar.hpp.
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define KT_HAS_VNNI256 1
#endif

namespace kt::KT_ISA {
namespace {

constexpr int kTokenBlock = 3;
constexpr int kBf16TokenBlock = 3;
#ifdef KT_HAS_VNNI256
constexpr int kInt8Offset = 128;  // vpdpbusd multiplies unsigned by signed: weights become w + 128
#else
constexpr int kInt8Offset = 0;
#endif

struct F32 {
  __m256 lo, hi;
  static F32 Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F32 Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F32 LoadBf16(const uint16_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(raw));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(raw, 1));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  }
  static F32 LoadF16(const uint16_t* p) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  void Store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
};

struct I32 {
  __m256i lo, hi;
  static I32 Set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I32 Load(const void* p) {
    const __m256i* q = static_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static I32 LoadU8(const uint8_t* p) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepu8_epi32(raw), _mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8))};
  }
  void Store(void* p) const {
    _mm256_storeu_si256(static_cast<__m256i*>(p), lo);
    _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, hi);
  }
  void StoreI8(int8_t* p) const {
    // packs works within 128-bit halves: put the four quarters back in order afterwards.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
    const __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
};

inline F32 Add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32 Sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32 Mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32 Div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32 Min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32 Max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32 MulAdd(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32 Abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32 IfLess(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline float ReduceMax(F32 a) {
  const __m256 m = _mm256_max_ps(a.lo, a.hi);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
inline float ReduceAdd(F32 a) {
  const __m256 m = _mm256_add_ps(a.lo, a.hi);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

inline I32 Add(I32 a, I32 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline I32 Sub(I32 a, I32 b) {
  return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
}
inline I32 Mul(I32 a, I32 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline I32 And(I32 a, I32 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
inline I32 Xor(I32 a, I32 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline I32 Shl(I32 a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
inline I32 Shr(I32 a, int n) { return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)}; }
inline I32 Sar(I32 a, int n) { return {_mm256_srai_epi32(a.lo, n), _mm256_srai_epi32(a.hi, n)}; }
inline int32_t ReduceAdd(I32 a) {
  const __m256i m = _mm256_add_epi32(a.lo, a.hi);
  __m128i q = _mm_add_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}

inline F32 ToF32(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I32 ToI32(F32 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F32 AsF32(I32 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

inline I32 AsI32(F32 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }

inline bool AnyByteClear(I32 a, I32 mask) {
  const I32 bits = And(a, mask);
  const __m256i zero = _mm256_setzero_si256();
  const __m256i clear =
      _mm256_or_si256(_mm256_cmpeq_epi8(bits.lo, zero), _mm256_cmpeq_epi8(bits.hi, zero));
  return _mm256_movemask_epi8(clear) != 0;
}

// pshufb looks up bytes, within halves of a register, and gives 0 where its index is negative.
template <class Table>
struct BytesOfHalves {
  alignas(32) uint8_t low[32] = {}, high[32] = {};
  constexpr BytesOfHalves() {
    for (int i = 0; i < 32; ++i) {
      low[i] = Table::kHalves[i % 16] & 255;
      high[i] = Table::kHalves[i % 16] >> 8;
    }
  }
};
template <class Table>
inline I32 LookupHalves(I32 a) {
  static constexpr BytesOfHalves<Table> kTable;
  const I32 index = And(a, I32::Set(0x000f000f));
  const I32 low_index = Xor(index, I32::Set(static_cast<int32_t>(0x80008000u)));
  const I32 high_index = Xor(Shl(index, 8), I32::Set(0x00800080));
  const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTable.low));
  const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(kTable.high));
  return {_mm256_or_si256(_mm256_shuffle_epi8(low, low_index.lo),
                          _mm256_shuffle_epi8(high, high_index.lo)),
          _mm256_or_si256(_mm256_shuffle_epi8(low, low_index.hi),
                          _mm256_shuffle_epi8(high, high_index.hi))};
}

inline I32 Bf16Pair(F32 even, F32 odd) { return Xor(Shr(AsI32(even), 16), AsI32(odd)); }

inline __m256i RoundToBf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  // Adding may carry a NaN out of its exponent.
  const __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(sum, nan, is_nan), 16);
}
inline I32 PackBf16(F32 low, F32 high) {
  // packus works within 128-bit halves: put the four quarters back in order afterwards.
  const auto pack = [](F32 x) {
    const __m256i mixed = _mm256_packus_epi32(RoundToBf16(x.lo), RoundToBf16(x.hi));
    return _mm256_permute4x64_epi64(mixed, 0xd8);
  };
  return {pack(low), pack(high)};
}

inline void Transpose8x8(__m256i* const (&r)[8]) {
  __m256i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_epi32(*r[i], *r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_epi32(*r[i], *r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = _mm256_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    *r[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
    *r[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
  }
}
inline void Transpose8x8(I32 (&rows)[8]) {
  __m256i *lo[8], *hi[8];
  for (int i = 0; i < 8; ++i) lo[i] = &rows[i].lo, hi[i] = &rows[i].hi;
  Transpose8x8(lo);
  Transpose8x8(hi);
}

inline int32_t FourBytes(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

#ifdef KT_HAS_VNNI256
inline __m256i DotBytes(__m256i acc, __m256i w, __m256i a) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(acc, w, a);
#else
  return _mm256_dpbusd_epi32(acc, w, a);
#endif
}
// `w` holds w + kInt8Offset as unsigned bytes: see format/int8.hpp.
inline I32 DotI8(I32 acc, I32 w, const void* a) {
  const __m256i x = _mm256_set1_epi32(FourBytes(a));
  return {DotBytes(acc.lo, w.lo, x), DotBytes(acc.hi, w.hi, x)};
}
inline I32 DotU8(I32 acc, I32 w, const void* a) { return DotI8(acc, w, a); }
#else
inline __m256i AddPairs(__m256i acc, __m256i products16) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(products16, _mm256_set1_epi16(1)));
}

// maddubs wants one unsigned operand: move the weights' signs to the activations. No saturation:
// 128 * 127 * 2 = 32512 fits int16 (activations are within -127..127, see moe/prepare-inl.hpp).
inline I32 DotI8(I32 acc, I32 w, const void* a) {
  const __m256i x = _mm256_set1_epi32(FourBytes(a));
  return {AddPairs(acc.lo, _mm256_maddubs_epi16(_mm256_abs_epi8(w.lo), _mm256_sign_epi8(x, w.lo))),
          AddPairs(acc.hi, _mm256_maddubs_epi16(_mm256_abs_epi8(w.hi), _mm256_sign_epi8(x, w.hi)))};
}
inline I32 DotU8(I32 acc, I32 w, const void* a) {
  const __m256i x = _mm256_set1_epi32(FourBytes(a));
  return {AddPairs(acc.lo, _mm256_maddubs_epi16(w.lo, x)),
          AddPairs(acc.hi, _mm256_maddubs_epi16(w.hi, x))};
}
#endif

inline F32 DotBf16(F32 acc, I32 w, const void* a) {
  const int32_t pair = FourBytes(a);
  const int32_t high = static_cast<int32_t>(0xffff0000u);
  const F32 even = AsF32(I32::Set(static_cast<int32_t>(static_cast<uint32_t>(pair) << 16)));
  const F32 odd = AsF32(I32::Set(pair & high));
  return MulAdd(AsF32(And(w, I32::Set(high))), odd, MulAdd(AsF32(Shl(w, 16)), even, acc));
}

template <bool kIsSigned>
inline I32 Dot(I32 acc, I32 w, const void* a) {
  return kIsSigned ? DotI8(acc, w, a) : DotU8(acc, w, a);
}

inline void Hide(I32& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }
inline void Hide(F32& a) { asm volatile("" : "+x"(a.lo), "+x"(a.hi)); }

}  // namespace
}  // namespace kt::KT_ISA
