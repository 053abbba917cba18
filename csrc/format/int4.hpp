// int4 weights, stored as unsigned nibbles: weight + 8 where the format is symmetric, the code
// itself where it has zero points. A 64-byte row: for output n, byte j (0..3) of lane n holds input
// k+j in its low nibble and input k+4+j in its high nibble, so that one mask or one shift makes a
// row of four consecutive inputs per output, ready for a dot product.
namespace kt::KT_ISA {
namespace {

template <bool kZeroPoint>
struct Int4 {
  static constexpr int kValuesPerRow = 8;
  static constexpr bool kIsInteger = true;
  static constexpr bool kHasZeroPoint = kZeroPoint;
  static constexpr bool kIsBf16Operand = false;
  static constexpr bool kIsSigned = false;
  static constexpr int kDotsPerRow = 2;
  static constexpr int kDotZero = kZeroPoint ? 16 : 8;  // operands are weight + kDotZero

  static I32 Code(I32 row, int j) {
    return And(Shr(row, j < 4 ? 8 * j : 8 * (j - 4) + 4), I32::Set(15));
  }
  static F32 Value(I32 row, int j) {
    return ToF32(kZeroPoint ? Code(row, j) : Add(Code(row, j), I32::Set(-8)));
  }
  // Inputs 2i and 2i + 1, less the zero point: integers from -15 to 15, exact.
  static I32 Bf16Operand(I32 row, int i, I32 zero) {
    const I32 z = kZeroPoint ? zero : I32::Set(8);
    return Bf16Pair(ToF32(Sub(Code(row, 2 * i), z)), ToF32(Sub(Code(row, 2 * i + 1), z)));
  }
  // What DotOperand takes for `zero`: 16 - zero in every byte, so that code - zero + 16 is
  // in 1..31.
  static I32 DotOffset(I32 zero) { return Mul(Sub(I32::Set(16), zero), I32::Set(0x01010101)); }
  static I32 DotOperand(I32 row, int i, I32 offset) {
    const I32 codes = And(i == 0 ? row : Shr(row, 4), I32::Set(0x0f0f0f0f));
    return kZeroPoint ? Add(codes, offset) : codes;  // no byte carries
  }
};

}  // namespace
}  // namespace kt::KT_ISA
