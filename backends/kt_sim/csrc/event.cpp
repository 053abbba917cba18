#include "event.hpp"

#include <c10/util/Exception.h>

#include <algorithm>

#include "failure.hpp"
#include "gil.hpp"
#include "recording.hpp"

namespace kt_sim {

Event::Event() : state_(std::make_shared<State>()) {}

void Event::record(Queue& queue) {
  check_not_lost(queue.device());
  device_ = queue.device();
  if (const auto graph = queue.recording()) {
    recording_ = graph;
    signal_ = graph->add_signal(queue);
    return;
  }
  signal_ = -1;
  uint64_t version = 0;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    version = ++state_->recorded;
  }
  queue.push_now({[state = state_, version] {
                    std::lock_guard<std::mutex> lock(state->mutex);
                    state->passed = std::max(state->passed, version);
                    state->passed_at = Clock::now();
                    state->passed_one.notify_all();
                    return Cost{};
                  },
                  true, "an event"});
}

void Event::block(Queue& queue) const {
  check_not_lost(queue.device());
  const auto capturing = queue.recording();
  if (signal_ >= 0) {
    const auto graph = recording_.lock();
    TORCH_CHECK(
        graph != nullptr && !graph->is_ended() && (capturing == nullptr || capturing == graph),
        "an event that was recorded while a graph was captured means nothing outside of "
        "that capture; record it again");
    graph->add_wait(queue, signal_);
    return;
  }
  uint64_t version = 0;
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    version = state_->recorded;
  }
  if (version == 0) return;
  queue.refuse_while_recording("waiting for an event from outside of the graph");
  queue.push_now({[state = state_, version] {
                    std::unique_lock<std::mutex> lock(state->mutex);
                    state->passed_one.wait(lock, [&] { return state->passed >= version; });
                    return Cost{};
                  },
                  true, "a wait for an event"});
}

bool Event::query() const {
  check_not_captured("asking for an event");
  std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->passed >= state_->recorded;
}

void Event::synchronize() const {
  check_not_captured("waiting for an event");
  {
    GilRelease release;
    std::unique_lock<std::mutex> lock(state_->mutex);
    const uint64_t version = state_->recorded;
    state_->passed_one.wait(lock, [&] { return state_->passed >= version; });
  }
  check_not_lost(device_);
}

double Event::milliseconds_to(const Event& later) const {
  TORCH_CHECK(query() && later.query() && state_->recorded > 0 && later.state_->recorded > 0,
              "both events must have been recorded and passed: synchronise the later one first");
  std::scoped_lock lock(state_->mutex, later.state_->mutex);
  return std::chrono::duration<double, std::milli>(later.state_->passed_at - state_->passed_at)
      .count();
}

void Event::check_not_captured(const char* what) const {
  if (signal_ < 0) return;
  if (const auto graph = recording_.lock()) graph->spoil(what);
  TORCH_CHECK(false, what,
              " is not possible: it was recorded while a graph was captured, and "
              "happens when the graph is replayed; record it again after the capture");
}

}  // namespace kt_sim
