// torch.accelerator.Graph for simulated devices.
#include <ATen/core/GraphImplInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <fstream>

#include "current.hpp"
#include "device_memory.hpp"
#include "graph.hpp"
#include "pinned_memory.hpp"
#include "recording.hpp"

namespace kt_sim {
namespace {

c10::MempoolId_t new_pool() {
  static std::atomic<unsigned long long> next{1};
  return {next++, 0};
}

struct Graph final : at::GraphImplInterface {
  explicit Graph(const at::GraphImplArgs&) {}
  ~Graph() override { reset(); }

  // Every mode is "thread_local": only streams that take part are restricted.
  void capture_begin(c10::MempoolId_t pool, at::GraphCaptureMode) override {
    TORCH_CHECK(recording_ == nullptr, "this graph holds a capture; call reset() first");
    device_ = current_device();
    Queue& queue = current_queue(device_);
    TORCH_CHECK(queue.id() != 0,
                "the default stream cannot be captured: do it in another one, `with "
                "torch.Stream(\"sim\"), graph:`");
    pool_ = pool == c10::MempoolId_t{0, 0} ? new_pool() : pool;
    recording_ = Recording::begin(queue);
    device_memory().keep_pool(device_, pool_);
    device_memory().start_capture(queue, pool_);
    pinned_memory().begin_allocate_to_pool(pool_, [capture = recording_](c10::Stream stream) {
      return kt_sim::queue(stream).recording() == capture;
    });
  }

  void capture_end() override {
    TORCH_CHECK(recording_ != nullptr && !recording_->is_ended(), "no capture was begun");
    device_memory().end_capture(pool_);
    pinned_memory().end_allocate_to_pool(pool_);
    recording_->end();
  }

  void instantiate() override {}  // there is nothing to compile

  void replay() override {
    TORCH_CHECK(recording_ != nullptr, "the graph holds no capture");
    recording_->replay(current_queue(device_));
  }

  void reset() override {
    if (recording_ == nullptr) return;
    if (!recording_->is_ended()) capture_end();
    device_memory().release_pool(device_, pool_);
    pinned_memory().release_pool(pool_);
    recording_ = nullptr;
  }

  c10::MempoolId_t pool() const override { return pool_; }
  void enable_debug_mode() override {}

  void debug_dump(const std::string& path) override {
    TORCH_CHECK(recording_ != nullptr, "the graph holds no capture");
    std::ofstream file(path);
    recording_->print(file);
    TORCH_CHECK(file.good(), "cannot write ", path);
  }

 private:
  int device_ = 0;
  c10::MempoolId_t pool_{0, 0};
  std::shared_ptr<Recording> recording_;
};

std::unique_ptr<at::GraphImplInterface> make(at::GraphImplArgs arguments) {
  return std::make_unique<Graph>(arguments);
}

}  // namespace

void register_graphs() {
  at::GraphImplRegistry()->Register(c10::DeviceTypeName(kDeviceType, /*lower_case=*/false), make);
}

}  // namespace kt_sim
