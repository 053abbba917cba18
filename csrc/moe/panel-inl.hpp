// Two panels times any number of tokens. Few tokens: the packed weights are read once, as one
// stream, and unpacked on the way. Many: they are unpacked once, into a buffer that stays in the L2
// cache, and blocks of tokens meet both panels at a time.
namespace kt::KT_ISA {
namespace {

// How one weight format meets one precision of the activations: `Multiply` over packed rows or over
// rows that `Unpack` wrote. kUnpacks: the two differ.
template <class Format, bool kGrouped, int kStep>
struct Int8Product {
  static constexpr bool kUnpacks = !Format::kIsInt8Operand;
  static constexpr int kPanels = kPanelBlock;

  static void Unpack(const uint8_t* panel, const MatrixLayout& layout, uint8_t* to) {
    const uint8_t* from = panel + layout.weight_offset;
    for (size_t k = 0; k < layout.padded_cols; k += Format::kValuesPerRow, from += kRowBytes) {
      const I32 row = I32::Load(from);
      for (int i = 0; i < Format::kDotsPerRow; ++i, to += kRowBytes)
        Format::DotOperand(row, i).Store(to);
    }
  }
  static constexpr size_t kUnpackedBytes = 1;  // per weight

  template <bool kPacked, int M, int N>
  static void Multiply(const Panels<N>& w, const MatrixLayout& layout, const ActivationRows& rows,
                       const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][N]) {
    if constexpr (kPacked)
      MultiplyInt8<Format, Format, kGrouped, kStep>(w, layout, rows, a, prefetch, out);
    else MultiplyInt8<Format, Int8Rows<Format>, kGrouped, kStep>(w, layout, rows, a, prefetch, out);
  }
};

template <class Format>
struct Bf16Product {
  static constexpr bool kUnpacks = !Format::kIsBf16Operand;
  static constexpr int kPanels = kPanelBlock;

  static void Unpack(const uint8_t* panel, const MatrixLayout& layout, uint8_t* to) {
    const uint8_t* from = panel + layout.weight_offset;
    const size_t inputs = layout.group ? layout.group : layout.padded_cols;
    for (size_t g = 0; g * inputs < layout.padded_cols; ++g) {
      const I32 zero = Format::kHasZeroPoint ? LoadZero(panel, layout, g) : I32::Set(0);
      for (size_t k = 0; k < inputs; k += Format::kValuesPerRow, from += kRowBytes) {
        const I32 row = I32::Load(from);
        for (int i = 0; i < Format::kValuesPerRow / 2; ++i, to += kRowBytes)
          Format::Bf16Operand(row, i, zero).Store(to);
      }
    }
  }
  static constexpr size_t kUnpackedBytes = 2;

  template <bool kPacked, int M, int N>
  static void Multiply(const Panels<N>& w, const MatrixLayout& layout, const ActivationRows& rows,
                       const uint8_t* const* a, Prefetch prefetch, F32 (&out)[M][N]) {
    if constexpr (kPacked) MultiplyBf16<Format, Format>(w, layout, rows, a, prefetch, out);
    else MultiplyBf16<Format, Bf16Rows>(w, layout, rows, a, prefetch, out);
  }
};

// The exact mode: no unpacked form, one panel at a time.
template <class Format>
struct F32Product {
  static constexpr bool kUnpacks = false;
  static constexpr int kPanels = 1;

  template <bool, int M, int N>
  static void Multiply(const Panels<N>& w, const MatrixLayout& layout, const ActivationRows& rows,
                       const uint8_t* const* a, Prefetch, F32 (&out)[M][N]) {
    MultiplyF32<Format>(w.header[0], layout, rows, a, out);
  }
};

template <class Format, class Visitor>
inline void VisitInteger(const MatrixLayout& layout, const ActivationRows& rows,
                         const Visitor& visitor) {
  if (rows.precision == Precision::kBf16) return visitor(Bf16Product<Format>{});
  if (rows.precision == Precision::kFloat32) return visitor(F32Product<Format>{});
  if (layout.group == 0)
    return rows.step == 64 ? visitor(Int8Product<Format, false, 64>{})
                           : visitor(Int8Product<Format, false, 32>{});
  return rows.step == 64 ? visitor(Int8Product<Format, true, 64>{})
                         : visitor(Int8Product<Format, true, 32>{});
}

// --8<-- [start:visit]
// Calls visitor(Product{}) with the product for this format and precision. The choice is made once
// per call of a kernel, outside every loop.
template <class Visitor>
inline void VisitProduct(const MatrixLayout& layout, const ActivationRows& rows,
                         const Visitor& visitor) {
  switch (layout.element) {
    case Element::kBf16:
      return rows.precision == Precision::kBf16 ? visitor(Bf16Product<Bf16>{})
                                                : visitor(F32Product<Bf16>{});
    case Element::kInt8: return VisitInteger<Int8>(layout, rows, visitor);
    case Element::kInt4:
      return layout.has_zero_point ? VisitInteger<Int4<true>>(layout, rows, visitor)
                                   : VisitInteger<Int4<false>>(layout, rows, visitor);
  }
}
// --8<-- [end:visit]

template <int M>
struct Size {
  static constexpr int kValue = M;
};
template <int M, class Body>
inline void WithSize(size_t size, const Body& body) {
  if constexpr (M > 1)
    if (size < M) return WithSize<M - 1>(size, body);
  body(Size<M>{});
}

// Calls body(first token, Size<M>) over 0..count-1, in blocks as even as can be.
template <int kMax, class Body>
inline void ForTokenBlocks(size_t count, const Body& body) {
  for (size_t blocks = (count + kMax - 1) / kMax, first = 0; blocks > 0; --blocks) {
    const size_t size = (count - first + blocks - 1) / blocks;
    WithSize<kMax>(size, [&](auto m) { body(first, m); });
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

// Calls consume(first token, Size<M>, F32 (&)[M], F32 (&)[M]) with the products of both panels.
// `row(i)` is where the i-th token's activations are.
template <class Product, class Row, class Consume>
inline void MultiplyPair(const PairArgs& args, const Row& row, const Consume& consume) {
  const MatrixLayout& layout = *args.layout;
  const bool has_second = args.second != nullptr;
  const bool is_wide = args.count > kTokenBlock;
  const uint8_t* weights[2] = {args.first + layout.weight_offset,
                               (has_second ? args.second : args.first) + layout.weight_offset};
  if constexpr (Product::kUnpacks) {
    if (is_wide) {
      Product::Unpack(args.first, layout, args.scratch);
      weights[0] = weights[1] = args.scratch;
      if (has_second) {
        weights[1] = args.scratch + kPanel * layout.padded_cols * Product::kUnpackedBytes;
        Product::Unpack(args.second, layout,
                        args.scratch + kPanel * layout.padded_cols * Product::kUnpackedBytes);
      }
    }
  }
  Prefetch prefetch{args.first, 0};
  if (is_wide && args.has_next) {
    const size_t steps =
        (args.count + kTokenBlock - 1) / kTokenBlock * (layout.padded_cols / args.rows->step);
    prefetch = {args.first + 2 * layout.panel_bytes,
                2 * layout.panel_bytes / kRowBytes / steps + 1};
  }
  ForTokenBlocks<kTokenBlock>(args.count, [&](size_t first, auto size) {
    constexpr int M = decltype(size)::kValue;
    const uint8_t* a[M];
    for (int m = 0; m < M; ++m) a[m] = row(first + static_cast<size_t>(m));
    F32 left[M], right[M];
    if constexpr (Product::kPanels == 2) {
      if (is_wide && has_second) {
        F32 both[M][2];
        const Panels<2> w{{args.first, args.second}, {weights[0], weights[1]}};
        Product::template Multiply<!Product::kUnpacks>(w, layout, *args.rows, a, prefetch, both);
        prefetch.at += prefetch.lines_per_step * kRowBytes * (layout.padded_cols / args.rows->step);
        for (int m = 0; m < M; ++m) left[m] = both[m][0], right[m] = both[m][1];
        return consume(first, size, left, right);
      }
    }
    const auto one = [&](const uint8_t* panel, const uint8_t* rows, F32(&out)[M]) {
      F32 sums[M][1];
      const Panels<1> w{{panel}, {rows}};
      if constexpr (Product::kUnpacks) {
        if (is_wide) Product::template Multiply<false>(w, layout, *args.rows, a, {rows, 0}, sums);
        else Product::template Multiply<true>(w, layout, *args.rows, a, {rows, 0}, sums);
      } else {
        Product::template Multiply<true>(w, layout, *args.rows, a, {rows, 0}, sums);
      }
      for (int m = 0; m < M; ++m) out[m] = sums[m][0];
    };
    one(args.first, weights[0], left);
    if (has_second) one(args.second, weights[1], right);
    else
      for (int m = 0; m < M; ++m) right[m] = left[m];
    consume(first, size, left, right);
  });
}

}  // namespace
}  // namespace kt::KT_ISA
