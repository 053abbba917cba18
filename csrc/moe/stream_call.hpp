#pragma once
#include <memory>
#include <mutex>
#include <string>

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

  // The first error since the last call; empty if there was none.
  std::string TakeError();

 private:
  void StartJob() noexcept;
  void JoinJob() noexcept;
  void Fail(const char* reason) noexcept;

  const std::shared_ptr<ExpertLayer> layer_;
  const ForwardArgs args_;
  std::shared_ptr<ForwardJob> job_;
  std::mutex mutex_;  // of error_: the runtime's thread writes it, another one reads it
  std::string error_;
};

}  // namespace kt
