// The GEMM vocabulary of the vector ISAs: M tokens times N panels, accumulated in registers. Each
// call walks the weights once, row by row of 64 bytes; a row is unpacked once for all M tokens.
namespace kt::KT_ISA {
namespace {

// N panels: where their scales and zero points are, and where their weights, which is behind the
// scales in a packed panel and somewhere else in one that was unpacked.
template <int N>
struct Panels {
  const uint8_t* header[N];
  const uint8_t* weights[N];
};

// Bytes that will be wanted soon. A pass over the weights asks for a few lines in every step: all
// at once they would fill the load queue, and the dot products would wait.
struct Prefetch {
  const uint8_t* at;
  size_t lines_per_step;

  void Step() {
    for (size_t i = 0; i < lines_per_step; ++i, at += kRowBytes) __builtin_prefetch(at, 0, 2);
  }
};

// Weights come from DRAM as one stream. The hardware's prefetchers stop at the end of a page; this
// far ahead, in bytes, the software goes on.
constexpr size_t kStreamAhead = 4096;

// Rows that were unpacked into dot operands: one 64-byte row is four inputs.
template <class Format>
struct Int8Rows {
  static constexpr int kValuesPerRow = 4;
  static constexpr int kDotsPerRow = 1;
  static I32 DotOperand(I32 row, int) { return row; }
  static I32 Dot(I32 acc, I32 operand, const void* a) { return Format::Dot(acc, operand, a); }
};
struct Bf16Rows {
  static constexpr int kValuesPerRow = 2;
  static I32 Bf16Operand(I32 row, int, I32) { return row; }
};

inline F32 LoadScale(const uint8_t* panel, const MatrixLayout& m, size_t group) {
  return m.scale == ScaleType::kBf16
             ? F32::LoadBf16(reinterpret_cast<const uint16_t*>(panel) + group * kPanel)
             : F32::Load(reinterpret_cast<const float*>(panel) + group * kPanel);
}

inline I32 LoadZero(const uint8_t* panel, const MatrixLayout& m, size_t group) {
  return I32::LoadU8(panel + m.zero_offset + group * kPanel);
}

// Few sums in flight would wait for each other: such a block has two of each.
template <int M, int N>
constexpr int kChains = M * N < 4 ? 2 : 1;

// out[m][n] = sum over steps of scale * a_scale * dot, the dots in int32.
// kStep inputs share a scale: see ActivationRows.
template <class Format, class Rows, bool kGrouped, int kStep, int M, int N>
inline void MultiplyInt8(const Panels<N>& w, const MatrixLayout& layout, const ActivationRows& rows,
                         const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][N]) {
  constexpr int kRows = kStep / Rows::kValuesPerRow;
  constexpr int C = kChains<M, N>;
  const size_t steps = rows.padded_cols / kStep;
  const int scale_shift = __builtin_ctzll(rows.group / kStep);
  const int group_shift = kGrouped ? __builtin_ctzll(layout.group / kStep) : 63;
  F32 sums[M][N];  // not `out`: the compiler would store it in every step
  for (auto& token : sums)
    for (F32& sum : token) sum = F32::Set(0.0f);
  for (size_t s = 0; s < steps; ++s) {
    const size_t group = kGrouped ? s >> group_shift : 0;
    I32 acc[C][M][N];
    for (int m = 0; m < M; ++m) {
      const I32 start =
          I32::Set(reinterpret_cast<const int32_t*>(a[m] + rows.correction_offset)[s]);
      for (int n = 0; n < N; ++n) {
        acc[0][m][n] =
            Format::kHasZeroPoint ? Mul(start, LoadZero(w.header[n], layout, group)) : start;
        if (C > 1) acc[C - 1][m][n] = I32::Set(0);
      }
    }
    prefetch.Step();
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      I32 row[N];
      for (int n = 0; n < N; ++n) {
        const uint8_t* p = w.weights[n] + (s * kRows + static_cast<size_t>(r)) * kRowBytes;
        row[n] = I32::Load(p);
        if (N == 1) __builtin_prefetch(p + kStreamAhead, 0, 3);
      }
      for (int i = 0; i < Rows::kDotsPerRow; ++i) {
        const int chain = (r * Rows::kDotsPerRow + i) % C;
        const size_t k = s * kStep + static_cast<size_t>(r * Rows::kValuesPerRow + 4 * i);
        I32 operand[N];
        for (int n = 0; n < N; ++n) operand[n] = Rows::DotOperand(row[n], i);
        for (int m = 0; m < M; ++m)
          for (int n = 0; n < N; ++n)
            acc[chain][m][n] = Rows::Dot(acc[chain][m][n], operand[n], a[m] + k);
      }
    }
    F32 scale[N];
    if (kGrouped)
      for (int n = 0; n < N; ++n) scale[n] = LoadScale(w.header[n], layout, group);
    for (int m = 0; m < M; ++m) {
      const F32 a_scale =
          F32::Set(reinterpret_cast<const float*>(a[m] + rows.scale_offset)[s >> scale_shift]);
      for (int n = 0; n < N; ++n) {
        const I32 dot = C > 1 ? Add(acc[0][m][n], acc[C - 1][m][n]) : acc[0][m][n];
        // One scale for all inputs is applied once, below.
        const F32 factor = kGrouped ? Mul(scale[n], a_scale) : a_scale;
        sums[m][n] = MulAdd(ToF32(dot), factor, sums[m][n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    const F32 scale = kGrouped ? F32::Set(1.0f) : LoadScale(w.header[n], layout, 0);
    for (int m = 0; m < M; ++m) out[m][n] = kGrouped ? sums[m][n] : Mul(sums[m][n], scale);
  }
}

// out[m][n] = sum over groups of scale * dot, the products of bfloat16 summed in float32.
template <class Format, class Rows, int M, int N>
inline void MultiplyBf16(const Panels<N>& w, const MatrixLayout& layout, const ActivationRows& rows,
                         const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][N]) {
  constexpr int kOperands = Rows::kValuesPerRow / 2;  // of two inputs each
  constexpr int kUnit = 16 / Rows::kValuesPerRow;
  constexpr int C = kChains<M, N>;
  const size_t groups = layout.group ? layout.groups : 1;
  const size_t inputs = layout.group ? layout.group : rows.padded_cols;
  F32 sums[M][N];  // not `out`: the compiler would store it in every step
  for (auto& token : sums)
    for (F32& sum : token) sum = F32::Set(0.0f);
  size_t at = 0, k = 0;
  for (size_t g = 0; g < groups; ++g) {
    F32 acc[C][M][N];
    for (auto& chain : acc)
      for (auto& token : chain)
        for (F32& sum : token) sum = F32::Set(0.0f);
    I32 zero[N];
    for (int n = 0; n < N; ++n)
      zero[n] = Format::kHasZeroPoint ? LoadZero(w.header[n], layout, g) : I32::Set(0);
    for (const size_t end = k + inputs; k < end; k += 16, at += kUnit * kRowBytes) {
      if (k % rows.step == 0) prefetch.Step();
      for (int u = 0; u < kUnit; ++u) {
        I32 row[N];
        for (int n = 0; n < N; ++n) {
          const uint8_t* p = w.weights[n] + at + static_cast<size_t>(u) * kRowBytes;
          row[n] = I32::Load(p);
          if (N == 1) __builtin_prefetch(p + kStreamAhead, 0, 3);
        }
        for (int i = 0; i < kOperands; ++i) {
          const int chain = (u * kOperands + i) % C;
          const size_t first = k + static_cast<size_t>(u * Rows::kValuesPerRow + 2 * i);
          I32 operand[N];
          for (int n = 0; n < N; ++n) operand[n] = Rows::Bf16Operand(row[n], i, zero[n]);
          for (int m = 0; m < M; ++m)
            for (int n = 0; n < N; ++n)
              acc[chain][m][n] = DotBf16(acc[chain][m][n], operand[n], a[m] + 2 * first);
        }
      }
    }
    for (int n = 0; n < N; ++n) {
      const F32 scale = Format::kIsInteger ? LoadScale(w.header[n], layout, g) : F32::Set(1.0f);
      for (int m = 0; m < M; ++m) {
        const F32 dot = C > 1 ? Add(acc[0][m][n], acc[C - 1][m][n]) : acc[0][m][n];
        sums[m][n] = MulAdd(dot, scale, sums[m][n]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m][n] = sums[m][n];
}

// out[m] = sum of (value - zero) * scale * a, all in float32.
template <class Format, int M>
inline void MultiplyF32(const uint8_t* panel, const MatrixLayout& layout,
                        const ActivationRows& rows, const uint8_t* const* a, F32 (&out)[M][1]) {
  const size_t groups = layout.group ? layout.groups : 1;
  const size_t inputs = layout.group ? layout.group : rows.padded_cols;
  const uint8_t* weights = panel + layout.weight_offset;
  for (int m = 0; m < M; ++m) out[m][0] = F32::Set(0.0f);
  size_t k = 0;
  for (size_t g = 0; g < groups; ++g) {
    const F32 scale = Format::kIsInteger ? LoadScale(panel, layout, g) : F32::Set(1.0f);
    const F32 zero = Format::kHasZeroPoint ? ToF32(LoadZero(panel, layout, g)) : F32::Set(0.0f);
    for (const size_t end = k + inputs; k < end; weights += kRowBytes) {
      const I32 row = I32::Load(weights);
      for (int j = 0; j < Format::kValuesPerRow; ++j, ++k) {
        F32 value = Format::Value(row, j);
        if (Format::kHasZeroPoint) value = Sub(value, zero);
        if (Format::kIsInteger) value = Mul(value, scale);
        for (int m = 0; m < M; ++m) {
          const float x = reinterpret_cast<const float*>(a[m])[k];
          out[m][0] = MulAdd(value, F32::Set(x), out[m][0]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA
