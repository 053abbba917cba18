#include "cpuid.hpp"

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <initializer_list>

#if defined(__x86_64__) || defined(__i386__)
#define KT_HAS_CPUID 1
#include <cpuid.h>
#else
#define KT_HAS_CPUID 0
#endif

#if defined(__linux__) && defined(__x86_64__)
#define KT_HAS_ARCH_PRCTL 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define KT_HAS_ARCH_PRCTL 0
#endif

namespace kt::hardware {
namespace {

// Register files beyond the ones every x86-64 system saves. Each has its bits in XCR0 (Intel SDM
// volume 1, section 13.3) and one feature without which its other features make no sense: a
// hypervisor may mask that one and forget the rest, and Linux then hides the rest too.
enum class State { kAlways, kYmm, kZmm, kTile };

constexpr uint64_t kYmmBits = 0x6;       // bit 1 XMM, bit 2 upper halves of YMM
constexpr uint64_t kZmmBits = 0xE6;      // the above and bits 5 opmask, 6 ZMM0-15, 7 ZMM16-31
constexpr uint64_t kTileBits = 0x60000;  // bit 17 TILECFG, bit 18 TILEDATA

struct Feature {
  const char* name;
  Leaf Registers::* leaf;
  uint32_t Leaf::* word;
  unsigned bit;
  State state;
};

// Bit numbers: Intel SDM volume 2A, instruction CPUID, leaves 1 and 7. Names:
// Linux arch/x86/include/asm/cpufeatures.h, which is not consistent about underscores.
constexpr Feature kFeatures[] = {
    {"ssse3", &Registers::leaf1, &Leaf::ecx, 9, State::kAlways},
    {"sse4_1", &Registers::leaf1, &Leaf::ecx, 19, State::kAlways},
    {"sse4_2", &Registers::leaf1, &Leaf::ecx, 20, State::kAlways},
    {"popcnt", &Registers::leaf1, &Leaf::ecx, 23, State::kAlways},
    {"bmi1", &Registers::leaf7_0, &Leaf::ebx, 3, State::kAlways},
    {"bmi2", &Registers::leaf7_0, &Leaf::ebx, 8, State::kAlways},
    {"avx", &Registers::leaf1, &Leaf::ecx, 28, State::kYmm},
    {"fma", &Registers::leaf1, &Leaf::ecx, 12, State::kYmm},
    {"f16c", &Registers::leaf1, &Leaf::ecx, 29, State::kYmm},
    {"avx2", &Registers::leaf7_0, &Leaf::ebx, 5, State::kYmm},
    {"avx_vnni", &Registers::leaf7_1, &Leaf::eax, 4, State::kYmm},
    {"avx512f", &Registers::leaf7_0, &Leaf::ebx, 16, State::kZmm},
    {"avx512dq", &Registers::leaf7_0, &Leaf::ebx, 17, State::kZmm},
    {"avx512ifma", &Registers::leaf7_0, &Leaf::ebx, 21, State::kZmm},
    {"avx512cd", &Registers::leaf7_0, &Leaf::ebx, 28, State::kZmm},
    {"avx512bw", &Registers::leaf7_0, &Leaf::ebx, 30, State::kZmm},
    {"avx512vl", &Registers::leaf7_0, &Leaf::ebx, 31, State::kZmm},
    {"avx512vbmi", &Registers::leaf7_0, &Leaf::ecx, 1, State::kZmm},
    {"avx512_vbmi2", &Registers::leaf7_0, &Leaf::ecx, 6, State::kZmm},
    {"avx512_vnni", &Registers::leaf7_0, &Leaf::ecx, 11, State::kZmm},
    {"avx512_bitalg", &Registers::leaf7_0, &Leaf::ecx, 12, State::kZmm},
    {"avx512_vpopcntdq", &Registers::leaf7_0, &Leaf::ecx, 14, State::kZmm},
    {"avx512_bf16", &Registers::leaf7_1, &Leaf::eax, 5, State::kZmm},
    {"avx512_fp16", &Registers::leaf7_0, &Leaf::edx, 23, State::kZmm},
    {"amx_tile", &Registers::leaf7_0, &Leaf::edx, 24, State::kTile},
    {"amx_int8", &Registers::leaf7_0, &Leaf::edx, 25, State::kTile},
    {"amx_bf16", &Registers::leaf7_0, &Leaf::edx, 22, State::kTile},
};

constexpr bool Bit(uint32_t word, unsigned bit) { return ((word >> bit) & 1U) != 0; }

bool IsStateUsable(const Registers& registers, State state) {
  // Without OSXSAVE, XGETBV traps, and whatever a recording holds as XCR0 means nothing.
  const uint64_t saved = Bit(registers.leaf1.ecx, 27) ? registers.xcr0 : 0;
  switch (state) {
    case State::kAlways: return true;
    case State::kYmm: return (saved & kYmmBits) == kYmmBits && Bit(registers.leaf1.ecx, 28);
    case State::kZmm: return (saved & kZmmBits) == kZmmBits && Bit(registers.leaf7_0.ebx, 16);
    case State::kTile: return (saved & kTileBits) == kTileBits && Bit(registers.leaf7_0.edx, 24);
  }
  return false;
}

// Intel answers a basic leaf above the highest one with the highest one's values (a Haswell returns
// leaf 13 for 14 and up), so those bits must be dropped, not decoded.
Registers WithoutInvalidLeaves(Registers registers) {
  const uint32_t highest = registers.leaf0.eax;
  if (highest < 1) registers.leaf1 = {};
  if (highest < 7) registers.leaf7_0 = {};
  if (registers.leaf7_0.eax < 1) registers.leaf7_1 = {};
  if (registers.extended0.eax < 0x80000004U) registers.brand = {};
  return registers;
}

// A hypervisor may set any bytes; what is not ASCII becomes '?', as the text is printed as UTF-8.
void AppendBytes(std::string& text, uint32_t word) {
  for (int shift = 0; shift < 32; shift += 8) {
    const uint32_t byte = (word >> shift) & 0xFFU;
    const bool is_text = byte == 0 || (byte >= ' ' && byte <= '~');
    text.push_back(is_text ? static_cast<char>(byte) : '?');
  }
}

// Brand strings are padded with NUL behind and, on older processors, with blanks in front.
std::string Trimmed(std::string text) {
  text.erase(std::min(text.find('\0'), text.size()));
  const size_t first = text.find_first_not_of(' ');
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

#if KT_HAS_CPUID
Leaf Cpuid(uint32_t leaf, uint32_t subleaf) {
  Leaf out;
  __cpuid_count(leaf, subleaf, out.eax, out.ebx, out.ecx, out.edx);
  return out;
}

uint64_t ReadXcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  // XGETBV in bytes: the intrinsic would need this file to be built with -mxsave.
  asm volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}
#endif

#if KT_HAS_ARCH_PRCTL
// Linux arch/x86/include/uapi/asm/prctl.h; older C libraries have neither names nor a wrapper.
constexpr long kGetPermission = 0x1022;      // ARCH_GET_XCOMP_PERM
constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // XFEATURE_XTILEDATA, also its bit in the answer
#endif

}  // namespace

Registers ReadRegisters() {
  Registers registers;
#if KT_HAS_CPUID
  registers.leaf0 = Cpuid(0, 0);
  registers.leaf1 = Cpuid(1, 0);
  registers.leaf7_0 = Cpuid(7, 0);
  registers.leaf7_1 = Cpuid(7, 1);
  registers.extended0 = Cpuid(0x80000000U, 0);
  for (uint32_t i = 0; i < registers.brand.size(); ++i) {
    registers.brand[i] = Cpuid(0x80000002U + i, 0);
  }
  if (Bit(registers.leaf1.ecx, 27)) registers.xcr0 = ReadXcr0();
#endif
  return registers;
}

std::vector<std::string> DecodeFeatures(const Registers& registers) {
  const Registers valid = WithoutInvalidLeaves(registers);
  std::vector<std::string> names;
  for (const Feature& feature : kFeatures) {
    if (Bit(valid.*feature.leaf.*feature.word, feature.bit) &&
        IsStateUsable(valid, feature.state)) {
      names.emplace_back(feature.name);
    }
  }
  return names;
}

std::vector<std::string> KnownFeatures() {
  std::vector<std::string> names;
  for (const Feature& feature : kFeatures) names.emplace_back(feature.name);
  return names;
}

std::string Vendor(const Registers& registers) {
  std::string text;
  AppendBytes(text, registers.leaf0.ebx);
  AppendBytes(text, registers.leaf0.edx);  // EDX is the middle third
  AppendBytes(text, registers.leaf0.ecx);
  return Trimmed(text);
}

std::string Brand(const Registers& registers) {
  std::string text;
  for (const Leaf& leaf : WithoutInvalidLeaves(registers).brand) {
    for (uint32_t word : {leaf.eax, leaf.ebx, leaf.ecx, leaf.edx}) AppendBytes(text, word);
  }
  return Trimmed(text);
}

int RequestAmxPermission() {
#if KT_HAS_ARCH_PRCTL
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

bool CanUseAmx(const Registers& registers, int (*request)()) {
  const std::vector<std::string> features = DecodeFeatures(registers);
  for (const char* needed : {"amx_tile", "amx_int8", "amx_bf16"})
    if (std::find(features.begin(), features.end(), needed) == features.end()) return false;
  return request() == 0;
}

bool AmxPermitted() {
#if KT_HAS_ARCH_PRCTL
  uint64_t permitted = 0;
  return syscall(SYS_arch_prctl, kGetPermission, &permitted) == 0 &&
         ((permitted >> kTileData) & 1) != 0;
#else
  return false;
#endif
}

}  // namespace kt::hardware
