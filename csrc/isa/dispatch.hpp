#pragma once
#include <string_view>
#include <vector>

#include "moe/kernels.hpp"

namespace kt {

struct Isa {
  std::string_view name;
  bool (*is_supported)();  // by this CPU and its operating system
  const Kernels* kernels;
};

// Every ISA of this build, best first; the last one always runs.
const std::vector<Isa>& AllIsas();

// The ISA called `name`, or the best supported one if it is empty.
// Throws std::invalid_argument if this build has none of that name, std::runtime_error if this CPU
// cannot run it; each message says what to do.
const Isa& SelectIsa(std::string_view name);

}  // namespace kt
