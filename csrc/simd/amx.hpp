#pragma once
#include "simd/avx512.hpp"

// Lanes as in simd/avx512.hpp, with VNNI and BF16, and the tiles of AMX for many tokens:
// tile/amx.hpp. Needs AMX-TILE, AMX-INT8, AMX-BF16.
#define KT_HAS_TILES 1
