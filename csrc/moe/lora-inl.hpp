// Small float32 products: see GemmArgs.
namespace kt::KT_ISA {
namespace {

void Gemm(const GemmArgs& args) {
  const F32 alpha = F32::Set(args.alpha);
  for (size_t n = 0; n < args.n; n += 2 * kPanel) {
    const bool is_pair = n + kPanel < args.n;
    const size_t second = is_pair ? kPanel : 0;  // a last 16 columns meet themselves
    ForTokenBlocks<1, kTokenBlock>(args.m, [&](size_t at, auto size) {
      constexpr int M = decltype(size)::kValue;
      F32 sums[M][2];
      for (auto& row : sums) row[0] = row[1] = F32::Set(0.0f);
      const float* x = args.x + at * args.x_row;
      const float* w = args.w + n;
      for (size_t k = 0; k < args.k; ++k, x += args.x_col, w += args.w_row) {
        const F32 left = F32::Load(w), right = F32::Load(w + second);
        for (int m = 0; m < M; ++m) {
          const F32 a = F32::Set(x[static_cast<size_t>(m) * args.x_row]);
          sums[m][0] = MulAdd(left, a, sums[m][0]);
          sums[m][1] = MulAdd(right, a, sums[m][1]);
        }
      }
      for (int m = 0; m < M; ++m) {
        float* out = args.out + (at + static_cast<size_t>(m)) * args.out_row + n;
        for (int i = 0; i < (is_pair ? 2 : 1); ++i, out += kPanel)
          MulAdd(sums[m][i], alpha, args.adds ? F32::Load(out) : F32::Set(0.0f)).Store(out);
      }
    });
  }
}

}  // namespace
}  // namespace kt::KT_ISA
