#include "moe/stream_call.hpp"

#include <chrono>
#include <cstring>
#include <exception>
#include <utility>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

int64_t Nanoseconds(Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

}  // namespace

StreamCall::StreamCall(std::shared_ptr<ExpertLayer> layer, const ForwardArgs& args)
    : layer_(std::move(layer)), args_(args) {
  layer_->ExpectUnattended();
}

StreamCall::~StreamCall() { JoinJob(); }

void StreamCall::StartJob() noexcept {
  if (is_recording_.load()) started_ = Nanoseconds(Clock::now());
  try {
    job_ = layer_->SubmitUnattended(args_);
  } catch (const std::exception& error) {
    Fail(error.what());
  }
}

void StreamCall::JoinJob() noexcept {
  if (!job_) return;
  const Clock::time_point called = Clock::now();
  layer_->Wait(*job_);
  if (is_recording_.load()) {
    const Times times{started_, Nanoseconds(job_->finished_at()), Nanoseconds(called),
                      Nanoseconds(Clock::now())};
    const std::lock_guard lock(mutex_);
    if (times_.size() < kMostTimes) times_.push_back(times);
  }
  job_.reset();
}

void StreamCall::Fail(const char* reason) noexcept {
  const size_t value_bytes = args_.type == DType::kBf16 ? 2 : 4;
  std::memset(args_.out, 0, args_.tokens * layer_->spec().hidden_size * value_bytes);
  const std::lock_guard lock(mutex_);
  if (error_.empty()) error_ = reason;
}

std::vector<StreamCall::Times> StreamCall::TakeTimes() {
  const std::lock_guard lock(mutex_);
  return std::exchange(times_, {});
}

std::string StreamCall::TakeError() {
  const std::lock_guard lock(mutex_);
  return std::exchange(error_, {});
}

}  // namespace kt
