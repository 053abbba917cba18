// One packed panel times M tokens: out[m][n] = weight[n] . a[m], n < 16. Scales, zero points and
// groups are dealt with here; how rows of weights become products is tile/'s business, how bytes
// become rows format/'s.
namespace kt::KT_ISA {
namespace {

inline F32 LoadScale(const uint8_t* panel, const MatrixLayout& m, size_t group) {
  const size_t first = (m.group ? group : 0) * kPanel;
  return m.scale == ScaleType::kBf16
             ? F32::LoadBf16(reinterpret_cast<const uint16_t*>(panel) + first)
             : F32::Load(reinterpret_cast<const float*>(panel) + first);
}

inline I32 LoadZero(const uint8_t* panel, const MatrixLayout& m, size_t group) {
  return I32::LoadU8(panel + m.zero_offset + (m.group ? group : 0) * kPanel);
}

// Inputs of the g-th group; the last one is shorter where per-output formats are padded to 64.
inline size_t GroupSize(const ActivationRows& a, size_t g) {
  const size_t left = a.padded_cols - g * a.group;
  return left < a.group ? left : a.group;
}

template <class Format, int M>
inline void PanelInt8(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                      const uint8_t* const* a, F32 (&out)[M]) {
  const uint8_t* weights = panel + layout.weight_offset;
  const int8_t* values[M];
  for (int m = 0; m < M; ++m) {
    values[m] = reinterpret_cast<const int8_t*>(a[m]);
    out[m] = F32::Set(0.0f);
  }
  for (size_t g = 0; g < rows.groups; ++g) {
    const size_t inputs = GroupSize(rows, g);
    I32 acc[M];
    for (int m = 0; m < M; ++m) {
      const int32_t correction = reinterpret_cast<const int32_t*>(a[m] + rows.correction_offset)[g];
      acc[m] = I32::Set(correction);
      if (Format::kHasZeroPoint) acc[m] = Mul(acc[m], LoadZero(panel, layout, g));
    }
    MulAddInt8<Format, M>(weights, inputs / Format::kValuesPerRow, values, acc);
    const F32 scale = LoadScale(panel, layout, g);
    for (int m = 0; m < M; ++m) {
      const float a_scale = reinterpret_cast<const float*>(a[m] + rows.scale_offset)[g];
      out[m] = MulAdd(Mul(ToF32(acc[m]), F32::Set(a_scale)), scale, out[m]);
      values[m] += inputs;
    }
    weights += inputs / Format::kValuesPerRow * kRowBytes;
  }
}

template <class Format, int M>
inline void PanelF32(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                     const uint8_t* const* a, F32 (&out)[M]) {
  const uint8_t* weights = panel + layout.weight_offset;
  const float* values[M];
  for (int m = 0; m < M; ++m) {
    values[m] = reinterpret_cast<const float*>(a[m]);
    out[m] = F32::Set(0.0f);
  }
  for (size_t g = 0; g < rows.groups; ++g) {
    const size_t inputs = GroupSize(rows, g);
    const F32 scale = Format::kIsInteger ? LoadScale(panel, layout, g) : F32::Set(1.0f);
    const F32 zero = Format::kHasZeroPoint ? ToF32(LoadZero(panel, layout, g)) : F32::Set(0.0f);
    MulAddF32<Format, M>(weights, inputs / Format::kValuesPerRow, zero, scale, values, out);
    for (int m = 0; m < M; ++m) values[m] += inputs;
    weights += inputs / Format::kValuesPerRow * kRowBytes;
  }
}

template <int M>
inline void PanelBf16(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                      const uint8_t* const* a, F32 (&out)[M]) {
  const uint16_t* values[M];
  for (int m = 0; m < M; ++m) {
    values[m] = reinterpret_cast<const uint16_t*>(a[m]);
    out[m] = F32::Set(0.0f);
  }
  MulAddBf16<M>(panel + layout.weight_offset, rows.padded_cols / Bf16::kValuesPerRow, values, out);
}

// The combinations that exist. A new format is one more alias here and one case in VisitProduct.
template <class Format>
struct Int8Product {
  template <int M>
  static void Run(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                  const uint8_t* const* a, F32 (&out)[M]) {
    PanelInt8<Format, M>(panel, layout, rows, a, out);
  }
};
template <class Format>
struct F32Product {
  template <int M>
  static void Run(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                  const uint8_t* const* a, F32 (&out)[M]) {
    PanelF32<Format, M>(panel, layout, rows, a, out);
  }
};
struct Bf16Product {
  template <int M>
  static void Run(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                  const uint8_t* const* a, F32 (&out)[M]) {
    PanelBf16<M>(panel, layout, rows, a, out);
  }
};

// --8<-- [start:visit]
// Calls visitor(Product{}) with the product for this format and precision. The choice is made once
// per call of a kernel, outside every loop.
template <class Visitor>
inline void VisitProduct(const MatrixLayout& layout, Precision precision, const Visitor& visitor) {
  const bool fast = precision == Precision::kInt8;
  switch (layout.element) {
    case Element::kBf16:
      return precision == Precision::kBf16 ? visitor(Bf16Product{}) : visitor(F32Product<Bf16>{});
    case Element::kInt8: return fast ? visitor(Int8Product<Int8>{}) : visitor(F32Product<Int8>{});
    case Element::kInt4:
      if (layout.has_zero_point)
        return fast ? visitor(Int8Product<Int4<true>>{}) : visitor(F32Product<Int4<true>>{});
      return fast ? visitor(Int8Product<Int4<false>>{}) : visitor(F32Product<Int4<false>>{});
  }
}
// --8<-- [end:visit]

// Calls body(first token, Size<M>) over 0..count-1 in blocks of kTokenBlock, then of smaller powers
// of two.
template <int M>
struct Size {
  static constexpr int kValue = M;
};
template <int M, class Body>
inline void ForTokenBlocks(size_t first, size_t count, const Body& body) {
  for (; first + M <= count; first += M) body(first, Size<M>{});
  if constexpr (M > 1) ForTokenBlocks<M / 2>(first, count, body);
}

}  // namespace
}  // namespace kt::KT_ISA
