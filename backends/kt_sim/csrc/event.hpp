// Events: points in streams that others wait for, with the time at which they were passed.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "queue.hpp"

namespace kt_sim {

// May be recorded again and again; waiting means the latest record before the wait.
class Event {
 public:
  Event();

  void record(Queue& queue);
  // Lets the queue wait. Does nothing for an event that was never recorded.
  void block(Queue& queue) const;
  bool query() const;
  // Blocks the calling thread. Throws c10::Error if the event belongs to a capture, or if a device
  // was lost meanwhile.
  void synchronize() const;
  // Milliseconds from this event to the later one. Throws c10::Error unless both were passed.
  double milliseconds_to(const Event& later) const;

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable passed_one;
    uint64_t recorded = 0, passed = 0;  // versions
    Clock::time_point passed_at;
  };

  void check_not_captured(const char* what) const;

  std::shared_ptr<State> state_;
  int device_ = 0;
  std::weak_ptr<Recording> recording_;  // of the graph it was last recorded for, and its signal
  int signal_ = -1;
};

}  // namespace kt_sim
