// Quantising and packing: plain loops, which the compiler vectorises for the ISA at hand. The
// numbers are those of kt_core/quant/reference.py, bit for bit: no fused multiply-add may be formed
// here (the build passes -ffp-contract=off).
namespace kt::KT_ISA {
namespace {

inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
    const float x = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -x : x;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112u) << 23) | (mantissa << 13);
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// |x| <= 2^22, to nearest, ties to even: adding 1.5 * 2^23 leaves no fraction bits.
inline float RoundEven(float x) { return (x + 12582912.0f) - 12582912.0f; }

inline float ClampTo(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

inline bool IsFinite(float x) { return fabsf(x) <= 3.402823466e38f; }

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
    for (size_t i = 0; i < n; ++i) to[i] = HalfToFloat(p[static_cast<ptrdiff_t>(i) * stride]);
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

// The scale as it can be stored; infinite where that type cannot hold it.
inline float StoredScale(float scale, const MatrixLayout& m) {
  return m.scale == ScaleType::kBf16 ? Bf16ToFloat(ToBf16(scale)) : scale;
}

// One group of one output: its scale and zero point, and the codes as they are stored.
struct GroupCode {
  float scale;
  uint8_t zero;
};

inline GroupCode QuantizeSymmetric(const float* x, size_t n, const MatrixLayout& m,
                                   uint8_t* codes) {
  const float high = m.element == Element::kInt8 ? 127.0f : 7.0f;
  const float low = m.element == Element::kInt8 ? -127.0f : -8.0f;
  float largest = 0.0f;
  for (size_t i = 0; i < n; ++i) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
  const float scale = StoredScale(largest / high, m);
  for (size_t i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(
        static_cast<int32_t>(scale > 0 ? RoundEven(ClampTo(x[i] / scale, low, high)) : 0.0f));
  return {scale, 0};
}

inline GroupCode QuantizeAsymmetric(const float* x, size_t n, const MatrixLayout& m,
                                    uint8_t* codes) {
  float low = 0.0f, high = 0.0f;
  for (size_t i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  const float scale = StoredScale((high - low) / 15.0f, m);  // infinite if high - low overflows
  if (!(scale > 0)) {
    memset(codes, 0, n);
    return {0.0f, 0};
  }
  const float zero = RoundEven(ClampTo(-low / scale, 0.0f, 15.0f));
  for (size_t i = 0; i < n; ++i) {
    const float q = RoundEven(ClampTo(x[i] / scale, -15.0f, 15.0f)) + zero;
    codes[i] = static_cast<uint8_t>(ClampTo(q, 0.0f, 15.0f));
  }
  return {scale, static_cast<uint8_t>(zero)};
}

inline void StoreScale(uint8_t* panel, const MatrixLayout& m, size_t group, size_t output,
                       float scale) {
  uint8_t* scales = panel + m.Scales(group);
  if (m.scale == ScaleType::kBf16) reinterpret_cast<uint16_t*>(scales)[output] = ToBf16(scale);
  else reinterpret_cast<float*>(scales)[output] = scale;
}

// Codes [16][padded_cols] to 64-byte rows.
inline void InterleaveBytes(const uint8_t* codes, const MatrixLayout& m, uint8_t* panel) {
  for (size_t g = 0; g < m.groups; ++g) {
    uint8_t* target = panel + m.Weights(g);
    const size_t first = g * m.group_cols, last = first + m.group_cols;
    if (m.element == Element::kInt8) {
      for (size_t k = first; k < last; k += 4)
        for (size_t n = 0; n < kPanel; ++n, target += 4)
          memcpy(target, codes + n * m.padded_cols + k, 4);
      continue;
    }
    for (size_t k = first; k < last; k += 8)
      for (size_t n = 0; n < kPanel; ++n, target += 4) {
        uint64_t eight;
        memcpy(&eight, codes + n * m.padded_cols + k, 8);
        const uint32_t nibbles = static_cast<uint32_t>(eight | eight >> 28);
        memcpy(target, &nibbles, 4);
      }
  }
}

inline bool PackBf16Panel(const float* values, const MatrixLayout& m, uint16_t* codes,
                          uint8_t* target) {
  uint32_t bad = 0;
  for (size_t i = 0; i < kPanel * m.padded_cols; ++i) {
    codes[i] = ToBf16(values[i]);
    bad |= (codes[i] & 0x7f80u) == 0x7f80u;  // also float32 that rounds to infinity
  }
  for (size_t k = 0; k < m.padded_cols; k += 2)
    for (size_t n = 0; n < kPanel; ++n, target += 4)
      memcpy(target, codes + n * m.padded_cols + k, 4);
  return bad == 0;
}

inline bool QuantizePanel(const float* values, const MatrixLayout& m, uint8_t* codes,
                          uint8_t* target) {
  const size_t group = m.group_cols;
  const uint8_t offset = m.element == Element::kInt4 && !m.has_zero_point ? 8 : 0;
  if (!AllFinite(values, kPanel * m.padded_cols)) return false;
  bool ok = true;
  for (size_t n = 0; n < kPanel; ++n)
    for (size_t g = 0; g < m.groups; ++g) {
      const float* x = values + n * m.padded_cols + g * group;
      uint8_t* c = codes + n * m.padded_cols + g * group;
      const GroupCode code =
          m.has_zero_point ? QuantizeAsymmetric(x, group, m, c) : QuantizeSymmetric(x, group, m, c);
      for (size_t i = 0; i < group; ++i) c[i] = static_cast<uint8_t>(c[i] + offset);
      ok &= IsFinite(code.scale);
      StoreScale(target, m, g, n, code.scale);
      if (m.has_zero_point) target[m.Zeros(g) + n] = code.zero;
    }
  InterleaveBytes(codes, m, target);
  return ok;
}

// Already quantised: codes [rows, cols], scales and zero points [rows, groups of cols].
inline bool CopyPanel(const PackArgs& args, size_t panel, uint8_t* codes, uint8_t* target) {
  const MatrixLayout& m = *args.layout;
  const SourceMatrix& s = args.source;
  const size_t source_groups = m.group ? (m.cols + m.group - 1) / m.group : 1;
  const uint8_t offset = m.element == Element::kInt4 && !m.has_zero_point ? 8 : 0;
  const uint8_t* raw = static_cast<const uint8_t*>(s.data);
  bool ok = true;
  for (size_t n = 0; n < kPanel; ++n) {
    const size_t row = panel * kPanel + n;
    uint8_t* c = codes + n * m.padded_cols;
    for (size_t i = 0; i < m.padded_cols; ++i) c[i] = offset;
    if (row >= m.rows) continue;
    for (size_t i = 0; i < m.cols; ++i) {
      c[i] = static_cast<uint8_t>(raw[row * m.cols + i] + offset);
    }
    for (size_t g = 0; g < source_groups; ++g) {
      const float scale = s.scales[row * source_groups + g];
      ok &= IsFinite(StoredScale(scale, m));
      StoreScale(target, m, g, n, scale);
      if (!m.has_zero_point) continue;
      const uint8_t zero = s.zero_points[row * source_groups + g];
      target[m.Zeros(g) + n] = zero;
      const size_t end = m.group ? (g + 1) * m.group : m.padded_cols;
      for (size_t i = m.cols; i < end; ++i) c[i] = zero;  // inputs beyond the last are worth 0
    }
  }
  InterleaveBytes(codes, m, target);
  return ok;
}

bool Pack(const PackArgs& args) {
  const MatrixLayout& m = *args.layout;
  float* values = static_cast<float*>(args.scratch);
  void* codes = values + kPanel * m.padded_cols;
  for (size_t p = 0; p < m.panels; ++p) {
    uint8_t* target = args.target + p * args.panel_stride;
    for (size_t g = 0; g < m.groups; g += m.block_groups)
      memset(target + m.Block(g), 0, m.header_bytes);  // padding has scale and zero 0
    if (args.source.scales != nullptr) {
      if (!CopyPanel(args, p, static_cast<uint8_t*>(codes), target)) return false;
      continue;
    }
    LoadPanel(args, p, values);
    const bool ok = m.element == Element::kBf16
                        ? PackBf16Panel(values, m, static_cast<uint16_t*>(codes), target)
                        : QuantizePanel(values, m, static_cast<uint8_t*>(codes), target);
    if (!ok) return false;
  }
  return true;
}

}  // namespace
}  // namespace kt::KT_ISA
