// fp8 weights, e4m3 (OCP 8-bit Floating Point 1.0: no infinity, NaN in two codes that are refused).
// A 64-byte row: for output n, inputs k, k+2, k+1, k+3 in the four bytes of lane n, low first, so
// that a shift brings two consecutive inputs into the two halves of a lane.
namespace kt::KT_ISA {
namespace {

struct Fp8 {
  static constexpr int kValuesPerRow = 4;
  static constexpr bool kHasScale = true;
  static constexpr Offset kOffset = Offset::kNone;
  static constexpr bool kHasInt8 = false;
  static constexpr bool kIsBf16Operand = false;
  static constexpr bool kIsSmallFloat = true;

  static F32 Value(I32 row, int j) {
    return HalfValue(Bf16Operand(row, j / 2, I32::Set(0)), j % 2 == 1);
  }
  // Inputs 2i and 2i + 1. Exponent and mantissa stand at their places in bfloat16, the exponent's
  // bias is changed from 7 to 127.
  static I32 Bf16Operand(I32 row, int i, I32) {
    const I32 magnitude = And(i == 0 ? Shl(row, 4) : Shr(row, 4), I32::Set(0x07f007f0));
    const I32 sign = And(i == 0 ? Shl(row, 8) : row, I32::Set(static_cast<int32_t>(0x80008000u)));
    I32 pair = Add(magnitude, I32::Set(0x3c003c00));
    if (AnyByteClear(row, I32::Set(0x78787878))) [[unlikely]]  // an exponent of 0
      pair = Bf16Pair(WithSubnormals(And(magnitude, I32::Set(0x7f0)), HalfValue(pair, false)),
                      WithSubnormals(Shr(magnitude, 16), HalfValue(pair, true)));
    return Xor(pair, sign);
  }

  static constexpr float kLargest = 448.0f;
  static constexpr int kLargestExponent = 8;
  using Code = uint8_t;
  static Code Encode(float x) {
    return static_cast<Code>(RoundMagnitude<3, -6>(x) | (BitsOf(x) >> 24 & 0x80u));
  }
  static GroupCode Quantize(const float* x, size_t n, const MatrixLayout& m, float output_scale,
                            Code* codes) {
    return QuantizeFloat<Fp8>(x, n, m.scale, output_scale, codes);
  }
  static Code FromCanonical(uint8_t code) { return code; }
  static bool IsNumber(uint8_t code) { return (code & 0x7fu) != 0x7fu; }
  static uint32_t Lane(const Code* codes) {
    return codes[0] | static_cast<uint32_t>(codes[2]) << 8 | static_cast<uint32_t>(codes[1]) << 16 |
           static_cast<uint32_t>(codes[3]) << 24;
  }

 private:
  // Magnitudes below 2^-6 are multiples of 2^-9.
  static F32 WithSubnormals(I32 magnitude, F32 normal) {
    const F32 steps = Mul(ToF32(Shr(magnitude, 4)), F32::Set(0.001953125f));
    return IfLess(steps, F32::Set(0.015625f), steps, normal);
  }
};

}  // namespace
}  // namespace kt::KT_ISA
