// What this machine can do at most with these instructions: products of registers alone, and
// reading memory. `kt bench` measures kernels against it; nothing here computes anything.
namespace kt::KT_ISA {
namespace {

// As many sums as tile/wide.hpp has: enough to hide an instruction's latency, and they stay in
// registers.
template <class Sum, int kSums, class Operand, class Product>
inline size_t RepeatProduct(size_t repetitions, Operand operand, const Product& product) {
  Sum sums[kSums];
  for (Sum& sum : sums) sum = Sum::Set(0);
  for (size_t i = 0; i < repetitions; ++i)
#pragma GCC unroll 16
    for (int n = 0; n < kSums; ++n) {
      Hide(operand);  // else the compiler does equal work once
      sums[n] = product(sums[n], operand);
    }
  for (Sum& sum : sums) Hide(sum);
  return repetitions * kSums * kPanel;
}

#ifdef KT_HAS_TILES
// Zeros times zeros: the time does not depend on the values.
template <bool kIsInt8>
inline size_t RepeatTiles(size_t repetitions) {
  const Tiles tiles(kTileTokens, kRowBytes);  // which also zeroes them
  for (size_t i = 0; i < repetitions; ++i) {
    if constexpr (kIsInt8) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr size_t kInputs = kIsInt8 ? kRowBytes : kRowBytes / 2;
  return repetitions * 2 * kTileTokens * 2 * kPanel * kInputs;
}
#endif

inline size_t Peak(Precision precision, size_t repetitions) {
  uint32_t activations = 0;  // four of int8, or two of bfloat16
  asm volatile("" : "+m"(activations));
  switch (precision) {
    case Precision::kInt8:
#ifdef KT_HAS_TILES
      return RepeatTiles<true>(repetitions);
#endif
      return 4 * 2 *
             RepeatProduct<I32, 2 * kTokenBlock>(repetitions, I32::Set(0), [&](I32 sum, I32 w) {
               return DotU8(sum, w, &activations);
             });
    case Precision::kBf16:
#ifdef KT_HAS_TILES
      return RepeatTiles<false>(repetitions);
#endif
      return 2 * 2 *
             RepeatProduct<F32, 2 * kBf16TokenBlock>(repetitions, I32::Set(0), [&](F32 sum, I32 w) {
               return DotBf16(sum, w, &activations);
             });
    case Precision::kFloat32:
      return 2 * RepeatProduct<F32, 2 * kBf16TokenBlock>(
                     repetitions, F32::Set(0), [](F32 sum, F32 w) { return MulAdd(w, w, sum); });
  }
  return 0;
}

template <int kStreams>
inline size_t ReadStreams(const uint8_t* from, size_t bytes) {
  constexpr size_t kStep = 4 * kRowBytes;
  const size_t part = bytes / kStreams / kStep * kStep;
  I32 sums[4];
  for (I32& sum : sums) sum = I32::Set(0);
  for (size_t at = 0; at < part; at += kStep)
    for (size_t s = 0; s < kStreams; ++s)
#pragma GCC unroll 4
      for (size_t n = 0; n < 4; ++n)
        sums[n] = Xor(sums[n], I32::Load(from + s * part + at + n * kRowBytes));
  for (I32& sum : sums) Hide(sum);
  return kStreams * part;
}

inline size_t Read(const uint8_t* from, size_t bytes, size_t streams) {
  switch (streams) {
    case 1: return ReadStreams<1>(from, bytes);
    case 2: return ReadStreams<2>(from, bytes);
    default: return ReadStreams<4>(from, bytes);
  }
}

}  // namespace
}  // namespace kt::KT_ISA
