// Gradients from the packed weights: see TransposedArgs and ActivationGradArgs.
namespace kt::KT_ISA {
namespace {

// Panels ahead whose bytes are asked for: a block of 16 inputs is a few lines, far from the next.
constexpr size_t kPanelsAhead = 4;

// Inputs of panel p, all outputs of all matrices, at `to`: [outputs padded, 16 inputs].
template <class Format, class Value>
inline void TransposePanel(const TransposedArgs& args, size_t p, Value* to) {
  const MatrixLayout& m = *args.layout;
  const size_t padded = args.rows.padded_cols;
  const InputBlock at = BlockOfInputs<Format>(m, p * kPanel);
  for (const uint8_t* panel : args.matrices) {
    if (panel == nullptr) break;
    for (size_t n = 0; n < m.panels; ++n, panel += args.panel_stride) {
      const uint8_t* ahead = panel + kPanelsAhead * args.panel_stride + at.weights;
      for (size_t line = 0; line < kPanel / Format::kValuesPerRow; ++line)
        __builtin_prefetch(ahead + line * kRowBytes);
      Value* block = to + n * kPanel * kPanel;
      if constexpr (sizeof(Value) == 4) TransposeToF32<Format>(panel, at, m, block);
      else TransposeToBf16<Format>(panel, at, m, reinterpret_cast<uint8_t*>(block));
    }
    const size_t packed = m.panels * kPanel;
    memset(to + packed * kPanel, 0, (padded - packed) * kPanel * sizeof(Value));
    to += padded * kPanel;
  }
}

// `Value` is what rows and transposed weights are made of: float, or the bits of a bfloat16.
template <class Format, class Value>
inline void TransposedPanels(const TransposedArgs& args) {
  const MatrixLayout t = TransposedLayout(*args.layout, args.matrices[1] ? 2 : 1);
  Value* first = reinterpret_cast<Value*>(args.scratch);
  Value* second = first + t.group_cols * kPanel;
  for (size_t p = args.first_panel; p < args.last_panel; p += 2) {
    const bool is_pair = p + 1 < args.last_panel;
    TransposePanel<Format>(args, p, first);
    if (is_pair) TransposePanel<Format>(args, p + 1, second);
    // A last panel without a partner meets itself.
    const Value* weights[2] = {first, is_pair ? second : first};
    ForTokenBlocks<1, kTokenBlock>(args.count, [&](size_t at, auto size) {
      constexpr int M = decltype(size)::kValue;
      const uint8_t* a[M];
      for (int m = 0; m < M; ++m) {
        const size_t i = at + static_cast<size_t>(m);
        a[m] = args.rows.data +
               (args.from ? static_cast<size_t>(args.from[i]) : i) * args.rows.row_bytes;
      }
      PairSums sums[M] = {};
      if constexpr (sizeof(Value) == 4) {
        const float* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = reinterpret_cast<const float*>(a[m]);
        WideF32<M>(weights, t.group_cols, rows, sums);
      } else {
        const Unpacked w{{{reinterpret_cast<const uint8_t*>(weights[0]), nullptr},
                          {reinterpret_cast<const uint8_t*>(weights[1]), nullptr}}};
        WideBf16<M>(w, {0, t.group_cols}, t, a, Prefetch(), sums);
      }
      for (int m = 0; m < M; ++m) {
        const size_t i = at + static_cast<size_t>(m);
        float* out = args.out + p * args.out_panel_stride +
                     (args.to ? static_cast<size_t>(args.to[i]) : i) * args.out_row_stride;
        for (int n = 0; n < (is_pair ? 2 : 1); ++n, out += args.out_panel_stride) {
          const F32 x = F32::Load(sums[m][n]);
          (args.adds ? Add(F32::Load(out), x) : x).Store(out);
        }
      }
    });
  }
}

void Transposed(const TransposedArgs& args) {
  VisitFormat(*args.layout, [&](auto format) {
    if (args.rows.precision == Precision::kFloat32)
      return TransposedPanels<decltype(format), float>(args);
    return TransposedPanels<decltype(format), uint16_t>(args);
  });
}

// A function and its derivative.
struct Slope {
  F32 value, slope;
};

// 1 where x <= limit, else 0: what torch's clamp lets through, its bounds included.
inline F32 NotAbove(F32 x, F32 limit) { return IfLess(limit, x, F32::Set(0.0f), F32::Set(1.0f)); }

// 1 - tanh(x)^2, without cancelling where tanh is near 1.
inline F32 TanhSlope(F32 x) {
  const F32 e = Exp(Mul(F32::Set(-2.0f), Abs(x)));
  const F32 sum = Add(F32::Set(1.0f), e);
  return Div(Mul(F32::Set(4.0f), e), Mul(sum, sum));
}

// x sigmoid(alpha x)
inline Slope Swish(F32 x, float alpha) {
  const F32 ax = Mul(x, F32::Set(alpha)), s = Sigmoid(ax);
  return {Mul(x, s), Mul(s, MulAdd(ax, Sigmoid(Negate(ax)), F32::Set(1.0f)))};
}

inline Slope GeluSlope(F32 x) {
  float lanes[16];
  x.Store(lanes);
  for (float& v : lanes) v = 0.5f * (1.0f + erff(v * 0.70710678118654752f));
  const F32 below = F32::Load(lanes);
  const F32 density = Mul(Exp(Mul(Mul(x, x), F32::Set(-0.5f))),
                          F32::Set(0.39894228040143268f));  // 1 / sqrt(2 pi)
  return {Mul(x, below), MulAdd(x, density, below)};
}

inline Slope GeluTanhSlope(F32 x) {
  const F32 root = F32::Set(0.79788456080286536f);  // sqrt(2 / pi)
  const F32 square = Mul(x, x), half = Mul(F32::Set(0.5f), x);
  const F32 y = Mul(root, MulAdd(Mul(square, x), F32::Set(0.044715f), x));
  const F32 dy = Mul(root, MulAdd(square, F32::Set(3 * 0.044715f), F32::Set(1.0f)));
  const F32 t = Add(F32::Set(1.0f), Tanh(y));
  return {Mul(half, t), MulAdd(Mul(half, TanhSlope(y)), dy, Mul(F32::Set(0.5f), t))};
}

// c tanh(x / c)
inline Slope SoftCapSlope(F32 x, float cap) {
  return {SoftCap(x, cap), TanhSlope(Div(x, F32::Set(cap)))};
}

// The factor that depends on the gate, and the one that depends on up.
inline void Factors(const Activation& a, F32 gate, F32 up, Slope& of_gate, Slope& of_up) {
  const F32 zero = F32::Set(0.0f), limit = F32::Set(a.limit);
  const auto bounded_up = [&] {
    const F32 inside = Mul(NotAbove(up, limit), NotAbove(Negate(up), limit));
    return Slope{Clamp(up, a.limit), inside};
  };
  of_up = {up, F32::Set(1.0f)};
  switch (a.kind) {
    case ActivationKind::kSilu: of_gate = Swish(gate, 1.0f); return;
    case ActivationKind::kGelu: of_gate = GeluSlope(gate); return;
    case ActivationKind::kGeluTanh: of_gate = GeluTanhSlope(gate); return;
    case ActivationKind::kRelu:
      of_gate = {Relu(gate), IfLess(zero, gate, F32::Set(1.0f), zero)};
      return;
    case ActivationKind::kRelu2: {
      const F32 r = Relu(gate);
      of_gate = {Mul(r, r), Add(r, r)};
      return;
    }
    case ActivationKind::kSwigluClampAfter: {
      const Slope silu = Swish(gate, 1.0f);
      of_gate = {Min(limit, silu.value), Mul(silu.slope, NotAbove(silu.value, limit))};
      of_up = bounded_up();
      return;
    }
    case ActivationKind::kSwigluClamp:
    case ActivationKind::kSwigluOai: {
      const bool is_oai = a.kind == ActivationKind::kSwigluOai;
      of_gate = Swish(Min(limit, gate), is_oai ? a.alpha : 1.0f);
      of_gate.slope = Mul(of_gate.slope, NotAbove(gate, limit));
      of_up = bounded_up();
      if (is_oai) of_up.value = Add(of_up.value, F32::Set(1.0f));
      return;
    }
    case ActivationKind::kSwigluSoftcap: {
      const Slope cap = SoftCapSlope(gate, a.limit);
      const F32 s = Sigmoid(gate);
      of_gate = {Mul(cap.value, s), Mul(s, MulAdd(cap.value, Sigmoid(Negate(gate)), cap.slope))};
      of_up = SoftCapSlope(up, a.up_limit);
      return;
    }
  }
}

float ActivationGrad(const ActivationGradArgs& args) {
  const bool is_gated = args.activation.is_gated;
  const F32 weight = F32::Set(args.weight);
  F32 total = F32::Set(0.0f);
  for (size_t i = 0; i < args.n; i += kPanel) {
    const F32 gate = F32::Load(args.gate + i), up = F32::Load(args.up + i);
    const F32 grad = F32::Load(args.grad + i);
    Slope of_gate, of_up;
    Factors(args.activation, gate, up, of_gate, of_up);
    const F32 inter = is_gated ? Mul(of_gate.value, of_up.value) : of_gate.value;
    total = MulAdd(grad, inter, total);
    if (args.inter) inter.Store(args.inter + i);
    const F32 weighted = Mul(grad, weight), of_f = Mul(weighted, of_gate.slope);
    if (is_gated) Mul(Mul(weighted, of_up.slope), of_gate.value).Store(args.up + i);
    (is_gated ? Mul(of_f, of_up.value) : of_f).Store(args.gate + i);
  }
  return ReduceAdd(total);
}

}  // namespace
}  // namespace kt::KT_ISA
