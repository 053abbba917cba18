// A stream: a thread that runs tasks one after the other, each for as long as the device would
// take.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "timing.hpp"

namespace kt_sim {

class Recording;

struct Task {
  std::function<Cost()> run;
  // Whether it happens on a lost device too: what others wait for does.
  bool is_unconditional = false;
  // What the task is, for the reason of a device that is lost by its error.
  std::string name;
  // What it costs, where that is known before; then it runs late, so that nobody sees its results
  // before the device would have them, and the host is expected to take so long.
  Cost known{};
  double host_seconds = 0;
};

// A point in a queue: everything that was pushed before it.
struct Point;

class Queue {
 public:
  // The thread starts with the first task and ends with the process.
  Queue(int device, int64_t id);

  int device() const { return device_; }
  int64_t id() const { return id_; }

  // Appends a task, or records it where a graph is captured. An exception in it loses the device.
  void push(Task task);
  // As push, but never recorded: for replay.
  void push_now(Task task);

  Point point();  // behind everything pushed so far
  bool has_passed(uint64_t position);
  void wait_for(uint64_t position);
  bool is_idle();
  // Waits for everything. Throws c10::Error while a graph is captured, or if the device is lost.
  void synchronize();

  // The recording that takes the tasks, or null; and which of its lanes this is.
  std::shared_ptr<Recording> recording();
  void start_recording(std::shared_ptr<Recording> recording, int lane);
  void stop_recording();
  // Throws c10::Error, and spoils the graph, where one is captured: `what` cannot be part of it.
  void refuse_while_recording(const std::string& what);

 private:
  void run();
  void execute(const Task& task, Clock::time_point pushed_at);

  struct Pending {
    Task task;
    Clock::time_point pushed_at;
  };

  const int device_;
  const int64_t id_;
  std::mutex mutex_;
  std::condition_variable has_work_, has_progress_;
  std::deque<Pending> pending_;
  uint64_t pushed_ = 0, done_ = 0;
  bool is_started_ = false;
  Clock::time_point ready_at_{};  // of the thread alone: when the simulated device was done
  std::shared_ptr<Recording> recording_;
  int lane_ = 0;
};

struct Point {
  Queue* queue = nullptr;
  uint64_t position = 0;
  bool has_passed() const { return queue == nullptr || queue->has_passed(position); }
};

}  // namespace kt_sim
