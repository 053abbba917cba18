#include "doorbell.hpp"

#include <chrono>

#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include "runtime/pause.hpp"

namespace kt::hardware {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// Longer than a layer takes while tokens are generated: so each of its calls is met awake.
constexpr auto kAwake = milliseconds(5);
// Between looks: after that, and once nothing has come for a second.
constexpr auto kNap = microseconds(20), kSleep = microseconds(1000);
constexpr auto kIdle = milliseconds(1000);

}  // namespace

Doorbell::Doorbell(Bell* bells, size_t count)
    : bells_(bells), count_(count), thread_([this] { Listen(); }) {}

Doorbell::~Doorbell() {
  stop_.store(true);
  thread_.join();
}

uint32_t Doorbell::Number(Function function, void* argument) {
  const std::lock_guard lock(mutex_);
  is_expected_.store(true, std::memory_order_relaxed);
  const auto next = static_cast<uint32_t>(functions_.size() + 1);
  const auto [found, is_new] = numbers_.try_emplace({function, argument}, next);
  if (is_new) functions_.emplace_back(function, argument);
  return found->second;
}

void Doorbell::Listen() {
#if defined(__linux__)
  prctl(PR_SET_NAME, "kt-doorbell");
  prctl(PR_SET_TIMERSLACK, 1UL);  // else a nap of 20 us takes 70
#endif
  Clock::time_point last = Clock::now();
  for (unsigned looks = 0; !stop_.load(std::memory_order_relaxed); ++looks) {
    if (Answer() || is_expected_.exchange(false, std::memory_order_relaxed)) {
      last = Clock::now();
      continue;
    }
    Pause();
    if (looks % 256 != 0) continue;  // a look at the clock costs more than one at the bells
    for (auto silent = Clock::now() - last; silent > kAwake; silent = Clock::now() - last) {
      if (stop_.load(std::memory_order_relaxed)) return;
      std::this_thread::sleep_for(silent > kIdle ? kSleep : kNap);
      if (Answer() || is_expected_.exchange(false, std::memory_order_relaxed)) last = Clock::now();
    }
  }
}

// Answers whoever has rung; false if nobody has.
bool Doorbell::Answer() {
  bool has_rung = false;
  for (size_t i = 0; i < count_; ++i) {
    std::atomic_ref<uint32_t> request(bells_[i].request), answer(bells_[i].answer);
    const uint32_t number = request.load(std::memory_order_acquire);
    if (number == 0) continue;
    has_rung = true;
    request.store(0, std::memory_order_relaxed);  // before the answer: then it may be rung again
    std::pair<Function, void*> call;
    {
      const std::lock_guard lock(mutex_);
      call = functions_.at(number - 1);
    }
    call.first(call.second);
    answer.store(number, std::memory_order_release);
  }
  return has_rung;
}

}  // namespace kt::hardware
