// Wrong uses of the tiles, for test_tile_model.py: the emulator must notice each.
//
//   config   shapes tiles as the kernels do
//   data     multiplies bytes that were stored just before; prints how many sums are wrong
//   thread   uses tiles on a thread that has not shaped them
//   shape    multiplies tiles that do not fit together
//
// Built with -DNO_FENCE, it is what the kernels would be without KT_TILE_FENCE().
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <thread>

#ifdef NO_FENCE
#define KT_TILE_FENCE()
#endif
#define KT_ISA amx_faults
#include "amx_trap.hpp"
#include "moe/kernels.hpp"
#include "simd/amx.hpp"
#include "tile/stream.hpp"
#include "tile/wide.hpp"

#include "tile/amx.hpp"

using namespace kt::amx_faults;

namespace {

// The compiler cannot know these numbers.
volatile int seed = 1;

void Configure() {
  const Tiles tiles(16, 64);
  tiles.Zero();
}

// A buffer that nothing but the tile loads reads.
[[gnu::noinline]] void LoadBytes(int first) {
  alignas(64) uint8_t bytes[16][64];
  for (int i = 0; i < 16 * 64; ++i) bytes[i / 64][i % 64] = static_cast<uint8_t>(first + i % 100);
  KT_TILE_FENCE();
  _tile_loadd(4, bytes, 64);
  _tile_loadd(6, bytes, 64);
}

int WrongSums() {
  static const struct alignas(64) {
    uint8_t palette = 1, unused[15] = {};
    uint16_t column_bytes[16] = {64, 64, 0, 0, 64, 0, 64, 64};
    uint8_t rows[16] = {16, 16, 0, 0, 16, 0, 16, 16};
  } config;
  _tile_loadconfig(&config);
  alignas(64) int32_t sums[16][2][16];
  const int first = seed;
  _tile_zero(0);
  LoadBytes(first);
  _tile_dpbsud(0, 4, 6);
  _tile_stored(0, sums, 128);
  _tile_release();
  int wrong = 0;
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      int32_t want = 0;
      for (int k = 0; k < 64; ++k)
        want += (first + (64 * m + k) % 100) * (first + (64 * (k / 4) + 4 * n + k % 4) % 100);
      wrong += sums[m][0][n] != want;
    }
  return wrong;
}

}  // namespace

int main(int argc, char** argv) {
  kt_test::InstallAmxTrap();
  const char* use = argc > 1 ? argv[1] : "";
  if (strcmp(use, "config") == 0) {
    Configure();
  } else if (strcmp(use, "data") == 0) {
    printf("%d wrong\n", WrongSums());
  } else if (strcmp(use, "thread") == 0) {
    const Tiles tiles(16, 64);
    tiles.Zero();
    std::thread([] { _tile_zero(0); }).join();
  } else if (strcmp(use, "shape") == 0) {
    const Tiles tiles(16, 32);
    _tile_dpbsud(0, 4, 1);
  } else {
    return 2;
  }
}
