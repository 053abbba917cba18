// Joins the algorithms for the ISA whose simd/ header the including file has chosen. Included once
// per translation unit. No std:: templates may be instantiated here: their weak symbols, built with
// this file's flags, could be the ones an older CPU runs.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "format/bfloat16.hpp"
#include "format/float16.hpp"
#include "moe/kernels.hpp"

#include "format/quantize.hpp"

#include "format/bf16.hpp"
#include "format/fp4.hpp"
#include "format/fp8.hpp"
#include "format/int4.hpp"
#include "format/int8.hpp"

#include "format/formats.hpp"

#include "tile/stream.hpp"
#include "tile/wide.hpp"

#include "tile/transpose.hpp"
#ifdef KT_HAS_TILES
#include "tile/amx.hpp"
#endif

#include "moe/product-inl.hpp"

#include "moe/panel-inl.hpp"

#include "moe/activation-inl.hpp"

#include "moe/prepare-inl.hpp"

#include "moe/forward-inl.hpp"

#include "moe/backward-inl.hpp"

#include "moe/lora-inl.hpp"

#include "moe/pack-inl.hpp"

#include "tile/peak.hpp"

namespace kt::KT_ISA {
extern const Kernels kKernels;
const Kernels kKernels = {Prepare, GateUp,        Down,         Pack, Transposed, ActivationGrad,
                          Gemm,    ActivateArray, ScratchBytes, Peak, Read};
}  // namespace kt::KT_ISA
