// What goes wrong on purpose or by mistake: a device that is lost, calls that are refused.
#pragma once

#include <string>

namespace kt_sim {

// Calls that can be told to fail, each a number of times.
enum class Fault { kAllocation, kHostFunction };

// The next `times` calls of this kind on the device fail.
void inject(int device, Fault fault, int times);
// Whether this call is one that fails; counts it.
bool takes_fault(int device, Fault fault);

// From now on every call on the device fails with this reason, and what waits in its streams is
// dropped; events and the waits for them still happen, so that nobody waits for ever. The first
// reason stays. This is what an operator's error does too: as on a GPU, nobody is there to catch
// it.
void lose(int device, const std::string& reason);
bool is_lost(int device);
// Throws c10::Error if the device is lost.
void check_not_lost(int device);
// Makes a lost device usable again; what was dropped stays dropped. Clears faults.
void revive(int device);

}  // namespace kt_sim
