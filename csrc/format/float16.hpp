#pragma once
#include <stdint.h>
#include <string.h>

#include "format/layout.hpp"

namespace kt {

KT_INLINE float Float16ToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
    const float x = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (mantissa << 13);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace kt
