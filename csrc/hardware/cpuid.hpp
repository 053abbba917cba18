// What this processor offers and what the operating system lets a process use of it.
//
// Reading (ReadRegisters) and deciding (everything that takes a Registers) are apart, so that tests
// can decide about processors that are not in the machine. On other architectures than x86 every
// register reads as zero: no features, no vendor, no brand.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace kt::hardware {

// The four registers that one CPUID instruction returns.
struct Leaf {
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
};

// Raw values, as the instructions returned them; the members are named for the leaf and the
// subleaf.
struct Registers {
  Leaf leaf0;                 // highest basic leaf, vendor
  Leaf leaf1;                 // features up to AVX
  Leaf leaf7_0;               // features from AVX2; highest subleaf of leaf 7
  Leaf leaf7_1;               // features after 2020
  Leaf extended0;             // leaf 0x80000000: highest extended leaf
  std::array<Leaf, 3> brand;  // leaves 0x80000002 to 0x80000004
  uint64_t xcr0 = 0;          // register states that the operating system saves; 0 without OSXSAVE
};

Registers ReadRegisters();

// Names of the features that a program may use, spelt as Linux spells them in /proc/cpuinfo. A
// feature whose registers the operating system does not save is left out: its instructions trap.
// Tile features still need RequestAmxPermission() before the first tile instruction.
std::vector<std::string> DecodeFeatures(const Registers& registers);

// Every name DecodeFeatures can return, in table order.
std::vector<std::string> KnownFeatures();

// "GenuineIntel", "AuthenticAMD", ...; empty where there is no CPUID.
std::string Vendor(const Registers& registers);

// The marketing name, without the padding; empty where the processor has none.
std::string Brand(const Registers& registers);

// Asks Linux to let this process, all its threads and its later children use tile registers.
// Returns 0, or the errno: EOPNOTSUPP (no AMX), EINVAL (kernel before 5.16), ENOSPC (a thread's
// signal stack is too small for the larger frame), ENOSYS (no such call here). May be repeated.
int RequestAmxPermission();

// Whether the processor has the tiles, their int8 and their bfloat16 products, and the system lets
// this process use them. `request`, RequestAmxPermission but for tests, is called only if it has.
bool CanUseAmx(const Registers& registers, int (*request)());

// Whether the permission is there, requested by this process or inherited.
bool AmxPermitted();

}  // namespace kt::hardware
