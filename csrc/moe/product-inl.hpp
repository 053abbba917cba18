// How a weight format meets a precision of the activations: the product that panel-inl.hpp applies.
namespace kt::KT_ISA {
namespace {

// Writes a range of an unpacked panel: its scales, then its weights.
class PanelWriter {
 public:
  PanelWriter(uint8_t* at, size_t groups)
      : scales_(reinterpret_cast<float*>(at)), weights_(at + groups * kPanel * sizeof(float)) {}
  void Put(F32 scales) { scales.Store(scales_), scales_ += kPanel; }
  void Put(I32 row) { row.Store(weights_), weights_ += kRowBytes; }
  UnpackedPanel Panel() const { return {weights_, scales_}; }

 private:
  float* scales_;
  uint8_t* weights_;
};

// What two panels (or one, where `second` is null) are multiplied with.
struct PairArgs {
  const uint8_t *first, *second;  // packed panels
  Wanted next[2];                 // after them
  const MatrixLayout* layout;
  const ActivationRows* rows;
  size_t count;  // at most kMaxTokens
  uint8_t* unpacked;
};

// How one weight format meets one precision of the activations. Unpack() makes what Wide() takes of
// a 64-byte row; where kIsDirect, Wide() takes packed rows as they lie. kWideBlock: tokens of one
// call of Wide(), at most. kInputsPerStep: of the calls of Prefetch::Step().
template <class Format, bool kIsGrouped, int kStep>
struct Int8Product {
  using WeightFormat = Format;
  static constexpr bool kHasWide = true;
  static constexpr int kWideBlock = kTokenBlock;
  static constexpr size_t kInputsPerStep = kStep;

#ifdef KT_HAS_TILES
  static constexpr bool kIsDirect = !kIsGrouped && Format::kIsDotOperand;
  static constexpr size_t kBytesPerInput = kPanel;
#else
  static constexpr bool kIsDirect = true;
  static constexpr size_t kBytesPerInput = kRowBytes / Format::kValuesPerRow;
#endif
  static void Unpack(const uint8_t* row, Offsets offsets, PanelWriter& to) {
    const I32 operands = I32::Load(row), offset = Format::DotOffset(offsets.zero);
    for (int i = 0; i < Format::kDotsPerRow; ++i) to.Put(Format::DotOperand(operands, i, offset));
  }
  template <int M>
  static void Stream(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                     const uint8_t* const* a, F32 (&out)[M]) {
    StreamInt8<Format, kStep>(panel, layout, rows, a, out);
  }
  template <int M>
  static void Wide(const PairArgs& args, const Unpacked&, InputRange range, const uint8_t* const* a,
                   Prefetch prefetch, PairSums* sums) {
    // A last panel without a partner meets itself.
    const size_t to_second = args.second ? static_cast<size_t>(args.second - args.first) : 0;
    WideInt8<Format, kIsGrouped, kStep, M>(args.first, to_second, range, *args.layout, *args.rows,
                                           a, prefetch, sums);
  }
#ifdef KT_HAS_TILES
  static size_t TileInputs(const MatrixLayout&) { return kStep; }
  static size_t TileBytes(const MatrixLayout&) { return kStep; }
  static void Tiled(const Tiles& tiles, const Unpacked& w, const MatrixLayout& layout,
                    const ActivationRows& rows, const uint8_t* a, Prefetch prefetch,
                    PairSums* sums) {
    TiledInt8<kIsGrouped, kStep>(tiles, w, layout, rows, a, prefetch, sums);
  }
#endif
};

template <class Format>
struct Bf16Product {
  using WeightFormat = Format;
  static constexpr bool kHasWide = true;
  static constexpr int kWideBlock = kBf16TokenBlock;
  static constexpr size_t kInputsPerStep = 16;

  static constexpr size_t kBytesPerInput = 2 * kPanel;
  static constexpr bool kIsDirect = Format::kIsBf16Operand;
  static void Unpack(const uint8_t* row, Offsets offsets, PanelWriter& to) {
    const I32 operands = I32::Load(row);
    for (int i = 0; i < Format::kValuesPerRow / 2; ++i)
      to.Put(Format::Bf16Operand(operands, i, offsets.zero));
  }
  template <int M>
  static void Stream(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                     const uint8_t* const* a, F32 (&out)[M]) {
    StreamBf16<Format>(panel, layout, rows, a, out);
  }
  template <int M>
  static void Wide(const PairArgs& args, const Unpacked& w, InputRange range,
                   const uint8_t* const* a, Prefetch prefetch, PairSums* sums) {
    WideBf16<M>(w, range, *args.layout, a, prefetch, sums);
  }
#ifdef KT_HAS_TILES
  static size_t TileInputs(const MatrixLayout& layout) { return Bf16TileInputs(layout); }
  static size_t TileBytes(const MatrixLayout& layout) { return 2 * Bf16TileInputs(layout); }
  static constexpr auto Tiled = TiledBf16;
#endif
};

// The exact mode streams whatever the number of tokens.
template <class Format>
struct F32Product {
  static constexpr bool kHasWide = false;
  static constexpr size_t kInputsPerStep = 1;

  template <int M>
  static void Stream(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows&,
                     const uint8_t* const* a, F32 (&out)[M]) {
    StreamF32<Format>(panel, layout, a, out);
  }
};

template <class Format, class Visitor>
inline void VisitInt8Product(const MatrixLayout& layout, const ActivationRows& rows,
                             const Visitor& visitor) {
  if (layout.groups == 1)  // also where a group is longer than the row
    return rows.step == 64 ? visitor(Int8Product<Format, false, 64>{})
                           : visitor(Int8Product<Format, false, 32>{});
  if (rows.step == 64) return visitor(Int8Product<Format, true, 64>{});
  if constexpr (Format::kSmallestGroup < 32)
    if (rows.step == 16) return visitor(Int8Product<Format, true, 16>{});
  return visitor(Int8Product<Format, true, 32>{});
}

// Calls visitor(Product{}) with the product for this format and precision.
template <class Visitor>
inline void VisitProduct(const MatrixLayout& layout, const ActivationRows& rows,
                         const Visitor& visitor) {
  VisitFormat(layout, [&](auto format) {
    using Format = decltype(format);
    if (rows.precision == Precision::kBf16) return visitor(Bf16Product<Format>{});
    if constexpr (Format::kHasInt8)
      if (rows.precision == Precision::kInt8)
        return VisitInt8Product<Format>(layout, rows, visitor);
    return visitor(F32Product<Format>{});
  });
}

}  // namespace
}  // namespace kt::KT_ISA
