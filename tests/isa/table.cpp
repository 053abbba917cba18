// The table of instruction sets in place of csrc/isa/table.cpp, for tests. None but the scalar one
// is taken unasked.
#include "amx_trap.hpp"
#include "hardware/cpuid.hpp"
#include "isa/dispatch.hpp"

namespace kt {

namespace amx { extern const Kernels kKernels; }
namespace amx_emulated { extern const Kernels kKernels; }
namespace avx512_bf16 { extern const Kernels kKernels; }
namespace avx_vnni_512vl { extern const Kernels kKernels; }
namespace scalar { extern const Kernels kKernels; }

namespace {

bool Always() { return true; }

bool HasAvx512Bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}

// The object of a release. Where the processor has AMX and the system grants it, nothing traps.
bool HasTrappedAmx() {
  if (!HasAvx512Bf16()) return false;
  kt_test::InstallAmxTrap();
  hardware::CanUseAmx(hardware::ReadRegisters(), hardware::RequestAmxPermission);
  return true;
}

}  // namespace

const std::vector<Isa>& AllIsas() {
  static const std::vector<Isa> isas = {
      {"scalar", Always, &scalar::kKernels},
      {"avx512_bf16", HasAvx512Bf16, &avx512_bf16::kKernels},
      {"amx_trapped", HasTrappedAmx, &amx::kKernels},
      {"amx_emulated", HasAvx512Bf16, &amx_emulated::kKernels},
      {"avx_vnni_512vl", HasAvx512Bf16, &avx_vnni_512vl::kKernels},
  };
  return isas;
}

}  // namespace kt
