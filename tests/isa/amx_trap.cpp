// Runs the real machine code of isa/amx.cpp on x86-64 Linux without AMX: a handler of SIGILL
// decodes the instruction, does what it says, and goes on behind it.
#include "amx_trap.hpp"

#include <signal.h>
#include <ucontext.h>

#include <atomic>

#include "tile_model.hpp"

// For ctypes: how many instructions were done here, by all threads.
extern "C" [[gnu::visibility("default")]] unsigned long kt_amx_trapped();

namespace {

std::atomic<unsigned long> trapped{0};
struct sigaction previous;

// General registers by their number in an instruction.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                REG_R12, REG_R13, REG_R14, REG_R15};

// One VEX instruction of the map 0F38 with W = 0 and 128 bits: Intel SDM volume 2, section 2.3.
struct Instruction {
  uint8_t opcode;
  int prefix;  // 0 none, 1 66, 2 F3, 3 F2
  bool is_register, has_index;
  int reg, rm, vvvv;  // numbers of tiles
  char* base;         // of the memory operand, without the index
  ptrdiff_t index;    // scaled
  int length;         // 0: not an instruction of this kind
};

int32_t Read32(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return x;
}

Instruction Decode(const uint8_t* code, const greg_t* registers) {
  Instruction in{};
  const bool is_ours = code[0] == 0xC4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0;
  if (!is_ours) return in;
  const int index_high = code[1] & 0x40 ? 0 : 8, base_high = code[1] & 0x20 ? 0 : 8;
  in.vvvv = (~code[2] >> 3) & 15;
  in.prefix = code[2] & 3;
  in.opcode = code[3];
  const int mod = code[4] >> 6;
  in.reg = (code[4] >> 3) & 7;
  in.rm = code[4] & 7;
  in.is_register = mod == 3;
  const uint8_t* next = code + 5;
  if (!in.is_register) {
    int64_t address = 0;
    int base = in.rm;
    if (in.rm == 4) {  // a SIB byte
      const uint8_t sib = *next++;
      const int index = ((sib >> 3) & 7) | index_high;
      in.has_index = index != 4;
      if (in.has_index) in.index = registers[kRegisters[index]] << (sib >> 6);
      base = sib & 7;
    }
    const bool has_no_base = base == 5 && mod == 0;
    if (!has_no_base) address = registers[kRegisters[base | base_high]];
    if (mod == 1) address += static_cast<int8_t>(*next++);
    if (mod == 2 || has_no_base) address += Read32(next), next += 4;
    if (has_no_base && in.rm == 5) address += reinterpret_cast<int64_t>(next);  // from RIP
    in.base = reinterpret_cast<char*>(address);
  }
  in.length = static_cast<int>(next - code);
  return in;
}

// Returns false if it is none of AMX's.
bool Execute(const Instruction& in) {
  using namespace tile_model;
  switch (in.opcode) {
    case 0x49:
      if (!in.is_register && in.prefix == 0) LoadConfig(in.base + in.index);
      else if (!in.is_register && in.prefix == 1) StoreConfig(in.base + in.index);
      else if (in.is_register && in.prefix == 0) Release();
      else if (in.is_register && in.prefix == 3) Zero(in.reg);
      else return false;
      return true;
    case 0x4B:
      if (in.is_register || in.rm != 4 || in.prefix == 0) return false;
      if (in.prefix == 2) Store(in.reg, in.base, in.index);
      else Load(in.reg, in.base, in.index);
      return true;
    case 0x5C:
      if (!in.is_register || in.prefix != 2) return false;
      DotBf16(in.reg, in.rm, in.vvvv);
      return true;
    case 0x5E:
      if (!in.is_register) return false;
      if (in.prefix == 3) DotBytes<int8_t, int8_t>(in.reg, in.rm, in.vvvv);
      else if (in.prefix == 2) DotBytes<int8_t, uint8_t>(in.reg, in.rm, in.vvvv);
      else if (in.prefix == 1) DotBytes<uint8_t, int8_t>(in.reg, in.rm, in.vvvv);
      else DotBytes<uint8_t, uint8_t>(in.reg, in.rm, in.vvvv);
      return true;
    default: return false;
  }
}

void OnIllegalInstruction(int, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction in = Decode(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
  if (in.length > 0 && Execute(in)) {
    registers[REG_RIP] += in.length;
    trapped.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  sigaction(SIGILL, &previous, nullptr);  // the instruction is tried again, under that handler
}

}  // namespace

unsigned long kt_amx_trapped() { return trapped; }

void kt_test::InstallAmxTrap() {
  static const bool is_installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = OnIllegalInstruction;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGILL, &action, &previous) == 0;
  }();
  if (!is_installed) tile_model::Fault("the handler of SIGILL could not be installed");
}
