// How long things take on the device. A task runs on a host thread as fast as it can; then its
// stream sleeps until the simulated device would be done.
#pragma once

#include <chrono>
#include <cstddef>

namespace kt_sim {

using Clock = std::chrono::steady_clock;

// Parts of a device that work at the same time, each on one thing after the other.
enum class Unit { kNone, kCompute, kToDevice, kToHost };

struct Cost {
  Unit unit = Unit::kNone;
  double seconds = 0;
};

// One transfer over the link.
Cost link_cost(Unit direction, size_t bytes);
// A kernel that moves so many bytes of device memory and does so many operations: whichever takes
// longer.
Cost kernel_cost(double bytes, double flops, bool is_16_bit);

// Takes the unit for that long, not before `ready`, in the order of the calls; returns when it
// ends.
Clock::time_point occupy(int device, const Cost& cost, Clock::time_point ready);

}  // namespace kt_sim
