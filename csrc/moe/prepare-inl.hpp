// Activations into the form the dot products want: see ActivationRows.
namespace kt::KT_ISA {
namespace {

// Inputs first..first+n-1 of a row as float32, n a multiple of 16; zero beyond the last input.
inline void LoadInputs(const PrepareArgs& args, size_t row, size_t first, size_t n, float* target) {
  const bool is_bf16 = args.source_type == DType::kBf16;
  const size_t at = row * args.source_stride + first;
  const uint16_t* narrow = static_cast<const uint16_t*>(args.source) + at;
  const float* wide = static_cast<const float*>(args.source) + at;
  const size_t valid = args.rows.cols <= first ? 0 : args.rows.cols - first;
  for (size_t i = 0; i < n; i += 16) {
    F32 v = F32::Set(0.0f);
    if (i + 16 <= valid) {
      v = is_bf16 ? F32::LoadBf16(narrow + i) : F32::Load(wide + i);
    } else if (i < valid) {  // the only tail: copied, so that nothing past the row is read
      uint16_t few16[16] = {};
      float few32[16] = {};
      if (is_bf16) memcpy(few16, narrow + i, (valid - i) * 2);
      else memcpy(few32, wide + i, (valid - i) * 4);
      v = is_bf16 ? F32::LoadBf16(few16) : F32::Load(few32);
    }
    v.Store(target + i);
  }
}

// values = round(x / scale), scale = max|x| / 127, over one group, a multiple of 16. corrections:
// one for each `step` of them, `zero` times their sum.
inline void QuantizeGroup(const float* x, const ActivationRows& rows, int32_t zero, int8_t* values,
                          float* scale, int32_t* corrections) {
  F32 peak = F32::Set(0.0f), poison = F32::Set(0.0f);
  for (size_t i = 0; i < rows.group; i += 16) {
    const F32 v = F32::Load(x + i);
    peak = Max(Abs(v), peak);
    poison = MulAdd(v, F32::Set(0.0f), poison);  // NaN if any input is NaN or infinite
  }
  const float largest = ReduceMax(peak);
  // 127 / largest overflows for the smallest numbers: such a group counts as zero.
  const bool is_zero = !(largest >= 1e-35f);
  const F32 inverse = F32::Set(is_zero ? 0.0f : 127.0f / largest);
  for (size_t i = 0; i < rows.group;) {
    I32 sum = I32::Set(0);
    for (const size_t end = i + rows.step; i < end; i += 16) {
      // In this order of operands NaN becomes 127: it has no integer, and `poison` carries it.
      const F32 v = Mul(F32::Load(x + i), inverse);
      const I32 rounded = ToI32(Max(F32::Set(-127.0f), Min(v, F32::Set(127.0f))));
      rounded.StoreI8(values + i);
      sum = Add(sum, rounded);
    }
    *corrections++ = -zero * ReduceAdd(sum);
  }
  *scale = (is_zero ? 0.0f : largest / 127.0f) + ReduceAdd(poison);
}

// What DotOperand adds to each weight.
inline int32_t DotZero(const MatrixLayout& weights) {
  return VisitFormat(weights, [](auto format) -> int32_t {
    using Format = decltype(format);
    if constexpr (Format::kHasInt8) return Format::kDotZero;
    return 0;
  });
}

// What minimums are multiplied with, of a row whose values are there.
inline void StoreMinusSums(const ActivationRows& rows, uint8_t* row) {
  const int8_t* bytes = reinterpret_cast<const int8_t*>(row);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(row);
  const float* scales = reinterpret_cast<const float*>(row + rows.scale_offset);
  float* minus_sums = reinterpret_cast<float*>(row + rows.sum_offset);
  for (size_t first = 0; first < rows.padded_cols; first += rows.sum_group) {
    const size_t end = first + rows.sum_group;
    float sum = 0.0f;
    if (rows.precision == Precision::kInt8) {
      for (size_t k = first; k < end; k += rows.step) {
        int32_t codes = 0;
        for (size_t i = k; i < k + rows.step; ++i) codes += bytes[i];
        sum += static_cast<float>(codes) * scales[k / rows.group];
      }
    } else {
      F32 lanes = F32::Set(0.0f);
      for (size_t k = first; k < end; k += kPanel) lanes = Add(lanes, F32::LoadBf16(halves + k));
      sum = ReduceAdd(lanes);
    }
    *minus_sums++ = -sum;
  }
}

void Prepare(const PrepareArgs& args) {
  const ActivationRows& rows = args.rows;
  const int32_t zero = DotZero(*args.weights);
  float block[kHiddenGroup];
  static_assert(kInterGroup <= kHiddenGroup && kColumnPad % kHiddenGroup == 0);
  for (size_t r = args.first_row; r < args.last_row; ++r) {
    uint8_t* row = rows.data + r * rows.row_bytes;
    float* scales = reinterpret_cast<float*>(row + rows.scale_offset);
    int32_t* corrections = reinterpret_cast<int32_t*>(row + rows.correction_offset);
    for (size_t first = 0; first < rows.padded_cols; first += rows.group) {
      if (rows.precision == Precision::kFloat32) {
        LoadInputs(args, r, first, rows.group, reinterpret_cast<float*>(row) + first);
        continue;
      }
      LoadInputs(args, r, first, rows.group, block);
      if (rows.precision == Precision::kBf16) {
        uint16_t* values = reinterpret_cast<uint16_t*>(row) + first;
        for (size_t i = 0; i < rows.group; ++i) values[i] = ToBf16(block[i]);
        continue;
      }
      QuantizeGroup(block, rows, zero, reinterpret_cast<int8_t*>(row) + first, scales++,
                    corrections);
      corrections += rows.group / rows.step;
    }
    if (rows.sum_group) StoreMinusSums(rows, row);
  }
}

}  // namespace
}  // namespace kt::KT_ISA
