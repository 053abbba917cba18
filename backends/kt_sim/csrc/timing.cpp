#include "timing.hpp"

#include <algorithm>
#include <array>
#include <mutex>

#include "settings.hpp"

namespace kt_sim {
namespace {

constexpr size_t kMaxDevices = 16;

struct Units {
  std::mutex mutex;
  std::array<Clock::time_point, 4> free_at{};  // by Unit
};

double seconds_for(double amount, double per_s) { return per_s > 0 ? amount / per_s : 0; }

}  // namespace

Cost link_cost(Unit direction, size_t bytes) {
  const Settings now = settings();
  return {direction,
          now.link_latency_s + seconds_for(static_cast<double>(bytes), now.link_bytes_per_s)};
}

Cost kernel_cost(double bytes, double flops, bool is_16_bit) {
  const Settings now = settings();
  const double peak = is_16_bit ? now.float16_flops_per_s : now.float32_flops_per_s;
  return {Unit::kCompute,
          std::max(seconds_for(bytes, now.memory_bytes_per_s), seconds_for(flops, peak))};
}

Clock::time_point occupy(int device, const Cost& cost, Clock::time_point ready) {
  if (cost.unit == Unit::kNone) return ready;
  static auto* all = new std::array<Units, kMaxDevices>;
  Units& units = all->at(static_cast<size_t>(device));
  std::lock_guard<std::mutex> lock(units.mutex);
  auto& free_at = units.free_at[static_cast<size_t>(cost.unit)];
  const auto length =
      std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(cost.seconds));
  free_at = std::max(free_at, ready) + length;
  return free_at;
}

}  // namespace kt_sim
