// bfloat16 weights. A 64-byte row: for output n, inputs k and k+1 in bits 0..15 and 16..31 of
// lane n.
namespace kt::KT_ISA {
namespace {

struct Bf16 {
  static constexpr int kValuesPerRow = 2;  // inputs in one 64-byte row
  static constexpr bool kHasScale = false;
  static constexpr Offset kOffset = Offset::kNone;
  static constexpr bool kHasInt8 = false;  // no products with int8 activations
  static constexpr bool kIsBf16Operand = true;
  static constexpr bool kIsSmallFloat = false;

  static F32 Value(I32 row, int j) { return HalfValue(row, j == 1); }
  static I32 Bf16Operand(I32 row, int, I32) { return row; }

  using Code = uint16_t;
  // A scale that is not finite: a weight is not, or rounds to infinity.
  static GroupCode Quantize(const float* x, size_t n, const MatrixLayout&, float, Code* codes) {
    uint32_t bad = 0;
    for (size_t i = 0; i < n; ++i) {
      codes[i] = ToBf16(x[i]);
      bad |= (codes[i] & 0x7f80u) == 0x7f80u;
    }
    return {bad ? HUGE_VALF : 1.0f, 0, 0.0f};
  }
  static uint32_t Lane(const Code* codes) {
    return codes[0] | static_cast<uint32_t>(codes[1]) << 16;
  }
};

}  // namespace
}  // namespace kt::KT_ISA
