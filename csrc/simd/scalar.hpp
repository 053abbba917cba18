#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "format/float16.hpp"

// The vocabulary of one ISA: 16 lanes, the outputs of one packed panel, whatever the width of the
// machine's registers. This one is plain C++: slow, portable, and what the others are read against.
namespace kt::KT_ISA {
namespace {

constexpr int kTokenBlock = 2;      // tokens that share one pass over a panel
constexpr int kBf16TokenBlock = 2;  // the same, many tokens in bfloat16
constexpr int kInt8Offset = 0;      // DotI8 multiplies by (weight + kInt8Offset)

struct I32;

struct F32 {
  float v[16];
  static F32 Set(float x) {
    F32 r;
    for (float& e : r.v) e = x;
    return r;
  }
  static F32 Load(const float* p) {
    F32 r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static F32 LoadBf16(const uint16_t* p) {
    F32 r;
    for (int i = 0; i < 16; ++i) {
      const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
      memcpy(&r.v[i], &bits, 4);
    }
    return r;
  }
  static F32 LoadF16(const uint16_t* p) {
    F32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = Float16ToFloat(p[i]);
    return r;
  }
  void Store(float* p) const { memcpy(p, v, sizeof v); }
};

struct I32 {
  int32_t v[16];
  static I32 Set(int32_t x) {
    I32 r;
    for (int32_t& e : r.v) e = x;
    return r;
  }
  static I32 Load(const void* p) {
    I32 r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static I32 LoadU8(const uint8_t* p) {
    I32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = p[i];
    return r;
  }
  void Store(void* p) const { memcpy(p, v, sizeof v); }
  // Lanes must be within -128..127.
  void StoreI8(int8_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(v[i]);
  }
};

#define KT_LANES(type, expression)                    \
  type r;                                             \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r

inline F32 Add(F32 a, F32 b) { KT_LANES(F32, a.v[i] + b.v[i]); }
inline F32 Sub(F32 a, F32 b) { KT_LANES(F32, a.v[i] - b.v[i]); }
inline F32 Mul(F32 a, F32 b) { KT_LANES(F32, a.v[i] * b.v[i]); }
inline F32 Div(F32 a, F32 b) { KT_LANES(F32, a.v[i] / b.v[i]); }
inline F32 MulAdd(F32 a, F32 b, F32 c) { KT_LANES(F32, a.v[i] * b.v[i] + c.v[i]); }
// As the x86 instructions do: the second operand where either is NaN.
inline F32 Min(F32 a, F32 b) { KT_LANES(F32, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F32 Max(F32 a, F32 b) { KT_LANES(F32, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F32 Abs(F32 a) { KT_LANES(F32, fabsf(a.v[i])); }
inline F32 IfLess(F32 a, F32 b, F32 yes, F32 no) {
  KT_LANES(F32, a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
inline float ReduceMax(F32 a) {
  float m = a.v[0];
  for (float e : a.v) m = e > m ? e : m;
  return m;
}
inline float ReduceAdd(F32 a) {
  float s = 0;
  for (float e : a.v) s += e;
  return s;
}

inline I32 Add(I32 a, I32 b) { KT_LANES(I32, a.v[i] + b.v[i]); }
inline I32 Sub(I32 a, I32 b) { KT_LANES(I32, a.v[i] - b.v[i]); }
inline I32 Mul(I32 a, I32 b) { KT_LANES(I32, a.v[i] * b.v[i]); }
inline I32 And(I32 a, I32 b) { KT_LANES(I32, a.v[i] & b.v[i]); }
inline I32 Xor(I32 a, I32 b) { KT_LANES(I32, a.v[i] ^ b.v[i]); }
inline I32 Shl(I32 a, int n) {
  KT_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n));
}
inline I32 Shr(I32 a, int n) {
  KT_LANES(I32, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n));
}
inline I32 Sar(I32 a, int n) { KT_LANES(I32, a.v[i] >> n); }
inline int32_t ReduceAdd(I32 a) {
  int32_t s = 0;
  for (int32_t e : a.v) s += e;
  return s;
}

inline F32 ToF32(I32 a) { KT_LANES(F32, static_cast<float>(a.v[i])); }
// To the nearest integer, ties to even. Lanes must be within the range of int32.
inline I32 ToI32(F32 a) { KT_LANES(I32, static_cast<int32_t>(nearbyintf(a.v[i]))); }
inline F32 AsF32(I32 a) {
  F32 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
inline I32 AsI32(F32 a) {
  I32 r;
  memcpy(r.v, a.v, sizeof r.v);
  return r;
}
#undef KT_LANES

// Whether any byte of `a` has none of the bits of `mask`.
inline bool AnyByteClear(I32 a, I32 mask) {
  uint8_t bytes[64];
  memcpy(bytes, And(a, mask).v, 64);
  bool any = false;
  for (uint8_t byte : bytes) any |= byte == 0;
  return any;
}

// Table::kHalves[i] for each 16-bit half, i its low 4 bits.
template <class Table>
inline I32 LookupHalves(I32 a) {
  uint16_t halves[32];
  memcpy(halves, a.v, 64);
  for (uint16_t& half : halves) half = Table::kHalves[half & 15];
  return I32::Load(halves);
}

// bfloat16 `even` in the low and `odd` in the high half of each lane; both must be exact.
inline I32 Bf16Pair(F32 even, F32 odd) { return Xor(Shr(AsI32(even), 16), AsI32(odd)); }

// Lanes n and n + 1 of `low` as bfloat16 in lane n / 2, those of `high` in lane 8 + n / 2; rounded
// to nearest, ties to even.
inline I32 PackBf16(F32 low, F32 high) {
  uint16_t halves[32];
  for (int i = 0; i < 32; ++i) {
    uint32_t bits;
    memcpy(&bits, i < 16 ? &low.v[i] : &high.v[i - 16], 4);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    halves[i] = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u
                                             : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  return I32::Load(halves);
}

// Lanes 0..7 and lanes 8..15 of eight rows are two matrices of 8 x 8: transposes both.
inline void Transpose8x8(I32 (&rows)[8]) {
  for (int half = 0; half < 16; half += 8)
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < i; ++j) {
        const int32_t kept = rows[i].v[half + j];
        rows[i].v[half + j] = rows[j].v[half + i];
        rows[j].v[half + i] = kept;
      }
}

// acc[n] += sum_{j<4} w[n][j] * a[j] over int8; `a` points at 4 bytes.
inline I32 DotI8(I32 acc, I32 w, const void* a) {
  int8_t x[4], y[64];
  memcpy(x, a, 4);
  memcpy(y, w.v, 64);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += y[4 * i + j] * x[j];
  return acc;
}
// The same with unsigned weights of at most 7 bits.
inline I32 DotU8(I32 acc, I32 w, const void* a) { return DotI8(acc, w, a); }

// acc[n] += sum_{j<2} w[n][j] * a[j] over bfloat16; `a` points at 2 of them.
inline F32 DotBf16(F32 acc, I32 w, const void* a) {
  uint32_t pair;
  memcpy(&pair, a, 4);
  const F32 even = AsF32(I32::Set(static_cast<int32_t>(pair << 16)));
  const F32 odd = AsF32(I32::Set(static_cast<int32_t>(pair & 0xffff0000u)));
  const I32 high = I32::Set(static_cast<int32_t>(0xffff0000u));
  return MulAdd(AsF32(And(w, high)), odd, MulAdd(AsF32(Shl(w, 16)), even, acc));
}

template <bool kIsSigned>
inline I32 Dot(I32 acc, I32 w, const void* a) {
  return kIsSigned ? DotI8(acc, w, a) : DotU8(acc, w, a);
}

// The compiler no longer knows the value: for tile/peak.hpp, whose loops it would else see through.
inline void Hide(I32& a) { asm volatile("" : "+m"(a)); }
inline void Hide(F32& a) { asm volatile("" : "+m"(a)); }

}  // namespace
}  // namespace kt::KT_ISA
