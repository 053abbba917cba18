// The source of isa/amx.cpp with function calls in place of the tile instructions.
#include <immintrin.h>

#include "tile_model.hpp"

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig tile_model::LoadConfig
#define _tile_release tile_model::Release
#define _tile_loadd(tile, base, stride) tile_model::Load(tile, base, static_cast<ptrdiff_t>(stride))
#define _tile_stored(tile, base, stride) \
  tile_model::Store(tile, base, static_cast<ptrdiff_t>(stride))
#define _tile_zero tile_model::Zero
#define _tile_dpbsud tile_model::DotBytes<int8_t, uint8_t>
#define _tile_dpbf16ps tile_model::DotBf16

#define KT_ISA amx_emulated
#include "simd/amx.hpp"

#include "isa/kernels-inl.hpp"
