#pragma once
#include <stdint.h>
#include <string.h>

#include "format/layout.hpp"

namespace kt {

// Round to nearest, ties to even; NaN stays NaN.
KT_INLINE uint16_t ToBf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

KT_INLINE float Bf16ToFloat(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace kt
