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
  static constexpr int kDotsPerRow = 2;
  static constexpr int kDotZero = 8;

  static F32 Value(I32 row, int j) {
    const int shift = j < 4 ? 8 * j : 8 * (j - 4) + 4;
    const I32 code = And(Shr(row, shift), I32::Set(15));
    return ToF32(kZeroPoint ? code : Add(code, I32::Set(-8)));
  }
  static I32 DotOperand(I32 row, int i) {
    return And(i == 0 ? row : Shr(row, 4), I32::Set(0x0f0f0f0f));
  }
  static I32 Dot(I32 acc, I32 operand, const void* a) { return DotU4(acc, operand, a); }
};

}  // namespace
}  // namespace kt::KT_ISA
