// What a graph holds: the tasks of the streams it was captured from, and where they wait for each
// other. A stream joins by waiting for an event of one that is being captured.
#pragma once

#include <memory>
#include <mutex>
#include <ostream>
#include <string>
#include <variant>
#include <vector>

#include "queue.hpp"

namespace kt_sim {

class Recording : public std::enable_shared_from_this<Recording> {
 public:
  // Starts capturing the stream; it is lane 0.
  static std::shared_ptr<Recording> begin(Queue& queue);

  void add_task(int lane, Task task);
  // Notes that later waits may refer to this point of the queue's lane; returns its number.
  int add_signal(Queue& queue);
  // Lets the queue wait for the signal; where it is not captured yet it joins, as a lane of its
  // own.
  void add_wait(Queue& queue, int signal);

  // The graph cannot be replayed, and why; the first reason stays.
  void spoil(const std::string& reason);
  // Stops capturing all lanes. Where one was not joined by another, the graph is spoilt.
  void end();

  bool is_ended();
  // One line for each task, signal and wait, with its lane.
  void print(std::ostream& out);
  // Puts everything into the streams, lane 0 into this one. Throws c10::Error if spoilt.
  void replay(Queue& queue);

 private:
  struct Signal {
    int number;
  };
  struct Wait {
    int number;
  };
  struct Node {
    int lane;
    std::variant<Task, Signal, Wait> what;
  };

  int lane_of(Queue& queue) const;
  void spoil_locked(const std::string& reason);

  std::mutex mutex_;
  std::vector<Node> nodes_;
  std::vector<Queue*> lanes_;
  std::vector<bool> is_joined_;  // by lane: its last node was waited for by another lane
  std::vector<int> lane_of_signal_;
  std::vector<bool> is_last_of_lane_;  // by signal: nothing came after it in its lane
  std::string spoilt_;
  bool is_ended_ = false;
};

}  // namespace kt_sim
