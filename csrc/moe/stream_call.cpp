#include "moe/stream_call.hpp"

#include <cstring>
#include <exception>
#include <utility>

namespace kt {

StreamCall::StreamCall(std::shared_ptr<ExpertLayer> layer, const ForwardArgs& args)
    : layer_(std::move(layer)), args_(args) {}

StreamCall::~StreamCall() { JoinJob(); }

void StreamCall::StartJob() noexcept {
  try {
    job_ = layer_->Submit(args_);
  } catch (const std::exception& error) {
    Fail(error.what());
  }
}

void StreamCall::JoinJob() noexcept {
  if (!job_) return;
  layer_->Wait(*job_);
  job_.reset();
}

void StreamCall::Fail(const char* reason) noexcept {
  const size_t value_bytes = args_.type == DType::kBf16 ? 2 : 4;
  std::memset(args_.out, 0, args_.tokens * layer_->spec().hidden_size * value_bytes);
  const std::lock_guard lock(mutex_);
  if (error_.empty()) error_ = reason;
}

std::string StreamCall::TakeError() {
  const std::lock_guard lock(mutex_);
  return std::exchange(error_, {});
}

}  // namespace kt
