// Few tokens times one packed panel. The weights pass by once, as one stream, and are unpacked on
// the way.
namespace kt::KT_ISA {
namespace {

// Weights come from DRAM. The hardware's prefetchers stop at the end of a page; this far ahead, in
// bytes, the software goes on. 4096 and 16384 are up to 8 % slower (Zen 5).
constexpr size_t kStreamAhead = 8192;

inline I32 LoadStreamed(const uint8_t* p) {
  __builtin_prefetch(p + kStreamAhead);
  I32 row = I32::Load(p);
  Hide(row);  // else the compiler loads it again for every operand it makes of it
  return row;
}

// 16 scales of a group; those of the small floats may be one byte.
template <class Format>
inline F32 LoadScales(const uint8_t* scales, ScaleType type) {
  if constexpr (!Format::kHasScale) return F32::Set(1.0f);
  if (type == ScaleType::kFloat32) return F32::Load(reinterpret_cast<const float*>(scales));
  if (type == ScaleType::kBf16) return F32::LoadBf16(reinterpret_cast<const uint16_t*>(scales));
  if (type == ScaleType::kFloat16) return F32::LoadF16(reinterpret_cast<const uint16_t*>(scales));
  const I32 byte = I32::LoadU8(scales);
  if (type == ScaleType::kE8m0) return AsF32(Shl(byte, 23));
  return AsF32(Add(Shl(byte, 20), I32::Set(117 << 23)));  // e5m3: see format/layout.hpp
}

// -1 times the sum of the activations of a group of weights: see ActivationRows.
inline F32 MinusSum(const ActivationRows& rows, const uint8_t* a, size_t group) {
  return F32::Set(reinterpret_cast<const float*>(a + rows.sum_offset)[group]);
}

// What a group stores beside its scales, for 16 outputs: see Offset. The other one is unused.
struct Offsets {
  I32 zero;
  F32 minimum;
};
template <class Format>
inline Offsets LoadOffsets(const uint8_t* offsets, ScaleType type) {
  if constexpr (Format::kOffset == Offset::kZeroPoint)
    return {I32::LoadU8(offsets), F32::Set(0.0f)};
  if constexpr (Format::kOffset == Offset::kMinimum)
    return {I32::Set(0), LoadScales<Format>(offsets, type)};
  return {I32::Set(0), F32::Set(0.0f)};
}

// Where a group of a packed panel lies.
struct GroupAt {
  const uint8_t *scales, *offsets, *weights;
};

// Calls body(GroupAt) for groups first..last-1 of a packed panel, in the order of the bytes. The
// first one must begin a block.
template <class Body>
inline void ForGroupsAt(const uint8_t* panel, const MatrixLayout& m, size_t first, size_t last,
                        const Body& body) {
  panel += m.Block(first);
  for (; first < last; first += m.block_groups) {
    const size_t end = first + m.block_groups < last ? first + m.block_groups : last;
    GroupAt at{panel, panel + m.block_groups * m.scale_bytes, panel + m.header_bytes};
    for (size_t g = first; g < end; ++g) {
      body(at);
      at.scales += m.scale_bytes, at.offsets += m.offset_bytes, at.weights += m.group_bytes;
    }
    panel = at.weights;
  }
}

// The same as body(scales, offsets, weights).
template <class Format, class Body>
inline void ForGroups(const uint8_t* panel, const MatrixLayout& m, size_t first, size_t last,
                      const Body& body) {
  F32 output_scales = F32::Set(1.0f);
  if (m.front_bytes) output_scales = F32::Load(reinterpret_cast<const float*>(panel));
  ForGroupsAt(panel, m, first, last, [&](GroupAt at) {
    F32 scale = LoadScales<Format>(at.scales, m.scale);
    if (m.front_bytes) scale = Mul(scale, output_scales);
    body(scale, LoadOffsets<Format>(at.offsets, m.scale), at.weights);
  });
}
template <class Format, class Body>
inline void ForGroups(const uint8_t* panel, const MatrixLayout& m, const Body& body) {
  ForGroups<Format>(panel, m, 0, m.groups, body);
}

// The weights of input j of a row, in float32.
template <class Format>
inline F32 Dequantize(I32 row, int j, F32 scale, Offsets offsets) {
  F32 value = Format::Value(row, j);
  if constexpr (Format::kOffset == Offset::kZeroPoint) value = Sub(value, ToF32(offsets.zero));
  if constexpr (Format::kHasScale) value = Mul(value, scale);
  if constexpr (Format::kOffset == Offset::kMinimum) value = Sub(value, offsets.minimum);
  return value;
}

// sums[m] -= minimum * sum of the group's activations, which Prepare() has taken.
template <class Format, int M>
inline void AddMinimums(F32 minimum, const ActivationRows& rows, const uint8_t* const* a,
                        size_t group, F32 (&sums)[M]) {
  if constexpr (Format::kOffset == Offset::kMinimum)
    for (int m = 0; m < M; ++m) sums[m] = MulAdd(minimum, MinusSum(rows, a[m], group), sums[m]);
}

// Few sums in flight would wait for each other: such a block has several of each. A bf16 dot
// product takes 6 cycles, and a row of 64 bytes should take no more than 6 (Zen 5).
template <int M>
constexpr int kChains = M == 1  ? 4
                        : M < 4 ? 2
                                : 1;

template <int C, class V, int M>
inline V SumOfChains(const V (&acc)[C][M], int m) {
  if constexpr (C == 4) return Add(Add(acc[0][m], acc[1][m]), Add(acc[2][m], acc[3][m]));
  if constexpr (C == 2) return Add(acc[0][m], acc[1][m]);
  return acc[0][m];
}

// out[m] = sum over groups of scale * sum over steps of a_scale * dot, the dots in int32. kStep
// inputs share a scale here and in the weights: see ActivationRows.
template <class Format, int kStep, int M>
inline void StreamInt8(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                       const uint8_t* const* a, F32 (&out)[M]) {
  constexpr int C = kChains<M>;
  constexpr int kRows = kStep / Format::kValuesPerRow;
  const size_t steps_per_group = layout.group_cols / kStep;
  const int scale_shift = __builtin_ctzll(rows.group / kStep);
  F32 sums[M];  // not `out`: the compiler would store it in every step
  for (F32& sum : sums) sum = F32::Set(0.0f);
  size_t s = 0, group = 0;
  ForGroups<Format>(panel, layout, [&](F32 scale, Offsets offsets, const uint8_t* weights) {
    const I32 offset = Format::DotOffset(offsets.zero);
    F32 group_sums[M];
    for (F32& sum : group_sums) sum = F32::Set(0.0f);
    for (const size_t end = s + steps_per_group; s < end; ++s, weights += kRows * kRowBytes) {
      I32 acc[C][M];
      for (int m = 0; m < M; ++m) {
        acc[0][m] = I32::Set(reinterpret_cast<const int32_t*>(a[m] + rows.correction_offset)[s]);
        for (int c = 1; c < C; ++c) acc[c][m] = I32::Set(0);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const I32 row = LoadStreamed(weights + r * kRowBytes);
        for (int i = 0; i < Format::kDotsPerRow; ++i) {
          const int chain = (r * Format::kDotsPerRow + i) % C;
          const I32 operand = Format::DotOperand(row, i, offset);
          const size_t k = s * kStep + static_cast<size_t>(r * Format::kValuesPerRow + 4 * i);
          for (int m = 0; m < M; ++m)
            acc[chain][m] = Dot<Format::kIsSigned>(acc[chain][m], operand, a[m] + k);
        }
      }
      for (int m = 0; m < M; ++m) {
        const I32 dot = SumOfChains<C>(acc, m);
        const float a_scale =
            reinterpret_cast<const float*>(a[m] + rows.scale_offset)[s >> scale_shift];
        group_sums[m] = MulAdd(ToF32(dot), F32::Set(a_scale), group_sums[m]);
      }
    }
    for (int m = 0; m < M; ++m) sums[m] = MulAdd(group_sums[m], scale, sums[m]);
    AddMinimums<Format>(offsets.minimum, rows, a, group++, sums);
  });
  for (int m = 0; m < M; ++m) out[m] = sums[m];
}

// out[m] = sum over groups of scale * dot, the products of bfloat16 summed in float32.
template <class Format, int M>
inline void StreamBf16(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                       const uint8_t* const* a, F32 (&out)[M]) {
  constexpr int C = kChains<M>;
  constexpr int kOperands = Format::kValuesPerRow / 2;  // of two inputs each
  constexpr int kRows = 16 / Format::kValuesPerRow;     // unrolled: 16 inputs
  F32 sums[M];
  for (F32& sum : sums) sum = F32::Set(0.0f);
  size_t k = 0, group = 0;
  ForGroups<Format>(panel, layout, [&](F32 scale, Offsets offsets, const uint8_t* weights) {
    F32 acc[C][M];
    for (auto& chain : acc)
      for (F32& sum : chain) sum = F32::Set(0.0f);
    for (const size_t end = k + layout.group_cols; k < end; k += 16, weights += kRows * kRowBytes)
      for (int r = 0; r < kRows; ++r) {
        const I32 row = LoadStreamed(weights + r * kRowBytes);
        for (int i = 0; i < kOperands; ++i) {
          const int chain = (r * kOperands + i) % C;
          const I32 operand = Format::Bf16Operand(row, i, offsets.zero);
          const size_t at = k + static_cast<size_t>(r * Format::kValuesPerRow + 2 * i);
          for (int m = 0; m < M; ++m)
            acc[chain][m] = DotBf16(acc[chain][m], operand, a[m] + 2 * at);
        }
      }
    for (int m = 0; m < M; ++m) sums[m] = MulAdd(SumOfChains<C>(acc, m), scale, sums[m]);
    AddMinimums<Format>(offsets.minimum, rows, a, group++, sums);
  });
  for (int m = 0; m < M; ++m) out[m] = sums[m];
}

// out[m] = sum of ((value - zero) * scale - minimum) * a, all in float32: the exact mode.
template <class Format, int M>
inline void StreamF32(const uint8_t* panel, const MatrixLayout& layout, const uint8_t* const* a,
                      F32 (&out)[M]) {
  F32 sums[M];
  for (F32& sum : sums) sum = F32::Set(0.0f);
  size_t k = 0;
  ForGroups<Format>(panel, layout, [&](F32 scale, Offsets offsets, const uint8_t* weights) {
    for (const size_t end = k + layout.group_cols; k < end; weights += kRowBytes) {
      const I32 row = I32::Load(weights);
      for (int j = 0; j < Format::kValuesPerRow; ++j, ++k) {
        const F32 value = Dequantize<Format>(row, j, scale, offsets);
        for (int m = 0; m < M; ++m)
          sums[m] = MulAdd(value, F32::Set(reinterpret_cast<const float*>(a[m])[k]), sums[m]);
      }
    }
  });
  for (int m = 0; m < M; ++m) out[m] = sums[m];
}

}  // namespace
}  // namespace kt::KT_ISA
