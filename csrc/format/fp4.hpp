// fp4 weights, e2m1 (OCP Microscaling Formats 1.0): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
// A 64-byte row: for output n, nibble i (0..3) of the low half of lane n holds input k+2i, nibble i
// of the high half input k+2i+1, so that a shift brings two consecutive inputs to the low ends of
// both halves, where a table turns them into bfloat16.
namespace kt::KT_ISA {
namespace {

struct Fp4 {
  static constexpr int kValuesPerRow = 8;
  static constexpr bool kHasScale = true;
  static constexpr Offset kOffset = Offset::kNone;
  static constexpr bool kHasInt8 = false;
  static constexpr bool kIsBf16Operand = false;
  static constexpr bool kIsSmallFloat = true;

  static F32 Value(I32 row, int j) {
    return HalfValue(Bf16Operand(row, j / 2, I32::Set(0)), j % 2 == 1);
  }
  static I32 Bf16Operand(I32 row, int i, I32) { return LookupHalves<Table>(Shr(row, 4 * i)); }

  static constexpr float kLargest = 6.0f;
  static constexpr int kLargestExponent = 2;
  using Code = uint8_t;
  static Code Encode(float x) {
    return static_cast<Code>(RoundMagnitude<1, 0>(x) | (BitsOf(x) >> 28 & 8u));
  }
  static GroupCode Quantize(const float* x, size_t n, const MatrixLayout& m, float output_scale,
                            Code* codes) {
    return QuantizeFloat<Fp4>(x, n, m.scale, output_scale, codes);
  }
  static Code FromCanonical(uint8_t code) { return code; }
  static bool IsNumber(uint8_t) { return true; }
  static uint32_t Lane(const Code* codes) {
    uint32_t lane = 0;
    for (int i = 0; i < 4; ++i)
      lane |= static_cast<uint32_t>(codes[2 * i]) << (4 * i) |
              static_cast<uint32_t>(codes[2 * i + 1]) << (16 + 4 * i);
    return lane;
  }

 private:
  struct Table {
    static constexpr uint16_t kHalves[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                             0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                             0xc000, 0xc040, 0xc080, 0xc0c0};
  };
};

}  // namespace
}  // namespace kt::KT_ISA
