#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "moe/expert_layer.hpp"
#include "moe/forward_job.hpp"

namespace kt {

// A forward pass that an accelerator's stream starts and joins: Start and Join are the functions
// that its runtime calls, one after the other, any number of times (a captured graph is replayed),
// for the same buffers each time. Between the two the stream computes something else.
//
// No exception may leave them: what goes wrong is kept, `out` becomes zeros, and whoever waits for
// the stream asks TakeError().
class StreamCall {
 public:
  StreamCall(std::shared_ptr<ExpertLayer> layer, const ForwardArgs& args);
  ~StreamCall();  // joins what was started

  static void Start(void* self) noexcept { static_cast<StreamCall*>(self)->StartJob(); }
  static void Join(void* self) noexcept { static_cast<StreamCall*>(self)->JoinJob(); }

  // Nanoseconds of the steady clock: when the stream called Start, when the experts were done, when
  // the stream called Join, and when that returned.
  struct Times {
    int64_t started, finished, join_called, joined;
  };
  // From now on, keeps the times of calls; kMostTimes of them at most.
  void Record(bool is_on) { is_recording_.store(is_on); }
  std::vector<Times> TakeTimes();

  // The first error since the last call; empty if there was none.
  std::string TakeError();

 private:
  void StartJob() noexcept;
  void JoinJob() noexcept;
  void Fail(const char* reason) noexcept;

  const std::shared_ptr<ExpertLayer> layer_;
  const ForwardArgs args_;
  static constexpr size_t kMostTimes = 1 << 16;

  std::shared_ptr<ForwardJob> job_;
  int64_t started_ = 0;
  std::atomic<bool> is_recording_{false};
  std::mutex mutex_;  // of what the runtime's thread writes and another one reads
  std::vector<Times> times_;
  std::string error_;
};

}  // namespace kt
