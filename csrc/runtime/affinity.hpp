#pragma once
#include <thread>
#include <vector>

namespace kt {

// The thread runs on these processors alone. Returns 0 or an errno.
int PinThread(std::thread& thread, const std::vector<int>& cpus);

// Moves the calling thread to the processor, if it may run there; afterwards it may run wherever
// it could before. Returns whether it moved.
bool MoveToCpu(int cpu);

// The processor of the calling thread; -1 where nobody says.
int CurrentCpu();

}  // namespace kt
