// The activations of kt_core.types.ActivationKind over 16 lanes.
namespace kt::KT_ISA {
namespace {

// exp(x) within 2 ulp for -87 <= x <= 88; clamped outside, NaN stays NaN. Range reduction
// x = n ln2 + r and the degree-5 polynomial for exp(r) are those of the Cephes library, expf.c.
[[gnu::always_inline]] inline F32 Exp(F32 x) {
  x = Max(F32::Set(-87.0f), Min(F32::Set(88.0f), x));
  // NaN has no integer: take 0 for it, and let r carry it.
  const F32 t = Mul(x, F32::Set(1.44269504088896341f));
  const I32 n = ToI32(IfLess(Abs(t), F32::Set(200.0f), t, F32::Set(0.0f)));
  const F32 nf = ToF32(n);
  F32 r = MulAdd(nf, F32::Set(-0.693359375f), x);
  r = MulAdd(nf, F32::Set(2.12194440e-4f), r);
  F32 p = F32::Set(1.9875691500e-4f);
  p = MulAdd(p, r, F32::Set(1.3981999507e-3f));
  p = MulAdd(p, r, F32::Set(8.3334519073e-3f));
  p = MulAdd(p, r, F32::Set(4.1665795894e-2f));
  p = MulAdd(p, r, F32::Set(1.6666665459e-1f));
  p = MulAdd(p, r, F32::Set(5.0000001201e-1f));
  p = Add(MulAdd(p, Mul(r, r), r), F32::Set(1.0f));
  return Mul(p, AsF32(Shl(Add(n, I32::Set(127)), 23)));
}

inline F32 Negate(F32 x) { return Sub(F32::Set(0.0f), x); }

inline F32 Sigmoid(F32 x) { return Div(F32::Set(1.0f), Add(F32::Set(1.0f), Exp(Negate(x)))); }

// Near zero the polynomial of Cephes tanhf.c, since 1 - 2 / (exp(2x) + 1) cancels there.
inline F32 Tanh(F32 x) {
  const F32 z = Mul(x, x);
  F32 p = F32::Set(-5.70498872745e-3f);
  p = MulAdd(p, z, F32::Set(2.06390887954e-2f));
  p = MulAdd(p, z, F32::Set(-5.37397155531e-2f));
  p = MulAdd(p, z, F32::Set(1.33314422036e-1f));
  p = MulAdd(p, z, F32::Set(-3.33332819422e-1f));
  const F32 small = MulAdd(Mul(p, z), x, x);
  const F32 e = Exp(Add(x, x));
  const F32 large = Sub(F32::Set(1.0f), Div(F32::Set(2.0f), Add(e, F32::Set(1.0f))));
  return IfLess(Abs(x), F32::Set(0.625f), small, large);
}

inline F32 Gelu(F32 x) {
  float lanes[16];
  x.Store(lanes);
  for (float& v : lanes) v = 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  return F32::Load(lanes);
}

inline F32 GeluTanh(F32 x) {
  const F32 cubic = MulAdd(Mul(Mul(x, x), x), F32::Set(0.044715f), x);
  const F32 t = Tanh(Mul(cubic, F32::Set(0.79788456080286536f)));  // sqrt(2 / pi)
  return Mul(Mul(F32::Set(0.5f), x), Add(F32::Set(1.0f), t));
}

inline F32 Relu(F32 x) { return Max(F32::Set(0.0f), x); }

inline F32 Clamp(F32 x, float limit) { return Max(F32::Set(-limit), Min(F32::Set(limit), x)); }

inline F32 SoftCap(F32 x, float cap) { return Mul(Tanh(Div(x, F32::Set(cap))), F32::Set(cap)); }

inline F32 Activate(const Activation& a, F32 gate, F32 up) {
  const F32 limit = F32::Set(a.limit);
  F32 f;
  switch (a.kind) {
    case ActivationKind::kSilu: f = Mul(gate, Sigmoid(gate)); break;
    case ActivationKind::kGelu: f = Gelu(gate); break;
    case ActivationKind::kGeluTanh: f = GeluTanh(gate); break;
    case ActivationKind::kRelu: f = Relu(gate); break;
    case ActivationKind::kRelu2: f = Mul(Relu(gate), Relu(gate)); break;
    case ActivationKind::kSwigluClamp: {
      const F32 g = Min(limit, gate);
      return Mul(Mul(g, Sigmoid(g)), Clamp(up, a.limit));
    }
    case ActivationKind::kSwigluClampAfter:
      return Mul(Min(limit, Mul(gate, Sigmoid(gate))), Clamp(up, a.limit));
    case ActivationKind::kSwigluOai: {
      const F32 g = Min(limit, gate);
      return Mul(Mul(g, Sigmoid(Mul(g, F32::Set(a.alpha)))),
                 Add(Clamp(up, a.limit), F32::Set(1.0f)));
    }
    case ActivationKind::kSwigluSoftcap:
      return Mul(Mul(SoftCap(gate, a.limit), Sigmoid(gate)), SoftCap(up, a.up_limit));
    default: f = gate; break;
  }
  return a.is_gated ? Mul(f, up) : f;
}

// inter[i] = the activation of gate (sums[i][0]) and up (sums[i][1]).
inline void ActivatePairs(const Activation& a, const PairSums* sums, size_t count, float* inter,
                          size_t stride) {
  if (a.kind == ActivationKind::kSilu) {  // nearly every model: no calls in the loop
    for (size_t i = 0; i < count; ++i, inter += stride) {
      const F32 gate = F32::Load(sums[i][0]);
      Mul(Mul(gate, Sigmoid(gate)), F32::Load(sums[i][1])).Store(inter);
    }
    return;
  }
  for (size_t i = 0; i < count; ++i, inter += stride)
    Activate(a, F32::Load(sums[i][0]), F32::Load(sums[i][1])).Store(inter);
}

void ActivateArray(const Activation& a, const float* gate, const float* up, float* out, size_t n) {
  for (size_t i = 0; i < n; i += kPanel)
    Activate(a, F32::Load(gate + i), F32::Load(up + i)).Store(out + i);
}

}  // namespace
}  // namespace kt::KT_ISA
