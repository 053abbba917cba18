// The two halves of an expert over its packed panels: see GateUpArgs and DownArgs.
namespace kt::KT_ISA {
namespace {

inline F32 LoadBias(const uint8_t* expert, size_t offset, size_t panel) {
  return F32::Load(reinterpret_cast<const float*>(expert + offset) + panel * kPanel);
}

// What becomes of the products of a pair of panels, [count][2][16].

inline void AddGateUpBias(const GateUpArgs& args, size_t panel, bool is_pair, PairSums* sums) {
  const ExpertLayout& e = *args.layout;
  const F32 first = LoadBias(args.expert, e.has_gate ? e.GateBias() : e.UpBias(), panel);
  const F32 second = e.has_gate ? LoadBias(args.expert, e.UpBias(), panel)
                     : is_pair  ? LoadBias(args.expert, e.UpBias(), panel + 1)
                                : F32::Set(0.0f);
  for (size_t i = 0; i < args.count; ++i) {
    Add(F32::Load(sums[i][0]), first).Store(sums[i][0]);
    Add(F32::Load(sums[i][1]), second).Store(sums[i][1]);
  }
}

inline void StoreGated(const GateUpArgs& args, size_t panel, const PairSums* sums) {
  float* target = args.inter + panel * kPanel;
  if (args.gate == nullptr)
    return ActivatePairs(args.activation, sums, args.count, target, args.inter_stride);
  float* gate = args.gate + panel * kPanel;
  for (size_t i = 0; i < args.count; ++i) {
    F32::Load(sums[i][0]).Store(gate + i * args.inter_stride);
    F32::Load(sums[i][1]).Store(target + i * args.inter_stride);
  }
}

inline void StoreUngated(const GateUpArgs& args, size_t panel, bool is_pair, const PairSums* sums) {
  for (size_t i = 0; i < args.count; ++i)
    for (size_t n = 0; n < (is_pair ? 2 : 1); ++n) {
      const F32 x = F32::Load(sums[i][n]);
      (args.gate ? x : Activate(args.activation, x, x))
          .Store(args.inter + i * args.inter_stride + (panel + n) * kPanel);
    }
}

inline void AddToOut(const DownArgs& args, size_t panel, const PairSums* sums, int n) {
  const ExpertLayout& e = *args.layout;
  const F32 bias = e.has_bias ? LoadBias(args.expert, e.DownBias(), panel) : F32::Set(0.0f);
  float* out = args.out + panel * args.out_tokens * kPanel;
  for (size_t i = 0; i < args.count; ++i) {
    float* target = out + static_cast<size_t>(args.tokens[i]) * kPanel;
    const F32 x = Add(F32::Load(sums[i][n]), bias);
    MulAdd(x, F32::Set(args.weights[i]), F32::Load(target)).Store(target);
  }
}

// The two panels behind these; behind the last ones of a call, what the caller wants.
inline PairArgs PairAt(const uint8_t* first, bool is_pair, bool is_last, const MatrixLayout& m,
                       const ActivationRows& rows, size_t count, const Wanted (&next)[2],
                       uint8_t* unpacked) {
  PairArgs pair{first, is_pair ? first + m.panel_bytes : nullptr, {}, &m, &rows, count, unpacked};
  pair.next[0] = is_last ? next[0] : Wanted{first + 2 * m.panel_bytes, 2 * m.panel_bytes};
  if (is_last) pair.next[1] = next[1];
  return pair;
}

// Panels first..last-1 in twos. A pair is a gate panel and its up panel, or two neighbours.
template <class Product>
inline void GateUpPanels(const GateUpArgs& args, const CallScratch& scratch) {
  const ExpertLayout& e = *args.layout;
  const size_t stride = e.has_gate ? 1 : 2;
  const auto row = [&](size_t i) {
    const size_t at = args.tokens ? static_cast<size_t>(args.tokens[i]) : i;
    return args.hidden.data + at * args.hidden.row_bytes;
  };
  for (size_t p = args.first_panel; p < args.last_panel; p += stride) {
    const bool is_pair = e.has_gate || p + 1 < args.last_panel;
    const uint8_t* first = args.expert + (e.has_gate ? e.GatePanel(p) : e.UpPanel(p));
    const bool is_last = p + stride >= args.last_panel;
    MultiplyPair<Product>(
        PairAt(first, is_pair, is_last, e.up, args.hidden, args.count, args.next, scratch.unpacked),
        row, scratch.sums);
    if (e.has_bias) AddGateUpBias(args, p, is_pair, scratch.sums);
    if (e.has_gate) StoreGated(args, p, scratch.sums);
    else StoreUngated(args, p, is_pair, scratch.sums);
  }
}

template <class Product>
inline void DownPanels(const DownArgs& args, const CallScratch& scratch) {
  const ExpertLayout& e = *args.layout;
  const auto row = [&](size_t i) { return args.inter.data + i * args.inter.row_bytes; };
  for (size_t p = args.first_panel; p < args.last_panel; p += 2) {
    const bool is_pair = p + 1 < args.last_panel;
    const uint8_t* first = args.expert + e.DownPanel(p);
    const bool is_last = p + 2 >= args.last_panel;
    MultiplyPair<Product>(PairAt(first, is_pair, is_last, e.down, args.inter, args.count, args.next,
                                 scratch.unpacked),
                          row, scratch.sums);
    for (int n = 0; n < (is_pair ? 2 : 1); ++n)
      AddToOut(args, p + static_cast<size_t>(n), scratch.sums, n);
  }
}

void GateUp(const GateUpArgs& args) {
  const CallScratch scratch(args.scratch, args.hidden.precision, args.layout->up);
  VisitProduct(args.layout->up, args.hidden, [&](auto product) {
    using Product = decltype(product);
    ForParts(args.count, [&](size_t first, size_t count) {
      GateUpArgs part = args;
      part.tokens += first;
      part.count = count;
      part.inter += first * args.inter_stride;
      if (part.gate) part.gate += first * args.inter_stride;
      if (kStagedRows > 0 && Product::kHasWide && count > kTokenBlock) {
        const size_t row_bytes = args.hidden.row_bytes;
        for (size_t i = 0; i < count; ++i)
          memcpy(scratch.staged + i * row_bytes,
                 args.hidden.data + static_cast<size_t>(part.tokens[i]) * row_bytes, row_bytes);
        part.hidden.data = scratch.staged;
        part.tokens = nullptr;
      }
      GateUpPanels<Product>(part, scratch);
    });
  });
}

void Down(const DownArgs& args) {
  const CallScratch scratch(args.scratch, args.inter.precision, args.layout->down);
  VisitProduct(args.layout->down, args.inter, [&](auto product) {
    ForParts(args.count, [&](size_t first, size_t count) {
      DownArgs part = args;
      part.inter.data += first * args.inter.row_bytes;
      part.tokens += first;
      part.weights += first;
      part.count = count;
      DownPanels<decltype(product)>(part, scratch);
    });
  });
}

}  // namespace
}  // namespace kt::KT_ISA
