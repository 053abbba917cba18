// Exercises the runtime from as many threads as an engine with accelerators has, without Python and
// without torch, whose threads a sanitizer cannot see into: `nox -s tsan` and `nox -s asan`.
//
//   kt_races             every scenario, with the portable kernels and with the machine's best
//   kt_races SCENARIO    one of them
//   kt_races planted     what must be reported: a sanitizer that is silent here is not at work
#include <cstdio>
#include <cstring>
#include <span>

#include "isa/dispatch.hpp"
#include "scenarios.hpp"

namespace kt::races {
namespace {

constexpr Scenario kScenarios[] = {
    {"jobs of many threads", JobsOfManyThreads},
    {"jobs on nodes", JobsOnNodes},
    {"wait together", WaitTogether},
    {"layers come and go", LayersComeAndGo},
    {"pool ends with work", PoolEndsWithWork},
    {"load while computing", LoadWhileComputing},
    {"measure the machine", MeasureMachine},
    {"calls of streams", CallsOfStreams},
    {"calls that fail", CallsThatFail},
    {"calls dropped while running", CallsDroppedWhileRunning},
    {"experts move", ExpertsMove},
    {"experts move on nodes", ExpertsMoveOnNodes},
};
constexpr Scenario kPlanted[] = {
    {"planted: an expert loaded under a call", PlantedLoad},
    {"planted: a call of two streams", PlantedStart},
};

int Run(const Isa& isa, std::span<const Scenario> scenarios, const char* wanted) {
  int count = 0;
  for (const Scenario& scenario : scenarios) {
    if (wanted != nullptr && std::strcmp(wanted, scenario.name) != 0) continue;
    std::printf("%s: %s\n", isa.name.data(), scenario.name);
    std::fflush(stdout);
    scenario.run(*isa.kernels);
    ++count;
  }
  return count;
}

}  // namespace
}  // namespace kt::races

int main(int argc, char** argv) {
  using namespace kt;
  const bool is_planted = argc > 1 && std::strcmp(argv[1], "planted") == 0;
  const Isa &portable = AllIsas().back(), &best = SelectIsa("");
  int count = 0;
  if (is_planted) count = races::Run(portable, races::kPlanted, nullptr);
  else
    for (const Isa* isa : {&portable, &best})
      count += races::Run(*isa, races::kScenarios, argc > 1 ? argv[1] : nullptr);
  std::printf("%d scenarios\n", count);
  return count > 0 ? 0 : 2;
}
