// The two halves of an expert over its packed panels: see GateUpArgs and DownArgs.
namespace kt::KT_ISA {
namespace {

inline F32 LoadBias(const uint8_t* expert, size_t offset, size_t panel) {
  return F32::Load(reinterpret_cast<const float*>(expert + offset) + panel * kPanel);
}

template <class Product>
inline void GateUpPanel(const GateUpArgs& args, size_t panel) {
  const ExpertLayout& e = *args.layout;
  const uint8_t* up_panel = args.expert + e.UpPanel(panel);
  const uint8_t* gate_panel = args.expert + e.GatePanel(panel);
  ForTokenBlocks<kTokenBlock>(0, args.count, [&](size_t first, auto size) {
    constexpr int M = decltype(size)::kValue;
    const uint8_t* a[M];
    for (int m = 0; m < M; ++m)
      a[m] = args.hidden.data + static_cast<size_t>(args.tokens[first + m]) * args.hidden.row_bytes;
    F32 gate[M], up[M];
    if (e.has_gate) Product::template Run<M>(gate_panel, e.up, args.hidden, a, gate);
    Product::template Run<M>(up_panel, e.up, args.hidden, a, up);
    for (int m = 0; m < M; ++m) {
      if (e.has_bias) up[m] = Add(up[m], LoadBias(args.expert, e.UpBias(), panel));
      if (!e.has_gate) gate[m] = up[m];
      else if (e.has_bias) gate[m] = Add(gate[m], LoadBias(args.expert, e.GateBias(), panel));
      Activate(args.activation, gate[m], up[m])
          .Store(args.inter + (first + m) * args.inter_stride + panel * kPanel);
    }
  });
}

template <class Product>
inline void DownPanel(const DownArgs& args, size_t panel) {
  const ExpertLayout& e = *args.layout;
  const uint8_t* weights = args.expert + e.DownPanel(panel);
  ForTokenBlocks<kTokenBlock>(0, args.count, [&](size_t first, auto size) {
    constexpr int M = decltype(size)::kValue;
    const uint8_t* a[M];
    for (int m = 0; m < M; ++m) a[m] = args.inter.data + (first + m) * args.inter.row_bytes;
    F32 out[M];
    Product::template Run<M>(weights, e.down, args.inter, a, out);
    for (int m = 0; m < M; ++m) {
      if (e.has_bias) out[m] = Add(out[m], LoadBias(args.expert, e.DownBias(), panel));
      float* target =
          args.out + static_cast<size_t>(args.tokens[first + m]) * args.out_stride + panel * kPanel;
      MulAdd(out[m], F32::Set(args.weights[first + m]), F32::Load(target)).Store(target);
    }
  });
}

void GateUp(const GateUpArgs& args) {
  VisitProduct(args.layout->up, args.hidden.precision, [&](auto product) {
    for (size_t p = args.first_panel; p < args.last_panel; ++p)
      GateUpPanel<decltype(product)>(args, p);
  });
}

void Down(const DownArgs& args) {
  VisitProduct(args.layout->down, args.inter.precision, [&](auto product) {
    for (size_t p = args.first_panel; p < args.last_panel; ++p)
      DownPanel<decltype(product)>(args, p);
  });
}

}  // namespace
}  // namespace kt::KT_ISA
