#pragma once

namespace kt_test {

// From now on, AMX instructions that this processor refuses are done by tile_model.hpp; other
// illegal instructions are left to the handler that was there. May be repeated.
void InstallAmxTrap();

}  // namespace kt_test
