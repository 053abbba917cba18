// The GEMM vocabulary of the vector ISAs: M tokens times one packed panel, accumulated in
// registers. Each call walks `rows` 64-byte rows of weights once; a row is unpacked once for all M
// tokens.
namespace kt::KT_ISA {
namespace {

// acc[m][n] += dot over int8; a[m] points at the token's value for the first input.
template <class Format, int M>
inline void MulAddInt8(const uint8_t* weights, size_t rows, const int8_t* const* a, I32 (&acc)[M]) {
  for (size_t r = 0; r < rows; ++r) {
    const I32 row = I32::Load(weights + r * kRowBytes);
    for (int i = 0; i < Format::kDotsPerRow; ++i) {
      const I32 operand = Format::DotOperand(row, i);
      const size_t k = r * Format::kValuesPerRow + 4 * static_cast<size_t>(i);
      for (int m = 0; m < M; ++m) acc[m] = Format::Dot(acc[m], operand, a[m] + k);
    }
  }
}

template <int M>
inline void MulAddBf16(const uint8_t* weights, size_t rows, const uint16_t* const* a,
                       F32 (&acc)[M]) {
  for (size_t r = 0; r < rows; ++r) {
    const I32 row = I32::Load(weights + r * kRowBytes);
    for (int m = 0; m < M; ++m) acc[m] = DotBf16(acc[m], row, a[m] + 2 * r);
  }
}

// acc[m][n] += sum of (value - zero[n]) * scale[n] * a[m], all in float32.
template <class Format, int M>
inline void MulAddF32(const uint8_t* weights, size_t rows, F32 zero, F32 scale,
                      const float* const* a, F32 (&acc)[M]) {
  for (size_t r = 0; r < rows; ++r) {
    const I32 row = I32::Load(weights + r * kRowBytes);
    for (int j = 0; j < Format::kValuesPerRow; ++j) {
      F32 w = Format::Value(row, j);
      if (Format::kHasZeroPoint) w = Sub(w, zero);
      if (Format::kIsInteger) w = Mul(w, scale);
      const size_t k = r * Format::kValuesPerRow + static_cast<size_t>(j);
      for (int m = 0; m < M; ++m) acc[m] = MulAdd(w, F32::Set(a[m][k]), acc[m]);
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA
