// Calls that streams start and join, experts that move under them, and what goes wrong in them.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <string>

#include "moe/stream_call.hpp"
#include "scenarios.hpp"
#include "world.hpp"

namespace kt::races {
namespace {

constexpr size_t kStreams = 3, kRounds = 20;
constexpr std::align_val_t kAlignment{64};
constexpr std::chrono::microseconds kNow{50};  // between two questions

std::shared_ptr<uint8_t[]> PackedBytes(const ExpertLayer& layer) {
  return {new (kAlignment) uint8_t[layer.layout().bytes],
          [](uint8_t* bytes) { operator delete[](bytes, kAlignment); }};
}

// A layer whose experts live on the host or away, as kt_core/moe/ has it: the table of homes is
// read and written in order of the stream, and nowhere else, and never in the middle of a call.
struct MovingLayer {
  std::shared_ptr<ExpertLayer> layer;
  Stream stream;
  std::mutex between_calls;
  std::vector<bool> is_away = std::vector<bool>(kExperts);

  explicit MovingLayer(const Engine& engine) : layer(MakeLayer(engine)) {}

  void Send(size_t expert, bool away) {
    const std::lock_guard lock(between_calls);
    stream.Push([this, expert, away] { is_away[expert] = away; });
  }
};

// Takes every expert away and brings it back, as kt_core/moe/expert_mover.py does.
void MoveAll(MovingLayer& moving, size_t rounds) {
  ExpertLayer& layer = *moving.layer;
  for (size_t round = 0; round < rounds; ++round)
    for (size_t expert = 0; expert < kExperts; ++expert) {
      const auto copy = PackedBytes(layer);
      layer.CopyPacked(expert, copy.get());
      moving.Send(expert, true);
      moving.stream.Synchronize();  // no earlier call can want it any more
      layer.Unload(expert);
      if ((round + expert) % 2 == 0 || !layer.MapPacked(expert, copy.get(), copy))
        layer.LoadPacked(expert, copy.get());
      moving.Send(expert, false);
    }
}

void Move(const Kernels& kernels, const Topology& topology) {
  const Engine engine = MakeEngine(kernels, topology), alone = MakeEngine(kernels, FlatTopology(1));
  MovingLayer moving(engine);
  const auto reference = MakeLayer(alone);
  const Call wanted(4, 11);
  Call call = wanted, same = wanted;
  StreamCall stream_call(moving.layer, call.args());
  std::jthread mover([&] { MoveAll(moving, 2); });
  for (size_t round = 0; round < 4 * kRounds; ++round) {
    const std::lock_guard lock(moving.between_calls);
    moving.stream.Push([&] {
      for (size_t i = 0; i < wanted.ids.size(); ++i) {
        const int64_t id = wanted.ids[i];
        call.ids[i] = id >= 0 && moving.is_away[static_cast<size_t>(id)] ? -1 : id;
      }
      same.ids = call.ids;
    });
    moving.stream.Push([&] { StreamCall::Start(&stream_call); });
    moving.stream.Push([&] { StreamCall::Join(&stream_call); });
    moving.stream.Push([&] {
      reference->Wait(*reference->Submit(same.args()));
      Check(call.out == same.out, "a call sees an expert on its way");
    });
  }
  mover.join();
  moving.stream.Synchronize();
  Check(stream_call.TakeError().empty(), "a call failed");
}

}  // namespace

// The accelerator's thread starts and joins; another one, which waits for nobody, asks for times
// and errors meanwhile.
void CallsOfStreams(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(3));
  const auto layer = MakeLayer(engine);
  InThreads(kStreams, [&](size_t caller) {
    Call call(1 + caller, static_cast<uint32_t>(caller));
    const std::vector<float> want = Answer(kernels, call);
    StreamCall stream_call(layer, call.args());
    stream_call.Record(true);
    std::atomic<size_t> times{0};
    std::jthread asking([&](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        std::this_thread::sleep_for(kNow);
        times.fetch_add(stream_call.TakeTimes().size(), std::memory_order_relaxed);
        Check(stream_call.TakeError().empty(), "a call failed");
      }
    });
    {
      Stream stream;
      for (size_t round = 0; round < kRounds; ++round) {
        stream.Push([&] { StreamCall::Start(&stream_call); });
        // What the accelerator computes meanwhile: so the host is done first, or it is not.
        if (round % 4 == 0) stream.Push([] { std::this_thread::sleep_for(kLongerThanAJob); });
        stream.Push([&] { StreamCall::Join(&stream_call); });
        stream.Push([&] {
          Check(call.out == want, "a stream's call is wrong");
          std::ranges::fill(call.out, 0.0f);
        });
      }
    }
    asking.request_stop();
    asking.join();
    Check(times.load() + stream_call.TakeTimes().size() == kRounds, "times were lost");
  });
}

void CallsThatFail(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(3));
  const auto layer = MakeLayer(engine);
  InThreads(kStreams, [&](size_t caller) {
    Call good(3, 1), bad(3, 1);
    bad.ids[4] = kExperts + static_cast<int64_t>(caller);
    const std::vector<float> want = Answer(kernels, good);
    StreamCall works(layer, good.args()), fails(layer, bad.args());
    std::string errors;
    std::jthread asking([&](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        std::this_thread::sleep_for(kNow);
        errors += fails.TakeError();
        Check(works.TakeError().empty(), "a good call failed");
      }
    });
    {
      Stream stream;
      for (size_t round = 0; round < kRounds; ++round)
        for (StreamCall* one : {&works, &fails}) {
          stream.Push([one] { StreamCall::Start(one); });
          stream.Push([one] { StreamCall::Join(one); });
        }
    }
    asking.request_stop();
    asking.join();
    errors += fails.TakeError();
    Check(errors.find("outside") != std::string::npos, "an error was lost");
    Check(good.out == want, "a call that fails disturbs others");
    Check(std::ranges::all_of(bad.out, [](float value) { return value == 0; }), "not zeros");
  });
}

// A stream that starts and never joins, as that of a lost device does.
void CallsDroppedWhileRunning(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(3));
  for (size_t round = 0; round < kRounds; ++round) {
    Call call(7, 2);
    {
      StreamCall stream_call(MakeLayer(engine), call.args());
      Stream stream;
      stream.Push([&] { StreamCall::Start(&stream_call); });
      if (round % 2) stream.Push([&] { StreamCall::Start(&stream_call); });
      stream.Synchronize();
    }
    std::ranges::fill(call.out, 0.0f);  // nobody writes here any more
  }
}

void ExpertsMove(const Kernels& kernels) { Move(kernels, FlatTopology(3)); }

void ExpertsMoveOnNodes(const Kernels& kernels) { Move(kernels, TwoNodes()); }

// An expert is loaded again and again while calls compute with it.
void PlantedLoad(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(2));
  const auto layer = MakeLayer(engine);
  const auto copy = PackedBytes(*layer);
  layer->CopyPacked(0, copy.get());
  Call call(3, 1);
  std::ranges::fill(call.ids, 0);
  std::jthread loading([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      std::this_thread::sleep_for(kNow);
      layer->LoadPacked(0, copy.get());
    }
  });
  for (size_t round = 0; round < kRounds; ++round) {
    StreamCall stream_call(layer, call.args());  // fails where the expert is just being loaded
    StreamCall::Start(&stream_call);
  }
}

// Two streams start the same call.
void PlantedStart(const Kernels& kernels) {
  const Engine engine = MakeEngine(kernels, FlatTopology(2));
  Call call(3, 1);
  StreamCall stream_call(MakeLayer(engine), call.args());
  stream_call.Record(true);
  InThreads(2, [&](size_t) { StreamCall::Start(&stream_call); });
}

}  // namespace kt::races
