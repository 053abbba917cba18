#include "settings.hpp"

#include <mutex>
#include <stdexcept>

namespace kt_sim {
namespace {

std::mutex& guard() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

Settings current;
bool is_fixed = false;

}  // namespace

Settings settings() {
  std::lock_guard<std::mutex> lock(guard());
  return current;
}

Settings fix_settings() {
  std::lock_guard<std::mutex> lock(guard());
  if (current.memory_bytes == 0) throw std::logic_error("kt_sim was used before it was configured");
  is_fixed = true;
  return current;
}

void configure(const Settings& wanted) {
  // A rate of 0 stands for "takes no time".
  if (wanted.devices < 1 || wanted.devices > 16 || wanted.memory_bytes < 1 ||
      wanted.link_bytes_per_s < 0 || wanted.link_latency_s < 0 || wanted.memory_bytes_per_s < 0 ||
      wanted.float32_flops_per_s < 0 || wanted.float16_flops_per_s < 0) {
    throw std::invalid_argument(
        "a simulated machine has 1 to 16 devices, memory, and no negative rate");
  }
  std::lock_guard<std::mutex> lock(guard());
  if (is_fixed &&
      (wanted.devices != current.devices || wanted.memory_bytes != current.memory_bytes)) {
    throw std::invalid_argument(
        "simulated devices are in use, so their number and memory cannot change any more: set them "
        "first, or start another process; rates can change at any time");
  }
  current = wanted;
}

}  // namespace kt_sim
