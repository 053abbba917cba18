#include "runtime/affinity.hpp"

#include <errno.h>
#include <pthread.h>
#include <sched.h>

namespace kt {

int PinThread(std::thread& thread, const std::vector<int>& cpus) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : cpus) {
    if (cpu < 0 || cpu >= CPU_SETSIZE) return EINVAL;
    CPU_SET(cpu, &set);
  }
  return pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);
}

bool MoveToCpu(int cpu) {
  cpu_set_t before, one;
  if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
  if (sched_getaffinity(0, sizeof before, &before) != 0 || !CPU_ISSET(cpu, &before)) return false;
  CPU_ZERO(&one);
  CPU_SET(cpu, &one);
  if (sched_setaffinity(0, sizeof one, &one) != 0) return false;
  // Cannot fail but for a change of the process's cpuset in between, and then that one holds.
  sched_setaffinity(0, sizeof before, &before);
  return true;
}

int CurrentCpu() { return sched_getcpu(); }

}  // namespace kt
