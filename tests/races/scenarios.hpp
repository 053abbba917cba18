#pragma once
#include "moe/kernels.hpp"

namespace kt::races {

struct Scenario {
  const char* name;
  void (*run)(const Kernels& kernels);
};

// All but the planted ones must be free of races. jobs.cpp:
void JobsOfManyThreads(const Kernels& kernels);
void JobsOnNodes(const Kernels& kernels);
void WaitTogether(const Kernels& kernels);
void LayersComeAndGo(const Kernels& kernels);
void PoolEndsWithWork(const Kernels& kernels);
void LoadWhileComputing(const Kernels& kernels);
void MeasureMachine(const Kernels& kernels);

// calls.cpp:
void CallsOfStreams(const Kernels& kernels);
void CallsThatFail(const Kernels& kernels);
void CallsDroppedWhileRunning(const Kernels& kernels);
void ExpertsMove(const Kernels& kernels);
void ExpertsMoveOnNodes(const Kernels& kernels);
// Each holds a race, which a sanitizer must report.
void PlantedLoad(const Kernels& kernels);
void PlantedStart(const Kernels& kernels);

}  // namespace kt::races
