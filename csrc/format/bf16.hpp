// bfloat16 weights. A 64-byte row: for output n, inputs k and k+1 in bits 0..15 and 16..31 of
// lane n.
namespace kt::KT_ISA {
namespace {

struct Bf16 {
  static constexpr int kValuesPerRow = 2;  // inputs in one 64-byte row
  static constexpr bool kIsInteger = false;
  static constexpr bool kHasZeroPoint = false;
  static constexpr bool kIsBf16Operand = true;

  static F32 Value(I32 row, int j) {
    return AsF32(j == 0 ? Shl(row, 16) : And(row, I32::Set(static_cast<int32_t>(0xffff0000u))));
  }
  static I32 Bf16Operand(I32 row, int, I32) { return row; }
};

}  // namespace
}  // namespace kt::KT_ISA
