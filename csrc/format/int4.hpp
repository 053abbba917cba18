// int4 weights, stored as unsigned nibbles: weight + 8 where the format is symmetric, the code
// itself where it has zero points or minimums. A 64-byte row: for output n, byte j (0..3) of lane n
// holds input k+j in its low nibble and input k+4+j in its high nibble, so that one mask or one
// shift makes a row of four consecutive inputs per output, ready for a dot product.
namespace kt::KT_ISA {
namespace {

template <Offset kOffsetType>
struct Int4 {
  static constexpr int kValuesPerRow = 8;
  static constexpr bool kHasScale = true;
  static constexpr Offset kOffset = kOffsetType;
  static constexpr bool kHasInt8 = true;
  static constexpr bool kIsBf16Operand = false;
  static constexpr bool kIsSmallFloat = false;
  static constexpr int kSmallestGroup = 32;
  // The nibble of a weight of 0 where the format is symmetric; else the code is what is stored.
  static constexpr int kBias = kOffset == Offset::kNone ? 8 : 0;

  static I32 Nibble(I32 row, int j) {
    return And(Shr(row, j < 4 ? 8 * j : 8 * (j - 4) + 4), I32::Set(15));
  }
  static F32 Value(I32 row, int j) {
    return ToF32(kBias == 0 ? Nibble(row, j) : Sub(Nibble(row, j), I32::Set(kBias)));
  }
  // Inputs 2i and 2i + 1, less the zero point: integers from -16 to 15, exact.
  static I32 Bf16Operand(I32 row, int i, I32 zero) {
    I32 even = Nibble(row, 2 * i), odd = Nibble(row, 2 * i + 1);
    if constexpr (kOffset != Offset::kMinimum) {
      const I32 z = kOffset == Offset::kZeroPoint ? zero : I32::Set(kBias);
      even = Sub(even, z), odd = Sub(odd, z);
    }
    return Bf16Pair(ToF32(even), ToF32(odd));
  }

  static constexpr bool kIsSigned = false;
  static constexpr int kDotsPerRow = 2;
  // Operands are code - zero point + kDotZero.
  static constexpr int kDotZero = kOffset == Offset::kZeroPoint ? 16 : kBias;
  // What DotOperand takes for `zero`: 16 - zero in every byte. Zero points are 0..16 (GPTQ stores
  // them less one), so that code - zero + 16 is in 0..31.
  static I32 DotOffset(I32 zero) { return Mul(Sub(I32::Set(16), zero), I32::Set(0x01010101)); }
  static constexpr bool kIsDotOperand = false;  // a row is not what DotOperand makes of it
  static I32 DotOperand(I32 row, int i, I32 offset) {
    const I32 codes = And(i == 0 ? row : Shr(row, 4), I32::Set(0x0f0f0f0f));
    return kOffset == Offset::kZeroPoint ? Add(codes, offset) : codes;  // no byte carries
  }

  static constexpr float kLargestCode = 15.0f;
  using Code = uint8_t;
  static GroupCode Quantize(const float* x, size_t n, const MatrixLayout& m, float, Code* codes) {
    if (kOffset == Offset::kZeroPoint) return QuantizeAsymmetric(x, n, m.scale, codes);
    if (kOffset == Offset::kMinimum) return QuantizeFromMinimum(x, n, m.scale, kLargestCode, codes);
    const GroupCode group = QuantizeSymmetric(x, n, m.scale, -8.0f, 7.0f, codes);
    for (size_t i = 0; i < n; ++i) codes[i] = FromCanonical(codes[i]);
    return group;
  }
  static Code FromCanonical(uint8_t code) { return static_cast<Code>(code + kBias); }
  static bool IsNumber(uint8_t) { return true; }
  static uint32_t Lane(const Code* codes) {
    uint64_t eight;
    memcpy(&eight, codes, 8);
    return static_cast<uint32_t>(eight | eight >> 28);
  }

 private:
  static GroupCode QuantizeAsymmetric(const float* x, size_t n, ScaleType type, Code* codes) {
    const Range range = RangeWithZero(x, n);
    const float scale = StoredScale((range.high - range.low) / 15.0f, type);
    if (!(scale > 0)) {
      memset(codes, 0, n);
      return {};
    }
    const float zero = RoundEven(ClampTo(-range.low / scale, 0.0f, 15.0f));
    for (size_t i = 0; i < n; ++i) {
      const float q = RoundEven(ClampTo(x[i] / scale, -15.0f, 15.0f)) + zero;
      codes[i] = static_cast<uint8_t>(ClampTo(q, 0.0f, 15.0f));
    }
    return {scale, static_cast<uint8_t>(zero), 0.0f};
  }
};

}  // namespace
}  // namespace kt::KT_ISA
