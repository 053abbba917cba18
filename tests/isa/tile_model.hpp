// AMX in software: palette 1 of Intel SDM volume 1, chapter 18, and the pseudo-code of each
// instruction in volume 2. Where the processor would raise an exception, this ends the process and
// says why. Everything is local to the file that includes this.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

namespace tile_model {
namespace {

constexpr int kTiles = 8, kRows = 16, kColumnBytes = 64;

// The tiles of one thread, as the processor has them.
struct State {
  uint8_t palette, start_row;
  uint16_t column_bytes[kTiles];
  uint8_t rows[kTiles];
  uint8_t data[kTiles][kRows][kColumnBytes];
};

thread_local State state;

[[noreturn]] inline void Fault(const char* what) {
  fprintf(stderr, "AMX fault: %s\n", what);
  abort();
}

inline void LoadConfig(const void* from) {
  uint8_t config[64];
  memcpy(config, from, 64);
  state = {};
  if (config[0] == 0) return;
  if (config[0] != 1) Fault("LDTILECFG: unknown palette");
  for (int i = 2; i < 64; ++i) {
    const bool is_reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (is_reserved && config[i] != 0) Fault("LDTILECFG: a reserved byte is set");
  }
  state.palette = 1;
  state.start_row = config[1];
  for (int i = 0; i < kTiles; ++i) {
    memcpy(&state.column_bytes[i], config + 16 + 2 * i, 2);
    state.rows[i] = config[48 + i];
    if (state.column_bytes[i] > kColumnBytes || state.rows[i] > kRows ||
        (state.column_bytes[i] == 0) != (state.rows[i] == 0))
      Fault("LDTILECFG: a tile has an impossible shape");
  }
}

inline void StoreConfig(void* to) {
  uint8_t config[64] = {state.palette, state.start_row};
  memcpy(config + 16, state.column_bytes, sizeof state.column_bytes);
  memcpy(config + 48, state.rows, sizeof state.rows);
  memcpy(to, config, 64);
}

inline void Release() { state = {}; }

inline void NeedTile(int tile) {
  if (state.palette == 0) Fault("this thread's tiles are not configured");
  if (tile >= kTiles || state.rows[tile] == 0) Fault("this tile is not configured");
}

inline void Zero(int tile) {
  NeedTile(tile);
  memset(state.data[tile], 0, sizeof state.data[tile]);
}

inline void Load(int tile, const void* base, ptrdiff_t stride) {
  Zero(tile);
  for (int r = 0; r < state.rows[tile]; ++r)
    memcpy(state.data[tile][r], static_cast<const char*>(base) + r * stride,
           state.column_bytes[tile]);
}

inline void Store(int tile, void* base, ptrdiff_t stride) {
  NeedTile(tile);
  for (int r = 0; r < state.rows[tile]; ++r)
    memcpy(static_cast<char*>(base) + r * stride, state.data[tile][r], state.column_bytes[tile]);
}

// The sizes of a product: rows of d and a, lanes of d and b, 4-byte steps of a and rows of b.
struct Shape {
  int rows, lanes, steps;
};

inline Shape ProductShape(int d, int a, int b) {
  NeedTile(d), NeedTile(a), NeedTile(b);
  if (d == a || d == b || a == b) Fault("a product needs three different tiles");
  const auto& bytes = state.column_bytes;
  if ((bytes[d] | bytes[a] | bytes[b]) % 4 != 0) Fault("a product needs whole 4-byte columns");
  if (state.rows[d] != state.rows[a] || bytes[d] != bytes[b] || bytes[a] / 4 != state.rows[b])
    Fault("the shapes of a product's tiles do not match");
  return {state.rows[d], bytes[d] / 4, state.rows[b]};
}

// Ends a product: rows and lanes beyond its shape become zero.
template <class T>
inline void StoreRow(int d, int row, const Shape& shape, const T (&sums)[16]) {
  memset(state.data[d][row], 0, kColumnBytes);
  memcpy(state.data[d][row], sums, 4 * static_cast<size_t>(shape.lanes));
}
inline void ClearBelow(int d, const Shape& shape) {
  memset(state.data[d][shape.rows], 0, static_cast<size_t>(kRows - shape.rows) * kColumnBytes);
}

// TDPB{S,U}{S,U}D: A and B are the types of the bytes of tiles a and b.
template <class A, class B>
inline void DotBytes(int d, int a, int b) {
  const Shape shape = ProductShape(d, a, b);
  for (int m = 0; m < shape.rows; ++m) {
    uint32_t sums[16];  // they wrap
    memcpy(sums, state.data[d][m], sizeof sums);
    for (int k = 0; k < shape.steps; ++k)
      for (int n = 0; n < shape.lanes; ++n)
        for (int j = 0; j < 4; ++j)
          sums[n] += static_cast<uint32_t>(static_cast<A>(state.data[a][m][4 * k + j]) *
                                           static_cast<B>(state.data[b][k][4 * n + j]));
    StoreRow(d, m, shape, sums);
  }
  ClearBelow(d, shape);
}

// TDPBF16PS takes subnormal numbers as zero and makes none.
inline float Flush(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }

inline float FromBf16(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  memcpy(&x, &bits, 4);
  return Flush(x);
}

// TDPBF16PS: even and odd inputs are summed apart, each with fused multiply-adds.
inline void DotBf16(int d, int a, int b) {
  const Shape shape = ProductShape(d, a, b);
  for (int m = 0; m < shape.rows; ++m) {
    float even[16] = {}, odd[16] = {}, sums[16];
    memcpy(sums, state.data[d][m], sizeof sums);
    for (int k = 0; k < shape.steps; ++k)
      for (int n = 0; n < shape.lanes; ++n) {
        const uint8_t *x = &state.data[a][m][4 * k], *y = &state.data[b][k][4 * n];
        even[n] = Flush(fmaf(FromBf16(x), FromBf16(y), even[n]));
        odd[n] = Flush(fmaf(FromBf16(x + 2), FromBf16(y + 2), odd[n]));
      }
    for (int n = 0; n < shape.lanes; ++n) sums[n] = Flush(Flush(sums[n]) + Flush(even[n] + odd[n]));
    StoreRow(d, m, shape, sums);
  }
  ClearBelow(d, shape);
}

}  // namespace
}  // namespace tile_model
