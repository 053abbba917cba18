#include "isa/dispatch.hpp"

#include <stdexcept>
#include <string>

namespace kt {

const Isa& SelectIsa(std::string_view name) {
  std::string known;
  for (const Isa& isa : AllIsas()) {
    if (name.empty() ? isa.is_supported() : name == isa.name) {
      if (isa.is_supported()) return isa;
      throw std::runtime_error(
          "instruction set '" + std::string(name) +
          "' is not supported by this CPU, or its operating system refuses it; run "
          "`kt doctor` to see which are");
    }
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set '" + std::string(name) +
                              "' is not known to this build; it has: " + known);
}

}  // namespace kt
