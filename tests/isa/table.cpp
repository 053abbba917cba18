// The table of instruction sets in place of csrc/isa/table.cpp, for tests. None but the scalar one
// is taken unasked.
#include <errno.h>

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

// The object of a release. Nothing traps where the processor has AMX.
bool HasTrappedAmx() {
  if (!HasAvx512Bf16()) return false;
  const hardware::Registers registers = hardware::ReadRegisters();
  if (hardware::CanUseAmx(registers, [] { return 0; }))
    return hardware::RequestAmxPermission() == 0;
  kt_test::InstallAmxTrap();
  return true;
}

// A Sapphire Rapids under Linux 5.16 or later, as far as AMX is concerned.
hardware::Registers RegistersWithAmx() {
  hardware::Registers registers;
  registers.leaf0.eax = 0x20;
  registers.leaf1.ecx = 1u << 27;
  registers.leaf7_0.edx = 1u << 22 | 1u << 24 | 1u << 25;
  registers.xcr0 = 0x602E7;
  return registers;
}

bool HasEmulatedAmx() {
  return HasAvx512Bf16() && hardware::CanUseAmx(RegistersWithAmx(), [] { return 0; });
}
bool HasRefusedAmx() {
  return hardware::CanUseAmx(RegistersWithAmx(), [] { return EPERM; });
}

}  // namespace

const std::vector<Isa>& AllIsas() {
  static const std::vector<Isa> isas = {
      {"scalar", Always, &scalar::kKernels},
      {"avx512_bf16", HasAvx512Bf16, &avx512_bf16::kKernels},
      {"amx_trapped", HasTrappedAmx, &amx::kKernels},
      {"amx_emulated", HasEmulatedAmx, &amx_emulated::kKernels},
      {"amx_refused", HasRefusedAmx, &scalar::kKernels},
      {"avx_vnni_512vl", HasAvx512Bf16, &avx_vnni_512vl::kKernels},
  };
  return isas;
}

}  // namespace kt
