// Many tokens times two unpacked panels, as in tile/wide.hpp, on the tiles of AMX: 32 tokens by 32
// outputs at a time. Int8 sums are the same as there, bit for bit. Tiles:
//
//   0 1    sums: the block's first tokens times the left and the right panel
//   2 3    sums: its other tokens
//   4 5    activations of these tokens, one step of inputs
//   6 7    weights of both panels, the same step: 16 rows of an unpacked panel, as they lie
//
// Tiles are named by literals: GCC 12 pastes the names into assembler text.
namespace kt::KT_ISA {
namespace {

constexpr size_t kTileRows = 16;
constexpr size_t kTileTokens = 2 * kTileRows;

// GCC 12 does not know what tile instructions read: it believes that LDTILECFG reads 8 bytes of its
// 64 and TILELOADD none. Stores that only they would see are dropped, or moved behind them, unless
// this stands between. Before every LDTILECFG, and before the first TILELOADD after plain stores.
#ifndef KT_TILE_FENCE
#define KT_TILE_FENCE() asm volatile("" ::: "memory")
#endif

// What LDTILECFG reads: Intel SDM volume 1, section 18.3, palette 1.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};

  void Set(int tile, size_t tile_rows, size_t bytes) {
    if (tile_rows == 0) return;  // such a tile must have no columns either
    rows[tile] = static_cast<uint8_t>(tile_rows);
    column_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

// This thread's tiles, shaped for blocks of `tokens`. Released at the end: until then, every switch
// to another thread would save and restore 8 KiB.
class Tiles {
 public:
  // step_bytes: of the activations of one token that one multiplication takes, at most 64.
  Tiles(size_t tokens, size_t step_bytes)
      : first_(tokens <= kTileRows ? tokens : (tokens + 1) / 2), second_(tokens - first_) {
    TileConfig config;
    config.Set(0, first_, kRowBytes), config.Set(1, first_, kRowBytes);
    config.Set(2, second_, kRowBytes), config.Set(3, second_, kRowBytes);
    config.Set(4, first_, step_bytes), config.Set(5, second_, step_bytes);
    config.Set(6, step_bytes / 4, kRowBytes), config.Set(7, step_bytes / 4, kRowBytes);
    KT_TILE_FENCE();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  size_t tokens() const { return first_ + second_; }

  void Zero() const {
    _tile_zero(0);
    _tile_zero(1);
    if (second_ == 0) return;
    _tile_zero(2);
    _tile_zero(3);
  }

  // sums += a * (left, right). `a`: the inputs of the first token; the next token's are a_stride
  // bytes behind. Signed bytes times unsigned ones, or bfloat16.
  template <bool kIsInt8>
  void MultiplyAdd(const uint8_t* a, size_t a_stride, const uint8_t* left,
                   const uint8_t* right) const {
    _tile_loadd(6, left, kRowBytes);
    _tile_loadd(4, a, a_stride);
    _tile_loadd(7, right, kRowBytes);
    if constexpr (kIsInt8) {
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (second_ == 0) return;
    _tile_loadd(5, a + first_ * a_stride, a_stride);
    if constexpr (kIsInt8) {
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // The sums, to [tokens][2][16].
  void Store(void* to) const {
    uint8_t* left = static_cast<uint8_t*>(to);
    _tile_stored(0, left, 2 * kRowBytes);
    _tile_stored(1, left + kRowBytes, 2 * kRowBytes);
    if (second_ == 0) return;
    left += first_ * 2 * kRowBytes;
    _tile_stored(2, left, 2 * kRowBytes);
    _tile_stored(3, left + kRowBytes, 2 * kRowBytes);
  }

 private:
  size_t first_, second_;  // tokens in the upper and the lower tiles
};

using TileSums = float[kTileTokens][2][kPanel];

inline void ClearSums(size_t tokens, TileSums& sums) {
  for (size_t m = 0; m < tokens; ++m)
    for (float* of_panel : sums[m]) F32::Set(0.0f).Store(of_panel);
}

// sums[m][n] = what WideInt8 makes of the rows a + m * rows.row_bytes.
template <bool kIsGrouped, int kStep>
inline void TiledInt8(const Tiles& tiles, const Unpacked& w, const MatrixLayout& layout,
                      const ActivationRows& rows, const uint8_t* a, Prefetch prefetch,
                      TileSums& sums) {
  static_assert(kInt8Offset == 128, "weights must be unsigned: TDPBSUD");
  const size_t steps = rows.padded_cols / kStep;
  const int scale_shift = __builtin_ctzll(rows.group / kStep);
  const int group_shift = kIsGrouped ? __builtin_ctzll(layout.group / kStep) : 0;
  alignas(64) int32_t dots[2][kTileTokens][2][kPanel];
  const auto multiply = [&](size_t s) {
    const size_t k = s * kStep;
    tiles.Zero();
    tiles.MultiplyAdd<true>(a + k, rows.row_bytes, w.weights[0] + k * kPanel,
                            w.weights[1] + k * kPanel);
    tiles.Store(dots[s % 2]);
  };
  const auto fold = [&](size_t s) {
    F32 scales[2];
    for (int n = 0; kIsGrouped && n < 2; ++n)
      scales[n] = F32::Load(w.scales[n] + (s >> group_shift) * kPanel);
    const uint8_t* row = a;
    for (size_t m = 0; m < tiles.tokens(); ++m, row += rows.row_bytes) {
      const F32 a_scale =
          F32::Set(reinterpret_cast<const float*>(row + rows.scale_offset)[s >> scale_shift]);
      const I32 correction =
          I32::Set(reinterpret_cast<const int32_t*>(row + rows.correction_offset)[s]);
      for (int n = 0; n < 2; ++n) {
        const F32 dot = ToF32(Add(I32::Load(dots[s % 2][m][n]), correction));
        const F32 scale = kIsGrouped ? Mul(scales[n], a_scale) : a_scale;
        MulAdd(dot, scale, F32::Load(sums[m][n])).Store(sums[m][n]);
      }
    }
  };
  ClearSums(tiles.tokens(), sums);
  KT_TILE_FENCE();  // the weights have just been unpacked
  multiply(0);
  // One step ahead: the tiles multiply while the lanes take in the step before.
  for (size_t s = 0; s < steps; ++s) {
    prefetch.Step();
    if (s + 1 < steps) multiply(s + 1);
    fold(s);
  }
  if (kIsGrouped) return;
  for (int n = 0; n < 2; ++n) {
    const F32 scale = F32::Load(w.scales[n]);
    for (size_t m = 0; m < tiles.tokens(); ++m) Mul(F32::Load(sums[m][n]), scale).Store(sums[m][n]);
  }
}

// Inputs that one multiplication of bfloat16 takes: 64 bytes, or a group where that is less.
inline size_t Bf16TileInputs(const MatrixLayout& layout) {
  return layout.group_cols < 32 ? layout.group_cols : 32;
}

// sums[m][n] = sum over groups of scale * dot, each dot in the tiles from end to end.
inline void TiledBf16(const Tiles& tiles, const Unpacked& w, const MatrixLayout& layout,
                      const ActivationRows& rows, const uint8_t* a, Prefetch prefetch,
                      TileSums& sums) {
  const size_t inputs = Bf16TileInputs(layout);
  alignas(64) float dots[kTileTokens][2][kPanel];
  ClearSums(tiles.tokens(), sums);
  KT_TILE_FENCE();  // the weights have just been unpacked
  size_t k = 0;
  for (size_t g = 0; g < layout.groups; ++g) {
    tiles.Zero();
    for (const size_t end = k + layout.group_cols; k < end; k += inputs) {
      prefetch.Step();
      tiles.MultiplyAdd<false>(a + 2 * k, rows.row_bytes, w.weights[0] + k * kRowBytes / 2,
                               w.weights[1] + k * kRowBytes / 2);
    }
    tiles.Store(dots);
    for (int n = 0; n < 2; ++n) {
      const F32 scale = w.scales[n] ? F32::Load(w.scales[n] + g * kPanel) : F32::Set(1.0f);
      for (size_t m = 0; m < tiles.tokens(); ++m)
        MulAdd(F32::Load(dots[m][n]), scale, F32::Load(sums[m][n])).Store(sums[m][n]);
    }
  }
}

// As AddMinimums() of tile/wide.hpp does.
inline void AddMinimums(const Tiles& tiles, const Unpacked& w, const MatrixLayout& layout,
                        const ActivationRows& rows, const uint8_t* a, TileSums& sums) {
  for (size_t m = 0; m < tiles.tokens(); ++m, a += rows.row_bytes) {
    F32 both[1][2] = {{F32::Load(sums[m][0]), F32::Load(sums[m][1])}};
    AddMinimums(w, layout, rows, &a, both);
    both[0][0].Store(sums[m][0]), both[0][1].Store(sums[m][1]);
  }
}

}  // namespace
}  // namespace kt::KT_ISA
