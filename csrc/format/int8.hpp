// int8 weights, stored as weight + 128: instructions that multiply unsigned by signed bytes take
// them as they lie. A 64-byte row: for output n, inputs k..k+3 in the four bytes of lane n, low
// first.
namespace kt::KT_ISA {
namespace {

struct Int8 {
  static constexpr int kValuesPerRow = 4;
  static constexpr bool kHasScale = true;
  static constexpr Offset kOffset = Offset::kNone;
  static constexpr bool kHasInt8 = true;
  static constexpr bool kIsBf16Operand = false;
  static constexpr bool kIsSmallFloat = false;
  static constexpr int kSmallestGroup = 16;

  // Adding 128 to a byte is flipping its top bit.
  static I32 Flip(I32 row) { return Xor(row, I32::Set(static_cast<int32_t>(0x80808080u))); }
  static F32 Value(I32 row, int j) { return ToF32(Sar(Shl(Flip(row), 24 - 8 * j), 24)); }
  static I32 Bf16Operand(I32 row, int i, I32) {
    return Bf16Pair(Value(row, 2 * i), Value(row, 2 * i + 1));
  }

  static constexpr bool kIsSigned = true;
  static constexpr int kDotsPerRow = 1;         // groups of four inputs in one row
  static constexpr int kDotZero = kInt8Offset;  // operands are weight + kDotZero
  static I32 DotOffset(I32) { return I32::Set(0); }
  static constexpr bool kIsDotOperand = kInt8Offset == 128;
  static I32 DotOperand(I32 row, int, I32) { return kIsDotOperand ? row : Flip(row); }

  using Code = uint8_t;
  static GroupCode Quantize(const float* x, size_t n, const MatrixLayout& m, float, Code* codes) {
    return QuantizeSymmetric(x, n, m.scale, -127.0f, 127.0f, codes);
  }
  static Code FromCanonical(uint8_t code) { return code; }
  static bool IsNumber(uint8_t) { return true; }
  static uint32_t Lane(const Code* codes) {
    uint32_t lane;
    memcpy(&lane, codes, 4);
    return lane ^ 0x80808080u;
  }
};

}  // namespace
}  // namespace kt::KT_ISA
