#include "failure.hpp"

#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <mutex>

namespace kt_sim {
namespace {

constexpr int kMaxDevices = 16;

struct State {
  std::atomic<bool> lost{false};
  std::atomic<int> faults[2] = {0, 0};
  std::mutex mutex;
  std::string reason;
};

State& state(int device) {
  static auto* states = new std::array<State, kMaxDevices>;
  return states->at(static_cast<size_t>(device));
}

}  // namespace

void inject(int device, Fault fault, int times) {
  state(device).faults[static_cast<int>(fault)] = times;
}

bool takes_fault(int device, Fault fault) {
  auto& left = state(device).faults[static_cast<int>(fault)];
  int before = left.load();
  while (before > 0 && !left.compare_exchange_weak(before, before - 1)) {
  }
  return before > 0;
}

void lose(int device, const std::string& reason) {
  State& it = state(device);
  std::lock_guard<std::mutex> lock(it.mutex);
  if (it.lost) return;
  it.reason = reason;
  it.lost = true;
}

bool is_lost(int device) { return state(device).lost; }

void check_not_lost(int device) {
  State& it = state(device);
  if (!it.lost) return;
  std::lock_guard<std::mutex> lock(it.mutex);
  TORCH_CHECK(false, "sim:", device, " is lost: ", it.reason,
              "; what waited in its streams was dropped. End the process, or, in a test, call "
              "kt_sim.revive(",
              device, ")");
}

void revive(int device) {
  State& it = state(device);
  std::lock_guard<std::mutex> lock(it.mutex);
  it.lost = false;
  it.reason.clear();
  for (auto& left : it.faults) left = 0;
}

}  // namespace kt_sim
