// Many tokens times two panels: M * 2 sums stay in registers, a row of weights is loaded once for M
// tokens. What bfloat16 activations meet was unpacked before, and then looks the same whatever the
// weight format.
namespace kt::KT_ISA {
namespace {

// Inputs first..last-1. Wide products take the inputs of two panels range by range, so that the
// unpacked weights of a range stay in the L1 cache while all tokens meet them.
struct InputRange {
  size_t first, last;
};

// A panel of dot operands: 64-byte rows of 16 outputs x 4 int8 or 2 bfloat16, of one range.
struct UnpackedPanel {
  const uint8_t* weights;
  const float* scales;  // [groups][16]; null where all inputs share one
};
struct Unpacked {
  UnpackedPanel panels[2];
};

// Brings what is wanted next into the L2 cache. A pass over the weights asks for a few lines in
// every step: all at once they would fill the load queue, and the dot products would wait.
class Prefetch {
 public:
  Prefetch() : Prefetch({{}, {}}, 1) {}
  Prefetch(const Wanted (&next)[2], size_t steps)
      : first_lines_(Lines(next[0])),
        lines_(first_lines_ + Lines(next[1])),
        lines_per_step_(lines_ / steps + 1),
        first_(next[0].at),
        second_(next[1].at) {}

  void Step() {
    for (size_t i = 0; i < lines_per_step_ && line_ < lines_; ++i, ++line_)
      __builtin_prefetch(line_ < first_lines_ ? first_ + line_ * kRowBytes
                                              : second_ + (line_ - first_lines_) * kRowBytes,
                         0, 2);
  }
  void Skip(size_t steps) { line_ += steps * lines_per_step_; }

 private:
  static size_t Lines(Wanted wanted) { return (wanted.bytes + kRowBytes - 1) / kRowBytes; }

  size_t line_ = 0;
  size_t first_lines_, lines_, lines_per_step_;
  const uint8_t *first_, *second_;
};

// sums[m][n] += the products of a range, for M tokens and two panels; = those of the first range.
using PairSums = float[2][kPanel];

// The sums so far: none before the first range.
template <int M>
inline void LoadSums(const PairSums* from, InputRange range, F32 (&sums)[M][2]) {
  if (range.first == 0) {
    for (auto& token : sums) token[0] = token[1] = F32::Set(0.0f);
    return;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    sums[m][0] = F32::Load(from[m][0]), sums[m][1] = F32::Load(from[m][1]);
}
template <int M>
inline void StoreSums(const F32 (&sums)[M][2], PairSums* to) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) sums[m][0].Store(to[m][0]), sums[m][1].Store(to[m][1]);
}

// The packed rows of one group of both panels, or a range of them, and what belongs to them.
struct PairOfRows {
  const uint8_t* rows[2];
  F32 scales[2];
  I32 offsets[2];  // of operands: see DotOffset() in csrc/format/
};

// Calls body(PairOfRows, inputs) for the groups of a range of two panels, the second of which
// begins `to_second` bytes behind the first. Where all inputs are one group, once, and without its
// scales.
template <class Format, bool kIsGrouped, class Body>
inline void ForPairGroups(const uint8_t* panel, size_t to_second, InputRange range,
                          const MatrixLayout& m, const Body& body) {
  const auto call = [&](GroupAt at, size_t inputs) {
    PairOfRows pair;
    for (size_t n = 0; n < 2; ++n) {
      pair.rows[n] = at.weights + n * to_second;
      const Offsets stored = LoadOffsets<Format>(at.offsets + n * to_second, m.scale);
      pair.offsets[n] = Format::DotOffset(stored.zero);
      if (kIsGrouped) pair.scales[n] = LoadScales<Format>(at.scales + n * to_second, m.scale);
    }
    body(pair, inputs);
  };
  if constexpr (kIsGrouped)
    ForGroupsAt(panel, m, range.first / m.group, range.last / m.group,
                [&](GroupAt at) { call(at, m.group); });
  else
    ForGroupsAt(panel, m, 0, 1, [&](GroupAt at) {
      at.weights += range.first / Format::kValuesPerRow * kRowBytes;
      call(at, range.last - range.first);
    });
}

// Adds, over the steps of the range, scale * a_scale * dot, the dots in int32. Packed rows become
// operands on the way: the few instructions for that run beside the dot products, and weights that
// were unpacked before would have to be stored and take more room in the L1 cache. A scale that all
// inputs share is left to the caller, here and below.
template <class Format, bool kIsGrouped, int kStep, int M>
[[gnu::noinline]] void WideInt8(const uint8_t* panel, size_t to_second, InputRange range,
                                const MatrixLayout& layout, const ActivationRows& rows,
                                const uint8_t* const* a, Prefetch prefetch, PairSums* out) {
  constexpr int kRows = kStep / Format::kValuesPerRow;
  const int scale_shift = __builtin_ctzll(rows.group / kStep);
  size_t s = range.first / kStep;
  F32 sums[M][2];  // not `out`: the compiler would store it in every step
  LoadSums(out, range, sums);
  ForPairGroups<Format, kIsGrouped>(panel, to_second, range, layout, [&](PairOfRows p, size_t n) {
    for (const size_t end = s + n / kStep; s < end; ++s) {
      I32 acc[M][2];
      for (int m = 0; m < M; ++m)
        acc[m][0] = acc[m][1] =
            I32::Set(reinterpret_cast<const int32_t*>(a[m] + rows.correction_offset)[s]);
      prefetch.Step();
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r, p.rows[0] += kRowBytes, p.rows[1] += kRowBytes) {
        const I32 left = I32::Load(p.rows[0]), right = I32::Load(p.rows[1]);
        for (int i = 0; i < Format::kDotsPerRow; ++i) {
          const I32 first = Format::DotOperand(left, i, p.offsets[0]);
          const I32 second = Format::DotOperand(right, i, p.offsets[1]);
          for (int m = 0; m < M; ++m) {
            const uint8_t* inputs = a[m] + s * kStep + r * Format::kValuesPerRow + 4 * i;
            acc[m][0] = Dot<Format::kIsSigned>(acc[m][0], first, inputs);
            acc[m][1] = Dot<Format::kIsSigned>(acc[m][1], second, inputs);
          }
        }
      }
      for (int m = 0; m < M; ++m) {
        const F32 a_scale =
            F32::Set(reinterpret_cast<const float*>(a[m] + rows.scale_offset)[s >> scale_shift]);
        for (int n = 0; n < 2; ++n) {
          const F32 scale = kIsGrouped ? Mul(p.scales[n], a_scale) : a_scale;
          sums[m][n] = MulAdd(ToF32(acc[m][n]), scale, sums[m][n]);
        }
      }
    }
  });
  StoreSums(sums, out);
}

// Adds, over the groups of the range, scale * dot, the products of bfloat16 summed in float32.
template <int M>
[[gnu::noinline]] void WideBf16(const Unpacked& w, InputRange range, const MatrixLayout& layout,
                                const uint8_t* const* a, Prefetch prefetch, PairSums* out) {
  const float* scales[2] = {w.panels[0].scales, w.panels[1].scales};
  const uint8_t *left_row = w.panels[0].weights, *right_row = w.panels[1].weights;
  for (size_t k = range.first; k < range.last;) {
    F32 acc[M][2];
    const InputRange group{k, scales[0] ? k + layout.group_cols : range.last};
    if (scales[0] == nullptr) LoadSums(out, range, acc);
    else
      for (auto& token : acc) token[0] = token[1] = F32::Set(0.0f);
    while (k < group.last) {
      prefetch.Step();
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r, k += 2, left_row += kRowBytes, right_row += kRowBytes) {
        const I32 left = I32::Load(left_row), right = I32::Load(right_row);
        for (int m = 0; m < M; ++m) {
          acc[m][0] = DotBf16(acc[m][0], left, a[m] + 2 * k);
          acc[m][1] = DotBf16(acc[m][1], right, a[m] + 2 * k);
        }
      }
    }
    if (scales[0] == nullptr) {
      StoreSums(acc, out);
      continue;
    }
    const F32 left = F32::Load(scales[0]), right = F32::Load(scales[1]);
    scales[0] += kPanel, scales[1] += kPanel;
    F32 sums[M][2];
    LoadSums(out, group, sums);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      MulAdd(acc[m][0], left, sums[m][0]).Store(out[m][0]);
      MulAdd(acc[m][1], right, sums[m][1]).Store(out[m][1]);
    }
  }
}

}  // namespace
}  // namespace kt::KT_ISA
