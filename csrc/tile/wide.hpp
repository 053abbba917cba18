// Many tokens times two panels that were unpacked before: M * 2 sums stay in registers, a row of
// weights is loaded once for M tokens. What is unpacked looks the same whatever the weight format.
namespace kt::KT_ISA {
namespace {

// Two panels of dot operands: 64-byte rows of 16 outputs x 4 int8 or 2 bfloat16.
struct Unpacked {
  const uint8_t* weights[2];
  // [groups][16], and as many minimums behind them where the format has those; null: all 1
  const float* scales[2];
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

// out[m][n] = sum over steps of scale * a_scale * dot, the dots in int32.
template <bool kIsSigned, bool kIsGrouped, int kStep, int M>
inline void WideInt8(const Unpacked& w, const MatrixLayout& layout, const ActivationRows& rows,
                     const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][2]) {
  constexpr int kRows = kStep / 4;
  const size_t steps = rows.padded_cols / kStep;
  const int scale_shift = __builtin_ctzll(rows.group / kStep);
  const int group_shift = kIsGrouped ? __builtin_ctzll(layout.group / kStep) : 0;
  F32 sums[M][2];  // not `out`: the compiler would store it in every step
  for (auto& token : sums) token[0] = token[1] = F32::Set(0.0f);
  for (size_t s = 0; s < steps; ++s) {
    I32 acc[M][2];
    for (int m = 0; m < M; ++m)
      acc[m][0] = acc[m][1] =
          I32::Set(reinterpret_cast<const int32_t*>(a[m] + rows.correction_offset)[s]);
    prefetch.Step();
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const size_t k = s * kStep + static_cast<size_t>(4 * r);
      const I32 left = I32::Load(w.weights[0] + k * kPanel);
      const I32 right = I32::Load(w.weights[1] + k * kPanel);
      for (int m = 0; m < M; ++m) {
        acc[m][0] = Dot<kIsSigned>(acc[m][0], left, a[m] + k);
        acc[m][1] = Dot<kIsSigned>(acc[m][1], right, a[m] + k);
      }
    }
    const size_t at = (s >> group_shift) * kPanel;
    for (int m = 0; m < M; ++m) {
      const F32 a_scale =
          F32::Set(reinterpret_cast<const float*>(a[m] + rows.scale_offset)[s >> scale_shift]);
      for (int n = 0; n < 2; ++n) {
        // One scale for all inputs is applied once, below.
        const F32 scale = kIsGrouped ? Mul(F32::Load(w.scales[n] + at), a_scale) : a_scale;
        sums[m][n] = MulAdd(ToF32(acc[m][n]), scale, sums[m][n]);
      }
    }
  }
  for (int n = 0; n < 2; ++n)
    for (int m = 0; m < M; ++m)
      out[m][n] = kIsGrouped ? sums[m][n] : Mul(sums[m][n], F32::Load(w.scales[n]));
}

// out[m][n] = sum over groups of scale * dot, the products of bfloat16 summed in float32.
template <int M>
inline void WideBf16(const Unpacked& w, const MatrixLayout& layout, const uint8_t* const* a,
                     Prefetch prefetch, F32 (&out)[M][2]) {
  F32 sums[M][2];
  for (auto& token : sums) token[0] = token[1] = F32::Set(0.0f);
  size_t k = 0;
  for (size_t g = 0; g < layout.groups; ++g) {
    F32 acc[M][2];
    for (auto& token : acc) token[0] = token[1] = F32::Set(0.0f);
    for (const size_t end = k + layout.group_cols; k < end;) {
      prefetch.Step();
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r, k += 2) {
        const I32 left = I32::Load(w.weights[0] + k * kRowBytes / 2);
        const I32 right = I32::Load(w.weights[1] + k * kRowBytes / 2);
        for (int m = 0; m < M; ++m) {
          acc[m][0] = DotBf16(acc[m][0], left, a[m] + 2 * k);
          acc[m][1] = DotBf16(acc[m][1], right, a[m] + 2 * k);
        }
      }
    }
    for (int n = 0; n < 2; ++n) {
      const F32 scale = w.scales[n] ? F32::Load(w.scales[n] + g * kPanel) : F32::Set(1.0f);
      for (int m = 0; m < M; ++m) sums[m][n] = MulAdd(acc[m][n], scale, sums[m][n]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < 2; ++n) out[m][n] = sums[m][n];
}

// out[m][n] -= sum over groups of minimum * sum of the activations, which Prepare() has taken.
template <int M>
inline void AddMinimums(const Unpacked& w, const MatrixLayout& layout, const ActivationRows& rows,
                        const uint8_t* const* a, F32 (&out)[M][2]) {
  for (size_t g = 0; g < layout.groups; ++g) {
    const size_t at = (layout.groups + g) * kPanel;
    const F32 left = F32::Load(w.scales[0] + at), right = F32::Load(w.scales[1] + at);
    for (int m = 0; m < M; ++m) {
      const F32 minus_sum = MinusSum(rows, a[m], g);
      out[m][0] = MulAdd(left, minus_sum, out[m][0]);
      out[m][1] = MulAdd(right, minus_sum, out[m][1]);
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA
