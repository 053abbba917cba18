#include "world.hpp"

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

namespace kt::races {

void Die(const char* what) {
  std::fprintf(stderr, "races: %s\n", what);
  std::abort();
}

void Check(bool is_true, const char* what) {
  if (!is_true) Die(what);
}

Engine MakeEngine(const Kernels& kernels, const Topology& topology) {
  const auto refuse = [](void*, size_t, int, bool) { return EPERM; };
  return {kernels, std::make_shared<ThreadPool>(topology), std::make_shared<ScratchPool>(),
          std::make_shared<NodeBinder>(topology.nodes, refuse)};
}

Topology TwoNodes() {
  Topology topology;
  topology.nodes = {{0, {}, 1 << 30}, {1, {}, 1 << 30}};
  topology.threads = {{0, {}}, {1, {}}, {0, {}}, {1, {}}};
  return topology;
}

std::vector<float> Random(size_t count, uint32_t seed) {
  std::mt19937 dice(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(dice);
  return values;
}

LayerSpec Spec() {
  return {kExperts, kHidden,        kInter,           {ActivationKind::kSilu, true, 0, 0, 0},
          false,    Element::kInt8, ScaleType::kBf16, Offset::kNone,
          32};
}

Weights::Weights(size_t expert)
    : gate(Random(kInter * kHidden, static_cast<uint32_t>(3 * expert))),
      up(Random(kInter * kHidden, static_cast<uint32_t>(3 * expert + 1))),
      down(Random(kHidden * kInter, static_cast<uint32_t>(3 * expert + 2))) {}

ExpertSource Weights::source() const {
  const auto matrix = [](const std::vector<float>& values, size_t cols) {
    SourceMatrix m{};
    m.data = values.data();
    m.type = DType::kFloat32;
    m.row_stride = static_cast<ptrdiff_t>(cols);
    m.col_stride = 1;
    return m;
  };
  return {
      matrix(gate, kHidden), matrix(up, kHidden), matrix(down, kInter), nullptr, nullptr, nullptr};
}

std::shared_ptr<ExpertLayer> MakeLayer(const Engine& engine, size_t loaded) {
  auto layer = std::make_shared<ExpertLayer>(Spec(), engine.kernels, engine.pool, engine.scratch,
                                             engine.binder);
  for (size_t expert = 0; expert < loaded; ++expert)
    Check(layer->Load(expert, Weights(expert).source()) == nullptr, "an expert was refused");
  return layer;
}

Call::Call(size_t tokens, uint32_t seed)
    : hidden(Random(tokens * kHidden, seed)),
      weights(Random(tokens * kTopK, seed + 1)),
      out(tokens * kHidden),
      ids(tokens * kTopK),
      tokens(tokens) {
  std::mt19937 dice(seed);
  for (int64_t& id : ids) id = static_cast<int64_t>(dice() % (kExperts + 1)) - 1;
}

ForwardArgs Call::args() {
  return {hidden.data(),  DType::kFloat32, Precision::kInt8, ids.data(),
          weights.data(), out.data(),      tokens,           kTopK};
}

std::vector<float> Answer(const Kernels& kernels, Call call) {
  const Engine alone = MakeEngine(kernels, FlatTopology(1));
  const auto layer = MakeLayer(alone);
  layer->Wait(*layer->Submit(call.args()));
  return call.out;
}

Stream::Stream() : thread_([this] { Work(); }) {}

Stream::~Stream() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Stream::Push(std::function<void()> task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    ++pushed_;
  }
  changed_.notify_all();
}

void Stream::Synchronize() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this, wanted = pushed_] { return done_ >= wanted; });
}

void Stream::Work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    std::function<void()> task = std::move(tasks_.front());
    tasks_.pop_front();
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
    ++done_;
    changed_.notify_all();
  }
}

void InThreads(size_t count, const std::function<void(size_t)>& body) {
  std::vector<std::jthread> threads;
  for (size_t i = 0; i < count; ++i) threads.emplace_back([&body, i] { body(i); });
}

}  // namespace kt::races
