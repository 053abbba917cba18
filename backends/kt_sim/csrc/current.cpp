#include "current.hpp"

#include <array>
#include <atomic>
#include <memory>
#include <vector>

#include "failure.hpp"
#include "settings.hpp"

namespace kt_sim {
namespace {

constexpr int64_t kPooled = 32;
constexpr size_t kMaxDevices = 16;

struct Device {
  std::array<std::unique_ptr<Queue>, kPooled + 1> queues;
  std::atomic<int64_t> next{0};
};

// Never destroyed: the threads of the queues are not joined.
std::vector<std::unique_ptr<Device>>& devices() {
  static auto* all = [] {
    auto* made = new std::vector<std::unique_ptr<Device>>;
    for (int device = 0; device < fix_settings().devices; ++device) {
      made->push_back(std::make_unique<Device>());
      int64_t id = 0;
      for (auto& queue : made->back()->queues) queue = std::make_unique<Queue>(device, id++);
    }
    return made;
  }();
  return *all;
}

thread_local int this_device = 0;
thread_local std::array<int64_t, kMaxDevices> these_streams{};

}  // namespace

int num_devices() { return settings().devices; }

int current_device() { return this_device; }

void set_current_device(int device) {
  this_device = device_index(static_cast<c10::DeviceIndex>(device));
}

int device_index(c10::DeviceIndex index) {
  const int device = index < 0 ? this_device : index;
  TORCH_CHECK(device < num_devices(), "there is no device sim:", device, "; ", num_devices(),
              " are configured (KT_SIM, or kt_sim.configure)");
  return device;
}

int64_t next_pooled_stream(int device) {
  return 1 + devices().at(static_cast<size_t>(device))->next++ % kPooled;
}

Queue& queue(int device, int64_t stream_id) {
  TORCH_CHECK(0 <= stream_id && stream_id <= kPooled, "sim:", device, " has no stream ", stream_id);
  return *devices().at(static_cast<size_t>(device))->queues[static_cast<size_t>(stream_id)];
}

Queue& queue(const c10::Stream& stream) {
  return queue(device_index(stream.device_index()), stream.id());
}

int64_t current_stream_id(int device) { return these_streams.at(static_cast<size_t>(device)); }

void set_current_stream_id(int device, int64_t id) {
  these_streams.at(static_cast<size_t>(device)) = id;
}

Queue& current_queue(int device) { return queue(device, current_stream_id(device)); }

void synchronize_device(int device) {
  auto& queues = devices().at(static_cast<size_t>(device))->queues;
  for (auto& queue : queues) queue->refuse_while_recording("synchronising the device");
  for (auto& queue : queues) queue->wait_for(queue->point().position);
  check_not_lost(device);
}

}  // namespace kt_sim
