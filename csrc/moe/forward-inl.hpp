// The two halves of an expert over its packed panels: see GateUpArgs and DownArgs.
namespace kt::KT_ISA {
namespace {

inline F32 LoadBias(const uint8_t* expert, size_t offset, size_t panel) {
  return F32::Load(reinterpret_cast<const float*>(expert + offset) + panel * kPanel);
}

// Panels first..last-1 in twos. A pair is a gate panel and its up panel, or two neighbours.
template <class Product>
inline void GateUpPanels(const GateUpArgs& args) {
  const ExpertLayout& e = *args.layout;
  const size_t stride = e.has_gate ? 1 : 2;
  const auto row = [&](size_t i) {
    const size_t at = args.tokens ? static_cast<size_t>(args.tokens[i]) : i;
    return args.hidden.data + at * args.hidden.row_bytes;
  };
  for (size_t p = args.first_panel; p < args.last_panel; p += stride) {
    const bool is_pair = e.has_gate || p + 1 < args.last_panel;
    const uint8_t* first = args.expert + (e.has_gate ? e.GatePanel(p) : e.UpPanel(p));
    const PairArgs pair{first,
                        is_pair ? first + e.up.panel_bytes : nullptr,
                        p + stride < args.last_panel,
                        &e.up,
                        &args.hidden,
                        args.count,
                        args.scratch};
    MultiplyPair<Product>(pair, row, [&](size_t at, auto size, auto& left, auto& right) {
      constexpr int M = decltype(size)::kValue;
      for (int m = 0; m < M; ++m) {
        float* target = args.inter + (at + static_cast<size_t>(m)) * args.inter_stride + p * kPanel;
        F32 x = left[m], y = right[m];
        if (e.has_bias)
          x = Add(x, LoadBias(args.expert, e.has_gate ? e.GateBias() : e.UpBias(), p));
        if (e.has_gate) {
          if (e.has_bias) y = Add(y, LoadBias(args.expert, e.UpBias(), p));
          if (args.gate == nullptr) {
            Activate(args.activation, x, y).Store(target);
          } else {
            x.Store(args.gate + (target - args.inter));
            y.Store(target);
          }
          continue;
        }
        const bool is_raw = args.gate != nullptr;
        (is_raw ? x : Activate(args.activation, x, x)).Store(target);
        if (!is_pair) continue;
        if (e.has_bias) y = Add(y, LoadBias(args.expert, e.UpBias(), p + 1));
        (is_raw ? y : Activate(args.activation, y, y)).Store(target + kPanel);
      }
    });
  }
}

template <class Product>
inline void DownPanels(const DownArgs& args) {
  const ExpertLayout& e = *args.layout;
  const auto row = [&](size_t i) { return args.inter.data + i * args.inter.row_bytes; };
  for (size_t p = args.first_panel; p < args.last_panel; p += 2) {
    const bool is_pair = p + 1 < args.last_panel;
    const uint8_t* first = args.expert + e.DownPanel(p);
    const PairArgs pair{first,
                        is_pair ? first + e.down.panel_bytes : nullptr,
                        p + 2 < args.last_panel,
                        &e.down,
                        &args.inter,
                        args.count,
                        args.scratch};
    const auto add = [&](size_t token, size_t panel, F32 x) {
      if (e.has_bias) x = Add(x, LoadBias(args.expert, e.DownBias(), panel));
      float* target =
          args.out + (panel * args.out_tokens + static_cast<size_t>(args.tokens[token])) * kPanel;
      MulAdd(x, F32::Set(args.weights[token]), F32::Load(target)).Store(target);
    };
    MultiplyPair<Product>(pair, row, [&](size_t at, auto size, auto& left, auto& right) {
      constexpr int M = decltype(size)::kValue;
      for (int m = 0; m < M; ++m) {
        add(at + static_cast<size_t>(m), p, left[m]);
        if (is_pair) add(at + static_cast<size_t>(m), p + 1, right[m]);
      }
    });
  }
}

// Tiles are loaded with one stride from row to row: they want copies of the rows, one after
// another. Each serves all panels of a call; how many there are is a matter of the L2 cache.
#ifdef KT_HAS_TILES
constexpr size_t kStagedRows = 128;
#else
constexpr size_t kStagedRows = 0;
#endif

template <class Product, size_t kRows>
inline void GateUpStaged(const GateUpArgs& args) {
  uint8_t* staged = args.scratch + UnpackScratchBytes(args.hidden.precision, args.layout->up, 0);
  const size_t row_bytes = args.hidden.row_bytes;
  size_t first = 0;
  for (size_t parts = (args.count + kRows - 1) / kRows; parts > 0; --parts) {
    const size_t count = (args.count - first + parts - 1) / parts;
    for (size_t i = 0; i < count; ++i)
      memcpy(staged + i * row_bytes,
             args.hidden.data + static_cast<size_t>(args.tokens[first + i]) * row_bytes, row_bytes);
    GateUpArgs part = args;
    part.hidden.data = staged;
    part.tokens = nullptr;
    part.count = count;
    part.inter += first * args.inter_stride;
    if (part.gate) part.gate += first * args.inter_stride;
    GateUpPanels<Product>(part);
    first += count;
  }
}

void GateUp(const GateUpArgs& args) {
  VisitProduct(args.layout->up, args.hidden, [&](auto product) {
    using Product = decltype(product);
    if constexpr (kStagedRows > 0 && Product::kHasWide)
      if (args.count > kTokenBlock) return GateUpStaged<Product, kStagedRows>(args);
    GateUpPanels<Product>(args);
  });
}

void Down(const DownArgs& args) {
  VisitProduct(args.layout->down, args.inter,
               [&](auto product) { DownPanels<decltype(product)>(args); });
}

}  // namespace
}  // namespace kt::KT_ISA
