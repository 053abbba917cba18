// From checkpoint to panels: what the weights become is csrc/format/'s, where they go is
// format/layout.hpp's.
namespace kt::KT_ISA {
namespace {

// n elements, `stride` apart, as float32.
inline void LoadElements(const SourceMatrix& s, ptrdiff_t at, ptrdiff_t stride, size_t n,
                         float* to) {
  if (s.type == DType::kFloat32) {
    const float* p = static_cast<const float*>(s.data) + at;
    for (size_t i = 0; i < n; ++i) to[i] = p[static_cast<ptrdiff_t>(i) * stride];
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(s.data) + at;
  if (s.type == DType::kBf16 && stride == 1) {
    for (size_t i = 0; i < n; ++i) to[i] = Bf16ToFloat(p[i]);
  } else if (s.type == DType::kBf16) {
    for (size_t i = 0; i < n; ++i) to[i] = Bf16ToFloat(p[static_cast<ptrdiff_t>(i) * stride]);
  } else {
    for (size_t i = 0; i < n; ++i) to[i] = Float16ToFloat(p[static_cast<ptrdiff_t>(i) * stride]);
  }
}

// The 16 rows of a panel (fewer in the last) as float32 [16][padded_cols], zero-padded.
inline void LoadPanel(const PackArgs& args, size_t panel, float* values) {
  const MatrixLayout& m = *args.layout;
  const SourceMatrix& s = args.source;
  const size_t first = panel * kPanel;
  const size_t rows = m.rows - first < kPanel ? m.rows - first : kPanel;
  memset(values, 0, kPanel * m.padded_cols * sizeof(float));
  if (s.row_stride == 1 && s.col_stride != 1) {  // transposed on disk: 16 outputs lie together
    float column[kPanel];
    for (size_t c = 0; c < m.cols; ++c) {
      LoadElements(s, static_cast<ptrdiff_t>(first) + static_cast<ptrdiff_t>(c) * s.col_stride, 1,
                   rows, column);
      for (size_t r = 0; r < rows; ++r) values[r * m.padded_cols + c] = column[r];
    }
    return;
  }
  for (size_t r = 0; r < rows; ++r)
    LoadElements(s, static_cast<ptrdiff_t>(first + r) * s.row_stride, s.col_stride, m.cols,
                 values + r * m.padded_cols);
}

inline bool AllFinite(const float* x, size_t n) {
  uint32_t bad = 0;  // of integers, or the loop would not be vectorised
  for (size_t i = 0; i < n; ++i) bad |= fabsf(x[i]) <= 3.402823466e38f ? 0u : 1u;
  return bad == 0;
}

// A scale, or a minimum, among the 16 at `scales`.
inline void StoreScale(uint8_t* scales, ScaleType type, size_t output, float scale) {
  switch (type) {
    case ScaleType::kNone: return;
    case ScaleType::kFloat32: memcpy(scales + output * 4, &scale, 4); return;
    case ScaleType::kBf16: reinterpret_cast<uint16_t*>(scales)[output] = ToBf16(scale); return;
    case ScaleType::kFloat16:
      reinterpret_cast<uint16_t*>(scales)[output] = ToFloat16(scale);
      return;
    case ScaleType::kE8m0: scales[output] = static_cast<uint8_t>(BitsOf(scale) >> 23); return;
    case ScaleType::kE4m3:  // as e5m3: see format/layout.hpp
      scales[output] = scale > 0 ? static_cast<uint8_t>((BitsOf(scale) >> 20) - (117 << 3)) : 0;
      return;
  }
}

inline void StoreOutputScale(uint8_t* panel, size_t output, float scale) {
  memcpy(panel + output * sizeof scale, &scale, sizeof scale);
}

// Codes [16][padded_cols] to 64-byte rows.
template <class Format>
inline void InterleaveCodes(const typename Format::Code* codes, const MatrixLayout& m,
                            uint8_t* panel) {
  for (size_t g = 0; g < m.groups; ++g) {
    uint8_t* target = panel + m.Weights(g);
    const size_t first = g * m.group_cols, last = first + m.group_cols;
    for (size_t k = first; k < last; k += Format::kValuesPerRow)
      for (size_t n = 0; n < kPanel; ++n, target += 4) {
        const uint32_t lane = Format::Lane(codes + n * m.padded_cols + k);
        memcpy(target, &lane, 4);
      }
  }
}

template <class Format>
inline bool QuantizePanel(const PackArgs& args, size_t panel, float* values, uint8_t* target) {
  const MatrixLayout& m = *args.layout;
  auto* codes = reinterpret_cast<typename Format::Code*>(values + kPanel * m.padded_cols);
  LoadPanel(args, panel, values);
  if (!AllFinite(values, kPanel * m.padded_cols)) return false;
  bool ok = true;
  for (size_t n = 0; n < kPanel; ++n) {
    const float* row = values + n * m.padded_cols;
    float output_scale = 1.0f;
    if constexpr (Format::kIsSmallFloat)
      if (m.scale == ScaleType::kE4m3) {
        output_scale = LargestMagnitude(row, m.padded_cols) / (Format::kLargest * kLargestE4m3);
        StoreOutputScale(target, n, output_scale);
      }
    for (size_t g = 0; g < m.groups; ++g) {
      const size_t first = g * m.group_cols;
      const GroupCode group = Format::Quantize(row + first, m.group_cols, m, output_scale,
                                               codes + n * m.padded_cols + first);
      ok &= IsFinite(group.scale) && IsFinite(group.minimum);
      StoreScale(target + m.Scales(g), m.scale, n, group.scale);
      if (Format::kOffset == Offset::kZeroPoint) target[m.Offsets(g) + n] = group.zero;
      if (Format::kOffset == Offset::kMinimum)
        StoreScale(target + m.Offsets(g), m.scale, n, group.minimum);
    }
  }
  InterleaveCodes<Format>(codes, m, target);
  return ok;
}

// Already quantised: codes [rows, cols], scales and offsets [rows, groups of cols].
template <class Format>
inline bool CopyPanel(const PackArgs& args, size_t panel, uint8_t* codes, uint8_t* target) {
  const MatrixLayout& m = *args.layout;
  const SourceMatrix& s = args.source;
  const size_t source_groups = m.group ? (m.cols + m.group - 1) / m.group : 1;
  const uint8_t* raw = static_cast<const uint8_t*>(s.data);
  bool ok = true;
  for (size_t n = 0; n < kPanel; ++n) {
    const size_t row = panel * kPanel + n;
    uint8_t* c = codes + n * m.padded_cols;
    for (size_t i = 0; i < m.padded_cols; ++i) c[i] = Format::FromCanonical(0);
    if (row >= m.rows) continue;
    for (size_t i = 0; i < m.cols; ++i) {
      ok &= Format::IsNumber(raw[row * m.cols + i]);
      c[i] = Format::FromCanonical(raw[row * m.cols + i]);
    }
    if (m.scale == ScaleType::kE4m3) {
      ok &= IsFinite(s.output_scales[row]);
      StoreOutputScale(target, n, s.output_scales[row]);
    }
    for (size_t g = 0; g < source_groups; ++g) {
      const float scale = s.scales[row * source_groups + g];
      ok &= IsFinite(StoredScale(scale, m.scale));
      StoreScale(target + m.Scales(g), m.scale, n, scale);
      const size_t first = g * m.group_cols, end = first + m.group_cols;
      if (m.scale == ScaleType::kE4m3 && scale == 0)  // e5m3 has no other way to say so
        for (size_t i = first; i < end; ++i) c[i] = Format::FromCanonical(0);
      if constexpr (Format::kOffset == Offset::kZeroPoint) {
        const uint8_t zero = s.zero_points[row * source_groups + g];
        target[m.Offsets(g) + n] = zero;
        for (size_t i = m.cols; i < end; ++i) c[i] = zero < 15 ? zero : 15;
      }
      if constexpr (Format::kOffset == Offset::kMinimum) {
        const float minimum = s.minimums[row * source_groups + g];
        ok &= IsFinite(StoredScale(minimum, m.scale));
        StoreScale(target + m.Offsets(g), m.scale, n, minimum);
        // What quantising makes of zeros behind the last input.
        const float nearest = ClampTo(minimum / scale, 0.0f, Format::kLargestCode);
        const uint8_t code = scale > 0 ? static_cast<uint8_t>(RoundEven(nearest)) : 0;
        for (size_t i = m.cols; i < end; ++i) c[i] = code;
      }
    }
  }
  InterleaveCodes<Format>(codes, m, target);
  return ok;
}

template <class Format>
inline bool PackPanels(const PackArgs& args) {
  const MatrixLayout& m = *args.layout;
  for (size_t p = 0; p < m.panels; ++p) {
    uint8_t* target = args.target + p * args.panel_stride;
    memset(target, 0, m.front_bytes);
    for (size_t g = 0; g < m.groups; g += m.block_groups)
      memset(target + m.Block(g), 0, m.header_bytes);  // padding has scale and zero 0
    if constexpr (Format::kHasScale)
      if (args.source.scales != nullptr) {
        if (!CopyPanel<Format>(args, p, static_cast<uint8_t*>(args.scratch), target)) return false;
        continue;
      }
    if (!QuantizePanel<Format>(args, p, static_cast<float*>(args.scratch), target)) return false;
  }
  return true;
}

bool Pack(const PackArgs& args) {
  return VisitFormat(*args.layout, [&](auto format) { return PackPanels<decltype(format)>(args); });
}

}  // namespace
}  // namespace kt::KT_ISA
