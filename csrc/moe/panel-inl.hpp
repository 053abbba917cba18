// Two panels times any number of tokens. Few tokens: the packed weights are read once, as one
// stream, and unpacked on the way. Many: blocks of tokens meet both panels at a time, range after
// range of the inputs, so that a range of weights stays in the L1 cache meanwhile.
namespace kt::KT_ISA {
namespace {

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

// Calls body(first token, Size<M>) over 0..count-1, in blocks of at most kMax, as even as can be.
// kMin: the fewest tokens a block then can have.
template <int kMin, int kMax, class Body>
inline void ForTokenBlocks(size_t count, const Body& body) {
  for (size_t blocks = (count + kMax - 1) / kMax, first = 0; blocks > 0; --blocks) {
    const size_t size = (count - first + blocks - 1) / blocks;
    WithSize<kMin, kMax>(size, [&](auto m) { body(first, m); });
    first += size;
  }
}

// Tokens of one call of MultiplyPair(), at most: their activations stay in the L2 cache while the
// panels of a call pass by, their sums in the L1 cache.
constexpr size_t kMaxTokens = 128;

// Two panels of so many bytes, as Wide() takes them, stay in the L1 cache with all else that meets
// them there. AMX takes all inputs at once.
#ifdef KT_HAS_TILES
constexpr size_t kRangeBytes = SIZE_MAX;
#else
constexpr size_t kRangeBytes = 24 << 10;
#endif

// Inputs of one range: no block of groups is cut, nor are kColumnPad inputs.
inline size_t RangeInputs(const MatrixLayout& m, size_t bytes_per_input) {
  const size_t block = m.groups == 1 ? 0 : m.block_groups * m.group_cols;
  const size_t unit = block > kColumnPad ? block : kColumnPad;
  const size_t ranges = (m.padded_cols * 2 * bytes_per_input - 1) / kRangeBytes + 1;
  const size_t inputs = RoundUp((m.padded_cols + ranges - 1) / ranges, unit);
  return inputs < m.padded_cols ? inputs : m.padded_cols;
}

inline size_t UnpackedBytes(size_t inputs, size_t groups, size_t bytes_per_input) {
  return groups * kPanel * sizeof(float) + inputs * bytes_per_input;
}

template <class Product>
inline UnpackedPanel UnpackPanel(const uint8_t* panel, const MatrixLayout& m, InputRange range,
                                 uint8_t* scratch) {
  if constexpr (Product::kIsDirect)
    return {panel + m.Weights(0) + range.first * Product::kBytesPerInput, nullptr};
  using Format = typename Product::WeightFormat;
  const auto unpack_rows = [](const uint8_t* row, Offsets offsets, size_t inputs, PanelWriter& to) {
    for (size_t k = 0; k < inputs; k += Format::kValuesPerRow, row += kRowBytes)
      Product::Unpack(row, offsets, to);
  };
  if (m.groups == 1) {
    PanelWriter to(scratch, 0);
    const UnpackedPanel unpacked{to.Panel().weights, nullptr};
    unpack_rows(panel + m.Weights(0) + range.first / Format::kValuesPerRow * kRowBytes,
                LoadOffsets<Format>(panel + m.Offsets(0), m.scale), range.last - range.first, to);
    return unpacked;
  }
  const size_t first = range.first / m.group_cols, last = range.last / m.group_cols;
  PanelWriter to(scratch, last - first);
  const UnpackedPanel unpacked = to.Panel();
  ForGroups<Format>(panel, m, first, last, [&](F32 scale, Offsets offsets, const uint8_t* weights) {
    to.Put(scale);
    unpack_rows(weights, offsets, m.group_cols, to);
  });
  return unpacked;
}

template <class Product>
inline Unpacked UnpackPair(const PairArgs& args, InputRange range) {
  const MatrixLayout& m = *args.layout;
  const UnpackedPanel first = UnpackPanel<Product>(args.first, m, range, args.unpacked);
  if (args.second == nullptr) return {{first, first}};  // a last panel meets itself
  const size_t inputs = range.last - range.first, groups = inputs / m.group_cols;
  uint8_t* behind = args.unpacked + UnpackedBytes(inputs, groups, Product::kBytesPerInput);
  return {{first, UnpackPanel<Product>(args.second, m, range, behind)}};
}

// Wide products leave a scale that all inputs share to the end.
template <class Format>
inline void ScaleSums(const PairArgs& args, PairSums* sums) {
  const MatrixLayout& m = *args.layout;
  if (!Format::kHasScale || m.groups > 1) return;
  for (int n = 0; n < 2; ++n) {
    const uint8_t* panel = n == 0 ? args.first : args.second;
    if (panel == nullptr) return;
    ForGroups<Format>(panel, m, 0, 1, [&](F32 scale, Offsets, const uint8_t*) {
      for (size_t i = 0; i < args.count; ++i) Mul(F32::Load(sums[i][n]), scale).Store(sums[i][n]);
    });
  }
}

// sums[i] -= the minimums of all groups times the sums of their activations, which Prepare() took.
template <class Format, class Row>
inline void AddMinimums(const PairArgs& args, const Row& row, PairSums* sums) {
  if constexpr (Format::kOffset == Offset::kMinimum)
    for (int n = 0; n < (args.second ? 2 : 1); ++n) {
      size_t group = 0;
      ForGroups<Format>(n == 0 ? args.first : args.second, *args.layout,
                        [&](F32, Offsets offsets, const uint8_t*) {
                          for (size_t i = 0; i < args.count; ++i)
                            MulAdd(offsets.minimum, MinusSum(*args.rows, row(i), group),
                                   F32::Load(sums[i][n]))
                                .Store(sums[i][n]);
                          ++group;
                        });
    }
}

#ifdef KT_HAS_TILES
// Rows of activations lie one after another here: GateUp() sees to it, and Down()'s always do.
template <class Product, class Row>
inline void MultiplyWide(const PairArgs& args, const Row& row, PairSums* sums) {
  const Unpacked w = UnpackPair<Product>(args, {0, args.layout->padded_cols});
  const size_t blocks = (args.count + kTileTokens - 1) / kTileTokens;
  const size_t steps = args.layout->padded_cols / Product::TileInputs(*args.layout);
  Prefetch prefetch(args.next, blocks * steps);
  // All blocks have this many tokens, so that tiles are shaped once. The last one begins within the
  // block before it and computes some sums again.
  const Tiles tiles((args.count + blocks - 1) / blocks, Product::TileBytes(*args.layout));
  for (size_t next = 0; next < args.count; next += tiles.tokens()) {
    const size_t last = args.count - tiles.tokens(), first = next < last ? next : last;
    Product::Tiled(tiles, w, *args.layout, *args.rows, row(first), prefetch, sums + first);
    prefetch.Skip(steps);
  }
}
#else
template <class Product, class Row>
inline void MultiplyWide(const PairArgs& args, const Row& row, PairSums* sums) {
  constexpr int kMax = Product::kWideBlock;
  const MatrixLayout& m = *args.layout;
  const size_t passes = (args.count + kMax - 1) / kMax;
  Prefetch prefetch(args.next, passes * (m.padded_cols / Product::kInputsPerStep));
  const size_t inputs = RangeInputs(m, Product::kBytesPerInput);
  for (InputRange range{0, inputs}; range.first < m.padded_cols;
       range = {range.last, range.last + inputs}) {
    if (range.last > m.padded_cols) range.last = m.padded_cols;
    const Unpacked w = UnpackPair<Product>(args, range);
    const size_t steps = (range.last - range.first) / Product::kInputsPerStep;
    ForTokenBlocks<(kMax + 1) / 2, kMax>(args.count, [&](size_t first, auto size) {
      constexpr int M = decltype(size)::kValue;
      const uint8_t* a[M];
      for (int i = 0; i < M; ++i) a[i] = row(first + static_cast<size_t>(i));
      Product::template Wide<M>(args, w, range, a, prefetch, sums + first);
      prefetch.Skip(steps);
    });
  }
}
#endif

// sums[i] = the i-th token's activations, which are at row(i), times both panels. What stands for
// a second panel that is not there is undefined.
template <class Product, class Row>
inline void MultiplyPair(const PairArgs& args, const Row& row, PairSums* sums) {
  if constexpr (Product::kHasWide)
    if (args.count > kTokenBlock) {
      using Format = typename Product::WeightFormat;
      MultiplyWide<Product>(args, row, sums);
      ScaleSums<Format>(args, sums);
      return AddMinimums<Format>(args, row, sums);
    }
  ForTokenBlocks<1, kTokenBlock>(args.count, [&](size_t first, auto size) {
    constexpr int M = decltype(size)::kValue;
    const uint8_t* a[M];
    for (int m = 0; m < M; ++m) a[m] = row(first + static_cast<size_t>(m));
    for (int n = 0; n < 2; ++n) {
      const uint8_t* panel = n == 0 ? args.first : args.second;
      if (panel == nullptr) return;
      F32 products[M];
      Product::Stream(panel, *args.layout, *args.rows, a, products);
      for (int m = 0; m < M; ++m) products[m].Store(sums[first + static_cast<size_t>(m)][n]);
    }
  });
}

// Scratch of a call: the sums of kMaxTokens tokens, two unpacked panels, and copies of
// kStagedRows rows of activations. Tiles are loaded with one stride from row to row: they want the
// rows of gate and up one after another, those of down are. Each copy serves all panels of a call.
#ifdef KT_HAS_TILES
constexpr size_t kStagedRows = kMaxTokens;
#else
constexpr size_t kStagedRows = 0;
#endif

inline size_t UnpackedPairBytes(Precision precision, const MatrixLayout& m) {
  if (precision == Precision::kFloat32) return 0;
  const size_t bytes_per_input = precision == Precision::kBf16 ? 2 * kPanel : kPanel;
  const size_t inputs = RangeInputs(m, bytes_per_input);
  return 2 * UnpackedBytes(inputs, inputs / m.group_cols + 1, bytes_per_input);
}

struct CallScratch {
  CallScratch(uint8_t* at, Precision precision, const MatrixLayout& m)
      : sums(reinterpret_cast<PairSums*>(at)),
        unpacked(at + kMaxTokens * sizeof(PairSums)),
        staged(unpacked + UnpackedPairBytes(precision, m)) {}
  PairSums* sums;
  uint8_t *unpacked, *staged;
};

size_t ScratchBytes(Precision precision, const MatrixLayout& m) {
  return kMaxTokens * sizeof(PairSums) + UnpackedPairBytes(precision, m) +
         kStagedRows * MakeActivationRows(precision, m, kHiddenGroup).row_bytes;
}

// Calls body(first, count) over 0..count-1, in parts of at most kMaxTokens, as even as can be.
template <class Body>
inline void ForParts(size_t count, const Body& body) {
  for (size_t parts = (count + kMaxTokens - 1) / kMaxTokens, first = 0; parts > 0; --parts) {
    const size_t size = (count - first + parts - 1) / parts;
    body(first, size);
    first += size;
  }
}

}  // namespace
}  // namespace kt::KT_ISA
