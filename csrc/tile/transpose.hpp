// Packed panels with inputs and outputs exchanged, for products that sum over the outputs: lanes
// are 16 inputs, and what was the panel's lane becomes the position in the row.
namespace kt::KT_ISA {
namespace {

// Where inputs first..first+15 of every panel lie: they never straddle two groups.
struct InputBlock {
  size_t scales, offsets, weights;  // in bytes from a panel's first one
};

template <class Format>
inline InputBlock BlockOfInputs(const MatrixLayout& m, size_t first) {
  const size_t group = first / m.group_cols, in_group = first % m.group_cols;
  return {m.Scales(group), m.Offsets(group),
          m.Weights(group) + in_group / Format::kValuesPerRow * kRowBytes};
}

// values[k] = the weights of input first + k for the panel's 16 outputs.
template <class Format>
inline void DequantizeBlock(const uint8_t* panel, const InputBlock& at, const MatrixLayout& m,
                            F32 (&values)[kPanel]) {
  F32 scale = LoadScales<Format>(panel + at.scales, m.scale);
  if (m.front_bytes) scale = Mul(scale, F32::Load(reinterpret_cast<const float*>(panel)));
  const Offsets offsets = LoadOffsets<Format>(panel + at.offsets, m.scale);
  constexpr int V = Format::kValuesPerRow;
#pragma GCC unroll 8
  for (int r = 0; r < static_cast<int>(kPanel) / V; ++r) {
    const I32 row = I32::Load(panel + at.weights + static_cast<size_t>(r) * kRowBytes);
#pragma GCC unroll 8
    for (int j = 0; j < V; ++j) values[r * V + j] = Dequantize<Format>(row, j, scale, offsets);
  }
}

// Eight 64-byte rows of dot operands: of 16 inputs, two outputs each.
template <class Format>
inline void TransposeToBf16(const uint8_t* panel, const InputBlock& at, const MatrixLayout& m,
                            uint8_t* to) {
  F32 values[kPanel];
  DequantizeBlock<Format>(panel, at, m, values);
  I32 rows[8];
  for (int i = 0; i < 8; ++i) rows[i] = PackBf16(values[i], values[i + 8]);
  Transpose8x8(rows);
  for (size_t i = 0; i < 8; ++i) rows[i].Store(to + i * kRowBytes);
}

// Sixteen rows, one output each, of 16 inputs.
template <class Format>
inline void TransposeToF32(const uint8_t* panel, const InputBlock& at, const MatrixLayout& m,
                           float* to) {
  F32 values[kPanel];
  DequantizeBlock<Format>(panel, at, m, values);
  float block[kPanel][kPanel];
  for (size_t k = 0; k < kPanel; ++k) values[k].Store(block[k]);
  for (size_t n = 0; n < kPanel; ++n)
    for (size_t k = 0; k < kPanel; ++k) to[n * kPanel + k] = block[k][n];
}

// out[m][n] = sum over k of w[n][k] * a[m][k], in float32. The weights are rows of 16 lanes.
template <int M>
inline void WideF32(const float* const (&w)[2], size_t length, const float* const* a,
                    PairSums* out) {
  F32 sums[M][2];
  for (auto& token : sums) token[0] = token[1] = F32::Set(0.0f);
  for (size_t k = 0; k < length; ++k) {
    const F32 left = F32::Load(w[0] + k * kPanel), right = F32::Load(w[1] + k * kPanel);
    for (int m = 0; m < M; ++m) {
      const F32 x = F32::Set(a[m][k]);
      sums[m][0] = MulAdd(left, x, sums[m][0]);
      sums[m][1] = MulAdd(right, x, sums[m][1]);
    }
  }
  StoreSums(sums, out);
}

}  // namespace
}  // namespace kt::KT_ISA
