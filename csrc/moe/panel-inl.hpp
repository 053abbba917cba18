// Two panels times any number of tokens. Few tokens: the packed weights are read once, as one
// stream, and unpacked on the way. Many: they are unpacked once, into a buffer that stays in the L2
// cache, and blocks of tokens meet both panels at a time.
namespace kt::KT_ISA {
namespace {

// The scales of one group, and its minimums, as Unpacked has them.
template <class Format>
inline void StoreUnpacked(F32 scale, Offsets offsets, const MatrixLayout& layout, float* scales) {
  scale.Store(scales);
  if constexpr (Format::kOffset == Offset::kMinimum)
    offsets.minimum.Store(scales + layout.groups * kPanel);
}

// How one weight format meets one precision of the activations. kUnpacks: Wide() wants the rows
// that Unpack() writes. kInputsPerStep: of the calls of Prefetch::Step().
template <class Format, bool kIsGrouped, int kStep>
struct Int8Product {
  static constexpr bool kHasWide = true, kUnpacks = true;
  static constexpr size_t kInputsPerStep = kStep;

  static void Unpack(const uint8_t* panel, const MatrixLayout& layout, uint8_t* to, float* scales) {
    ForGroups<Format>(panel, layout, [&](F32 scale, Offsets offsets, const uint8_t* from) {
      StoreUnpacked<Format>(scale, offsets, layout, scales);
      scales += kPanel;
      const I32 offset = Format::DotOffset(offsets.zero);
      for (size_t k = 0; k < layout.group_cols; k += Format::kValuesPerRow, from += kRowBytes) {
        const I32 row = I32::Load(from);
        for (int i = 0; i < Format::kDotsPerRow; ++i, to += kRowBytes)
          Format::DotOperand(row, i, offset).Store(to);
      }
    });
  }
  template <int M>
  static void Stream(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                     const uint8_t* const* a, F32 (&out)[M]) {
    StreamInt8<Format, kStep>(panel, layout, rows, a, out);
  }
  template <int M>
  static void Wide(const Unpacked& w, const MatrixLayout& layout, const ActivationRows& rows,
                   const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][2]) {
    WideInt8<Format::kIsSigned, kIsGrouped, kStep>(w, layout, rows, a, prefetch, out);
    if constexpr (Format::kOffset == Offset::kMinimum) AddMinimums(w, layout, rows, a, out);
  }
#ifdef KT_HAS_TILES
  static size_t TileInputs(const MatrixLayout&) { return kStep; }
  static size_t TileBytes(const MatrixLayout&) { return kStep; }
  static void Tiled(const Tiles& tiles, const Unpacked& w, const MatrixLayout& layout,
                    const ActivationRows& rows, const uint8_t* a, Prefetch prefetch,
                    TileSums& sums) {
    TiledInt8<kIsGrouped, kStep>(tiles, w, layout, rows, a, prefetch, sums);
    if constexpr (Format::kOffset == Offset::kMinimum) AddMinimums(tiles, w, layout, rows, a, sums);
  }
#endif
};

template <class Format>
struct Bf16Product {
  static constexpr bool kHasWide = true, kUnpacks = !Format::kIsBf16Operand;
  static constexpr size_t kInputsPerStep = 16;

  static void Unpack(const uint8_t* panel, const MatrixLayout& layout, uint8_t* to, float* scales) {
    ForGroups<Format>(panel, layout, [&](F32 scale, Offsets offsets, const uint8_t* from) {
      StoreUnpacked<Format>(scale, offsets, layout, scales);
      scales += kPanel;
      for (size_t k = 0; k < layout.group_cols; k += Format::kValuesPerRow, from += kRowBytes) {
        const I32 row = I32::Load(from);
        for (int i = 0; i < Format::kValuesPerRow / 2; ++i, to += kRowBytes)
          Format::Bf16Operand(row, i, offsets.zero).Store(to);
      }
    });
  }
  template <int M>
  static void Stream(const uint8_t* panel, const MatrixLayout& layout, const ActivationRows& rows,
                     const uint8_t* const* a, F32 (&out)[M]) {
    StreamBf16<Format>(panel, layout, rows, a, out);
  }
  template <int M>
  static void Wide(const Unpacked& w, const MatrixLayout& layout, const ActivationRows& rows,
                   const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][2]) {
    WideBf16(w, layout, a, prefetch, out);
    if constexpr (Format::kOffset == Offset::kMinimum) AddMinimums(w, layout, rows, a, out);
  }
#ifdef KT_HAS_TILES
  static size_t TileInputs(const MatrixLayout& layout) { return Bf16TileInputs(layout); }
  static size_t TileBytes(const MatrixLayout& layout) { return 2 * Bf16TileInputs(layout); }
  static void Tiled(const Tiles& tiles, const Unpacked& w, const MatrixLayout& layout,
                    const ActivationRows& rows, const uint8_t* a, Prefetch prefetch,
                    TileSums& sums) {
    TiledBf16(tiles, w, layout, rows, a, prefetch, sums);
    if constexpr (Format::kOffset == Offset::kMinimum) AddMinimums(tiles, w, layout, rows, a, sums);
  }
#endif
};

// The exact mode streams whatever the number of tokens.
template <class Format>
struct F32Product {
  static constexpr bool kHasWide = false, kUnpacks = false;
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
  if (layout.group == 0)
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

template <int M>
struct Size {
  static constexpr int kValue = M;
};
template <int kMin, int M, class Body>
inline void WithSize(size_t size, const Body& body) {
  if constexpr (M > kMin)
    if (size < M) return WithSize<kMin, M - 1>(size, body);
  body(Size<M>{});
}

// Calls body(first token, Size<M>) over 0..count-1, in blocks as even as can be. kMin: the fewest
// tokens a block then can have.
template <int kMin, class Body>
inline void ForTokenBlocks(size_t count, const Body& body) {
  for (size_t blocks = (count + kTokenBlock - 1) / kTokenBlock, first = 0; blocks > 0; --blocks) {
    const size_t size = (count - first + blocks - 1) / blocks;
    WithSize<kMin, kTokenBlock>(size, [&](auto m) { body(first, m); });
    first += size;
  }
}

// What two panels (or one, where `second` is null) are multiplied with.
struct PairArgs {
  const uint8_t *first, *second;  // packed panels
  bool has_next;                  // the bytes behind them will be wanted next
  const MatrixLayout* layout;
  const ActivationRows* rows;
  size_t count;
  uint8_t* scratch;
};

template <class Product>
inline Unpacked UnpackPair(const PairArgs& args) {
  // A last panel without a partner meets itself.
  const uint8_t* panels[2] = {args.first, args.second ? args.second : args.first};
  Unpacked w{{panels[0], panels[1]}, {nullptr, nullptr}};
  if constexpr (Product::kUnpacks) {
    const size_t bytes = UnpackedBytes(args.rows->precision, *args.layout);
    for (int n = 0; n < 2; ++n) {
      float* scales = reinterpret_cast<float*>(args.scratch + static_cast<size_t>(n) * bytes);
      uint8_t* weights = reinterpret_cast<uint8_t*>(scales + UnpackedScales(*args.layout));
      if (n == 0 || args.second) Product::Unpack(panels[n], *args.layout, weights, scales);
      else weights = const_cast<uint8_t*>(w.weights[0]), scales = const_cast<float*>(w.scales[0]);
      w.weights[n] = weights, w.scales[n] = scales;
    }
  }
  return w;
}

// The two panels behind these, spread over `steps` steps.
inline Prefetch PrefetchNext(const PairArgs& args, size_t steps) {
  const size_t bytes = 2 * args.layout->panel_bytes;
  return {args.first + bytes, args.has_next ? bytes / kRowBytes / steps + 1 : 0};
}

#ifdef KT_HAS_TILES
// Rows of activations lie one after another here: GateUp() sees to it, and Down()'s always do.
template <class Product, class Row, class Consume>
inline void MultiplyWide(const PairArgs& args, const Row& row, const Consume& consume) {
  const Unpacked w = UnpackPair<Product>(args);
  const size_t blocks = (args.count + kTileTokens - 1) / kTileTokens;
  const size_t steps = args.layout->padded_cols / Product::TileInputs(*args.layout);
  Prefetch prefetch = PrefetchNext(args, blocks * steps);
  // All blocks have this many tokens, so that tiles are shaped once. The last one begins within the
  // block before it, whose products are not consumed twice.
  const Tiles tiles((args.count + blocks - 1) / blocks, Product::TileBytes(*args.layout));
  alignas(64) TileSums sums;
  for (size_t next = 0; next < args.count;) {
    const size_t last = args.count - tiles.tokens(), first = next < last ? next : last;
    Product::Tiled(tiles, w, *args.layout, *args.rows, row(first), prefetch, sums);
    prefetch.at += prefetch.lines_per_step * kRowBytes * steps;
    for (; next < first + tiles.tokens(); ++next) {
      F32 left[1] = {F32::Load(sums[next - first][0])};
      F32 right[1] = {F32::Load(sums[next - first][1])};
      consume(next, Size<1>{}, left, right);
    }
  }
}
#else
template <class Product, class Row, class Consume>
inline void MultiplyWide(const PairArgs& args, const Row& row, const Consume& consume) {
  const Unpacked w = UnpackPair<Product>(args);
  const size_t steps = args.layout->padded_cols / Product::kInputsPerStep;
  const size_t passes = (args.count + kTokenBlock - 1) / kTokenBlock;
  Prefetch prefetch = PrefetchNext(args, passes * steps);
  ForTokenBlocks<(kTokenBlock + 1) / 2>(args.count, [&](size_t first, auto size) {
    constexpr int M = decltype(size)::kValue;
    const uint8_t* a[M];
    for (int m = 0; m < M; ++m) a[m] = row(first + static_cast<size_t>(m));
    F32 both[M][2], left[M], right[M];
    Product::Wide(w, *args.layout, *args.rows, a, prefetch, both);
    prefetch.at += prefetch.lines_per_step * kRowBytes * steps;
    for (int m = 0; m < M; ++m) left[m] = both[m][0], right[m] = both[m][1];
    consume(first, size, left, right);
  });
}
#endif

// Calls consume(first token, Size<M>, F32 (&)[M], F32 (&)[M]) with the products of both panels.
// `row(i)` is where the i-th token's activations are.
template <class Product, class Row, class Consume>
inline void MultiplyPair(const PairArgs& args, const Row& row, const Consume& consume) {
  if constexpr (Product::kHasWide)
    if (args.count > kTokenBlock) return MultiplyWide<Product>(args, row, consume);
  ForTokenBlocks<1>(args.count, [&](size_t first, auto size) {
    constexpr int M = decltype(size)::kValue;
    const uint8_t* a[M];
    for (int m = 0; m < M; ++m) a[m] = row(first + static_cast<size_t>(m));
    F32 left[M], right[M];
    Product::Stream(args.first, *args.layout, *args.rows, a, left);
    if (args.second) Product::Stream(args.second, *args.layout, *args.rows, a, right);
    else
      for (int m = 0; m < M; ++m) right[m] = left[m];
    consume(first, size, left, right);
  });
}

}  // namespace
}  // namespace kt::KT_ISA
