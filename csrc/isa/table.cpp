#include "hardware/cpuid.hpp"
#include "isa/dispatch.hpp"

namespace kt {

// --8<-- [start:declarations]
#if defined(__x86_64__)
namespace amx { extern const Kernels kKernels; }
namespace avx512_bf16 { extern const Kernels kKernels; }
namespace avx512_vnni { extern const Kernels kKernels; }
namespace avx512 { extern const Kernels kKernels; }
namespace avx_vnni { extern const Kernels kKernels; }
namespace avx2 { extern const Kernels kKernels; }
#endif
namespace scalar { extern const Kernels kKernels; }
// --8<-- [end:declarations]

namespace {

// --8<-- [start:probes]
#if defined(__x86_64__)
// __builtin_cpu_supports asks XCR0 too: a feature whose registers the OS does not save is absent.
bool HasAvx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool HasAvxVnni() { return HasAvx2() && __builtin_cpu_supports("avxvnni"); }
bool HasAvx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool HasAvx512Vnni() { return HasAvx512() && __builtin_cpu_supports("avx512vnni"); }
bool HasAvx512Bf16() { return HasAvx512Vnni() && __builtin_cpu_supports("avx512bf16"); }
// Tiles are a matter of asking too. Once: Linux remembers its answer for the whole process.
bool HasAmx() {
  static const bool is_granted =
      HasAvx512Bf16() &&
      hardware::CanUseAmx(hardware::ReadRegisters(), hardware::RequestAmxPermission);
  return is_granted;
}
#endif
bool Always() { return true; }
// --8<-- [end:probes]

}  // namespace

// --8<-- [start:table]
// The one place that knows which ISAs exist.
const std::vector<Isa>& AllIsas() {
  static const std::vector<Isa> isas = {
#if defined(__x86_64__)
      {"amx", HasAmx, &amx::kKernels},
      {"avx512_bf16", HasAvx512Bf16, &avx512_bf16::kKernels},
      {"avx512_vnni", HasAvx512Vnni, &avx512_vnni::kKernels},
      {"avx512", HasAvx512, &avx512::kKernels},
      {"avx_vnni", HasAvxVnni, &avx_vnni::kKernels},
      {"avx2", HasAvx2, &avx2::kKernels},
#endif
      {"scalar", Always, &scalar::kKernels},
  };
  return isas;
}
// --8<-- [end:table]

}  // namespace kt
