#pragma once
#include <cstddef>
#include <vector>

namespace kt {

// Where the threads of one engine run, and which memory is next to them. Processors and nodes are
// numbered as Linux does; a thread names its node by the place in `nodes`. kt_cpu/topology.py
// makes it from what the system says.
struct Topology {
  struct Node {
    int id;
    std::vector<int> cpus;  // logical processors on it
    size_t memory_bytes;    // what may be bound to it so that there is no other place for it
  };
  struct Thread {
    size_t node;
    std::vector<int> cpus;  // where it may run; none: where the system likes
  };
  static constexpr size_t kMaxNodes = 32;

  std::vector<Node> nodes;      // 1..kMaxNodes
  std::vector<Thread> threads;  // at least one; the first is whoever waits for a job
};

// One node, and threads that may run anywhere.
inline Topology FlatTopology(size_t threads) {
  return {{{0, {}, 0}}, std::vector<Topology::Thread>(threads)};
}

}  // namespace kt
