// Jobs of one pool: from several threads, of every kind, dropped, and outliving their layers.
#include <thread>

#include "hardware/limits.hpp"
#include "scenarios.hpp"
#include "world.hpp"

namespace kt::races {
namespace {

constexpr size_t kRounds = 12, kCallers = 4;

// Forward and backward passes with LoRA, and their buffers.
struct Training {
  static constexpr size_t kTokens = 5, kRank = 4;
  Call call{kTokens, 5};
  std::vector<float> a = Random(kExperts * kRank * kHidden, 6);
  std::vector<float> b = Random(kExperts * kInter * kRank, 7);
  std::vector<float> grad_a = std::vector<float>(a.size()), grad_b = std::vector<float>(b.size());
  std::vector<float> grad_out = Random(kTokens * kHidden, 8);
  std::vector<float> grad_hidden = std::vector<float>(kTokens * kHidden);
  std::vector<float> grad_weights = std::vector<float>(kTokens * kTopK);

  TrainingArgs args() {
    TrainingArgs args{};
    args.hidden = call.hidden.data();
    args.type = DType::kFloat32;
    args.precision = Precision::kBf16;
    args.expert_ids = call.ids.data();
    args.weights = call.weights.data();
    args.tokens = kTokens;
    args.top_k = kTopK;
    args.lora.scale = 0.5f;
    args.lora.up = {a.data(), b.data(), DType::kFloat32, kRank, grad_a.data(), grad_b.data()};
    args.out = call.out.data();
    args.grad_out = grad_out.data();
    args.grad_hidden = grad_hidden.data();
    args.grad_weights = grad_weights.data();
    return args;
  }
};

void ForwardAndBackward(ExpertLayer& layer) {
  Training one, two;
  const auto forward = layer.SubmitLora(one.args());
  const auto backward = layer.SubmitBackward(two.args());
  layer.Wait(*backward);
  layer.Wait(*forward);
}

void Dense(const LinearLayer& layer) {
  // As many rows as make the work worth sharing.
  constexpr size_t kRows = 64;
  const std::vector<float> source = Random(kRows * kHidden, 9);
  std::vector<float> target(kRows * kHidden);
  const LinearArgs args{source.data(), DType::kFloat32, Precision::kBf16,
                        kRows,         kHidden,         target.data()};
  layer.Apply(args);
  layer.GradInput(args);
}

void Gather(const ExpertLayer& layer) {
  const std::vector<int64_t> experts = {5, 0, 7, 3};
  const size_t bytes = layer.layout().bytes;
  std::vector<uint8_t> gathered(experts.size() * bytes), copied(gathered.size());
  layer.GatherPacked(experts, gathered.data());
  for (size_t i = 0; i < experts.size(); ++i)
    layer.CopyPacked(static_cast<size_t>(experts[i]), copied.data() + i * bytes);
  Check(gathered == copied, "experts are gathered otherwise than copied");
}

void Jobs(const Kernels& kernels, const Topology& topology) {
  const Engine engine = MakeEngine(kernels, topology);
  const std::shared_ptr<ExpertLayer> layers[] = {MakeLayer(engine), MakeLayer(engine)};
  const LinearSpec spec{kHidden,          kHidden,       false, Element::kInt8,
                        ScaleType::kBf16, Offset::kNone, 32};
  LinearLayer dense(spec, kernels, engine.pool, engine.scratch);
  const std::vector<float> weight = Random(kHidden * kHidden, 10);
  SourceMatrix source{};
  source.data = weight.data();
  source.type = DType::kFloat32;
  source.row_stride = kHidden;
  source.col_stride = 1;
  Check(dense.Load(source, nullptr), "a dense layer was refused");
  InThreads(kCallers, [&](size_t caller) {
    const auto seed = static_cast<uint32_t>(caller);
    Call call(1 + 4 * caller, seed), dropped(3, seed + 20);
    const std::vector<float> want = Answer(kernels, call);
    for (size_t round = 0; round < kRounds; ++round) {
      ExpertLayer& layer = *layers[(caller + round) % 2];
      const auto ahead = layer.Submit(dropped.args());
      layer.Wait(*layer.Submit(call.args()));
      Check(call.out == want, "a job's answer depends on others");
      if (caller == 0) ForwardAndBackward(layer);
      if (caller == 1) Dense(dense);
      if (caller == 2) Gather(layer);
      layer.Wait(*ahead);  // before its buffers are used again
    }
  });
}

}  // namespace

void JobsOfManyThreads(const Kernels& kernels) { Jobs(kernels, FlatTopology(4)); }

void JobsOnNodes(const Kernels& kernels) { Jobs(kernels, TwoNodes()); }

void WaitTogether(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(3));
  const auto layer = MakeLayer(engine);
  Call call(2, 1);
  const std::vector<float> want = Answer(kernels, call);
  for (size_t round = 0; round < kRounds; ++round) {
    const auto job = layer->Submit(call.args());
    InThreads(kCallers, [&](size_t caller) {
      if (caller == 0) std::this_thread::sleep_for(kLongerThanAJob);  // and comes late
      layer->Wait(*job);
      Check(call.out == want, "whoever waits does not see all of it");
      Check(job->finished_at().time_since_epoch().count() > 0, "the job has no end");
    });
  }
}

// A worker may still hold a finished job when its layer is gone.
void LayersComeAndGo(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(6));
  InThreads(2, [&](size_t caller) {
    Call call(6, static_cast<uint32_t>(caller));
    const std::vector<float> want = Answer(kernels, call);
    for (size_t round = 0; round < 2 * kRounds; ++round) {
      auto layer = MakeLayer(engine);
      layer->Wait(*layer->Submit(call.args()));
      layer.reset();
      Check(call.out == want, "a layer that goes takes its answer along");
    }
  });
}

void PoolEndsWithWork(const Kernels& kernels) {
  for (size_t round = 0; round < kRounds; ++round) {
    Call calls[] = {Call(4, 1), Call(2, 2), Call(7, 3)};
    Engine engine = MakeEngine(kernels, FlatTopology(1 + round % 4));
    auto layer = MakeLayer(engine);
    std::vector<std::shared_ptr<Job>> jobs;
    for (Call& call : calls) jobs.push_back(layer->Submit(call.args()));
    // Nobody waits. The layer's share of the pool goes last: the pool finishes what it was given.
    engine.pool.reset();
    const std::weak_ptr<ExpertLayer> gone = layer;
    layer->Wait(*jobs.back());
    layer.reset();
    Check(gone.expired(), "a job keeps its layer");
    Check(calls[0].out == Answer(kernels, calls[0]), "a job that nobody waited for is not done");
  }
}

void LoadWhileComputing(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(3));
  const auto layer = MakeLayer(engine, 2);
  Call call(5, 3);
  for (int64_t& id : call.ids) id = id < 0 ? -1 : id % 2;
  const std::vector<float> want = Answer(kernels, call);
  InThreads(4, [&](size_t caller) {
    if (caller == 0)
      for (size_t round = 0; round < 4 * kRounds; ++round) {
        layer->Wait(*layer->Submit(call.args()));
        Check(call.out == want, "loading disturbs a call");
      }
    else
      for (size_t expert = 2; expert < kExperts; ++expert)
        if (expert % 3 == caller - 1) {
          layer->Load(expert, Weights(expert).source());
          layer->Unload(expert);
          layer->Load(expert, Weights(expert).source());
        }
  });
}

void MeasureMachine(const Kernels& kernels) {
  const Limits limits = MeasureLimits(kernels, 3, size_t{6} << 20);
  Check(limits.read_bytes_per_s > 0, "nothing was measured");
}

}  // namespace kt::races
