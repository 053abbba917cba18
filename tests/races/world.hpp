// What the scenarios share: small layers, calls with known answers, and a stand-in for a stream.
#pragma once
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "dense/linear_layer.hpp"
#include "isa/dispatch.hpp"
#include "moe/expert_layer.hpp"
#include "moe/forward_job.hpp"
#include "runtime/thread_pool.hpp"

namespace kt::races {

constexpr size_t kExperts = 8, kHidden = 96, kInter = 80, kTopK = 3;

// Of a job of few tokens, with a sanitizer and on a busy machine.
constexpr std::chrono::milliseconds kLongerThanAJob{100};

// Ends the process: an answer is not what it should be.
[[noreturn]] void Die(const char* what);
void Check(bool is_true, const char* what);

// What one engine owns.
struct Engine {
  const Kernels& kernels;
  std::shared_ptr<ThreadPool> pool;
  std::shared_ptr<ScratchPool> scratch;
  std::shared_ptr<NodeBinder> binder;
};
Engine MakeEngine(const Kernels& kernels, const Topology& topology);
Topology TwoNodes();  // that the machine need not have: nothing is bound

std::vector<float> Random(size_t count, uint32_t seed);

LayerSpec Spec();
// The weights of one expert: those of the same number are the same.
struct Weights {
  std::vector<float> gate, up, down;
  explicit Weights(size_t expert);
  ExpertSource source() const;
};
std::shared_ptr<ExpertLayer> MakeLayer(const Engine& engine, size_t loaded = kExperts);

// A forward pass with buffers of its own.
struct Call {
  std::vector<float> hidden, weights, out;
  std::vector<int64_t> ids;
  size_t tokens;

  Call(size_t tokens, uint32_t seed);
  ForwardArgs args();
};
// What a layer on one thread answers.
std::vector<float> Answer(const Kernels& kernels, Call call);

// A thread that does what it is given, in order: it stands for the thread on which an accelerator's
// runtime calls host functions, and for what the accelerator itself does in order of the stream.
class Stream {
 public:
  Stream();
  ~Stream();  // does what is left
  void Push(std::function<void()> task);
  void Synchronize();

 private:
  void Work();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  size_t pushed_ = 0, done_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

// Runs body(0), ..., body(count - 1), each on a thread of its own.
void InThreads(size_t count, const std::function<void(size_t)>& body);

}  // namespace kt::races
