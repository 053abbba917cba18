#include "queue.hpp"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <sys/prctl.h>

#include <algorithm>
#include <string>
#include <thread>
#include <utility>

#include "failure.hpp"
#include "gil.hpp"
#include "recording.hpp"

namespace kt_sim {
namespace {

Clock::duration seconds(double count) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
}

}  // namespace

Queue::Queue(int device, int64_t id) : device_(device), id_(id) {}

void Queue::push(Task task) {
  check_not_lost(device_);
  std::shared_ptr<Recording> graph;
  int lane = 0;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    graph = recording_;
    lane = lane_;
  }
  if (graph != nullptr) {
    graph->add_task(lane, std::move(task));
  } else {
    push_now(std::move(task));
  }
}

void Queue::push_now(Task task) {
  std::lock_guard<std::mutex> lock(mutex_);
  pending_.push_back({std::move(task), Clock::now()});
  ++pushed_;
  if (!is_started_) {
    is_started_ = true;
    std::thread([this] { run(); }).detach();
  }
  has_work_.notify_one();
}

void Queue::run() {
  at::init_num_threads();            // as many as torch has on the thread that computes for the CPU
  prctl(PR_SET_TIMERSLACK, 1000UL);  // ns; by default sleeps end 50 us late
  for (;;) {
    std::unique_lock<std::mutex> lock(mutex_);
    has_work_.wait(lock, [this] { return !pending_.empty(); });
    Pending next = std::move(pending_.front());
    pending_.pop_front();
    lock.unlock();
    execute(next.task, next.pushed_at);
    next.task.run = nullptr;  // what it holds goes before anybody learns that it is done
    lock.lock();
    ++done_;
    has_progress_.notify_all();
  }
}

void Queue::execute(const Task& task, Clock::time_point pushed_at) {
  if (is_lost(device_) && !task.is_unconditional) return;
  // The device would have begun here, however late this thread woke up.
  const auto began = std::max(ready_at_, pushed_at);
  auto ends = occupy(device_, task.known, began);
  if (task.known.unit != Unit::kNone)
    std::this_thread::sleep_until(ends - seconds(task.host_seconds));
  Cost cost;
  try {
    cost = task.run();
  } catch (const std::exception& error) {
    const auto* own = dynamic_cast<const c10::Error*>(&error);
    const std::string what = own != nullptr ? own->what_without_backtrace() : error.what();
    lose(device_, task.name + " failed: " + what);
  }
  ends = std::max(ends, occupy(device_, cost, began));
  const auto now = Clock::now();
  if (ends > now) {
    std::this_thread::sleep_until(ends);
    ready_at_ = ends;
  } else {
    ready_at_ = now;
  }
}

Point Queue::point() {
  std::lock_guard<std::mutex> lock(mutex_);
  return {this, pushed_};
}

bool Queue::has_passed(uint64_t position) {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_ >= position;
}

void Queue::wait_for(uint64_t position) {
  GilRelease release;
  std::unique_lock<std::mutex> lock(mutex_);
  has_progress_.wait(lock, [&] { return done_ >= position; });
}

bool Queue::is_idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_ == pushed_;
}

void Queue::synchronize() {
  refuse_while_recording("synchronising its stream");
  wait_for(point().position);
  check_not_lost(device_);
}

std::shared_ptr<Recording> Queue::recording() {
  std::lock_guard<std::mutex> lock(mutex_);
  return recording_;
}

void Queue::start_recording(std::shared_ptr<Recording> recording, int lane) {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(recording_ == nullptr, "stream ", id_, " of sim:", device_,
              " is being captured already; end that graph first");
  recording_ = std::move(recording);
  lane_ = lane;
}

void Queue::stop_recording() {
  std::lock_guard<std::mutex> lock(mutex_);
  recording_ = nullptr;
  lane_ = 0;
}

void Queue::refuse_while_recording(const std::string& what) {
  const auto graph = recording();
  if (graph == nullptr) return;
  graph->spoil(what);
  TORCH_CHECK(false, what, " cannot be captured: a graph of sim:", device_,
              " is being captured from stream ", id_,
              ", and the host would have to wait for it; do this before or after the capture");
}

}  // namespace kt_sim
