// What quantising has in common: rounding, scales, and the group of inputs that shares one. Plain
// loops, which the compiler vectorises for the ISA at hand. The numbers are those of
// kt_core/quant/reference.py, bit for bit: no fused multiply-add may be formed here (the build
// passes -ffp-contract=off).
namespace kt::KT_ISA {
namespace {

// |x| <= 2^22, to nearest, ties to even: adding 1.5 * 2^23 leaves no fraction bits.
inline float RoundEven(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float ClampTo(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

inline bool IsFinite(float x) { return fabsf(x) <= 3.402823466e38f; }

inline uint32_t BitsOf(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float FromBits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline float LargestMagnitude(const float* x, size_t n) {
  float largest = 0.0f;
  for (size_t i = 0; i < n; ++i) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
  return largest;
}

// |x| rounded to a float of kMantissa bits whose smallest normal number is 2^kSmallest: the bits of
// its exponent and mantissa. |x| must not be beyond the largest one.
template <int kMantissa, int kSmallest>
inline uint32_t RoundMagnitude(float x) {
  constexpr int kDropped = 23 - kMantissa;
  constexpr uint32_t kBias = static_cast<uint32_t>(126 + kSmallest) << kMantissa;
  const uint32_t bits = BitsOf(x) & 0x7fffffffu;
  const uint32_t half = (1u << (kDropped - 1)) - 1 + ((bits >> kDropped) & 1);
  const uint32_t normal = ((bits + half) >> kDropped) - kBias;
  // Below, steps are even: adding a number whose last bit is that step rounds to it.
  constexpr uint32_t kMagic = static_cast<uint32_t>(127 + kSmallest - kMantissa + 23) << 23;
  const uint32_t subnormal = BitsOf(FromBits(bits) + FromBits(kMagic)) - kMagic;
  return bits < static_cast<uint32_t>(127 + kSmallest) << 23 ? subnormal : normal;
}

// The scale of a group as it is stored, and its zero point or minimum.
struct GroupCode {
  float scale;
  uint8_t zero;
  float minimum;
};

// To nearest, ties to even; what is too large, and NaN, becomes an infinity.
inline uint16_t ToFloat16(float x) {
  const uint32_t sign = BitsOf(x) >> 16 & 0x8000u;
  // 65520 is the middle between the largest number and 2^16.
  return static_cast<uint16_t>(sign | (fabsf(x) < 65520.0f ? RoundMagnitude<10, -14>(x) : 0x7c00u));
}

// The scale as it can be stored; infinite where that type cannot hold it.
inline float StoredScale(float scale, ScaleType type) {
  switch (type) {
    case ScaleType::kBf16: return Bf16ToFloat(ToBf16(scale));
    case ScaleType::kFloat16: return Float16ToFloat(ToFloat16(scale));
    default: return scale;
  }
}

constexpr float kLargestE4m3 = 448.0f;

// x >= 0, at most 448, to the nearest e4m3.
inline float RoundE4m3(float x) {
  const uint32_t bits = RoundMagnitude<3, -6>(x);
  return bits < 8 ? static_cast<float>(bits) * 0.001953125f : FromBits((bits << 20) + (120u << 23));
}

// Symmetric integers: codes within low..high.
inline GroupCode QuantizeSymmetric(const float* x, size_t n, ScaleType type, float low, float high,
                                   uint8_t* codes) {
  const float scale = StoredScale(LargestMagnitude(x, n) / high, type);
  for (size_t i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(
        static_cast<int32_t>(scale > 0 ? RoundEven(ClampTo(x[i] / scale, low, high)) : 0.0f));
  return {scale, 0, 0.0f};
}

struct Range {
  float low, high;
};

// Of n numbers and 0.
inline Range RangeWithZero(const float* x, size_t n) {
  Range range{0.0f, 0.0f};
  for (size_t i = 0; i < n; ++i) {
    range.low = x[i] < range.low ? x[i] : range.low;
    range.high = x[i] > range.high ? x[i] : range.high;
  }
  return range;
}

// weight = scale * code - minimum, codes within 0..high. The range has 0 in it, so that a group
// padded with zeros has the scale of its weights.
inline GroupCode QuantizeFromMinimum(const float* x, size_t n, ScaleType type, float high,
                                     uint8_t* codes) {
  const Range range = RangeWithZero(x, n);
  const float minimum = StoredScale(0.0f - range.low, type);  // never -0
  const float scale = StoredScale((range.high + minimum) / high, type);
  if (!(scale > 0)) {
    memset(codes, 0, n);
    return {};
  }
  for (size_t i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(RoundEven(ClampTo((x[i] + minimum) / scale, 0.0f, high)));
  return {scale, 0, minimum};
}

// Small floats. `output_scale` counts where scales are e4m3.
template <class Format>
inline GroupCode QuantizeFloat(const float* x, size_t n, ScaleType type, float output_scale,
                               uint8_t* codes) {
  const float largest = LargestMagnitude(x, n);
  float scale, step;
  if (type == ScaleType::kE8m0) {
    // OCP Microscaling Formats 1.0, section 6.3: the exponent of the largest, less that of the
    // largest number of the element. What lies beyond that number is clamped.
    const int exponent = static_cast<int>(BitsOf(largest) >> 23) - Format::kLargestExponent;
    step = scale = FromBits(static_cast<uint32_t>(exponent < 1 ? 1 : exponent) << 23);
    if (largest == 0) scale = FromBits(1u << 22);  // 2^-127, the least there is
  } else if (type == ScaleType::kE4m3) {
    const float wanted = output_scale > 0 ? largest / Format::kLargest / output_scale : 0.0f;
    scale = RoundE4m3(ClampTo(wanted, 0.0f, kLargestE4m3));
    step = scale * output_scale;
  } else {
    step = scale = StoredScale(largest / Format::kLargest, type);
  }
  for (size_t i = 0; i < n; ++i) {
    const float q = step > 0 ? ClampTo(x[i] / step, -Format::kLargest, Format::kLargest) : 0.0f;
    codes[i] = Format::Encode(q);
  }
  return {scale, 0, 0.0f};
}

// Reads two bfloat16 of a lane apart.
inline F32 HalfValue(I32 pair, bool is_odd) {
  return AsF32(is_odd ? And(pair, I32::Set(static_cast<int32_t>(0xffff0000u))) : Shl(pair, 16));
}

}  // namespace
}  // namespace kt::KT_ISA
