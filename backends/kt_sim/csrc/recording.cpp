#include "recording.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <condition_variable>
#include <utility>

#include "failure.hpp"

namespace kt_sim {
namespace {

// One signal of one replay.
class Flag {
 public:
  void raise() {
    std::lock_guard<std::mutex> lock(mutex_);
    is_raised_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return is_raised_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_raised_ = false;
};

Task raise(std::shared_ptr<Flag> flag) {
  return {[flag = std::move(flag)] {
            flag->raise();
            return Cost{};
          },
          true, "a graph's signal"};
}

Task wait_for(std::shared_ptr<Flag> flag) {
  return {[flag = std::move(flag)] {
            flag->wait();
            return Cost{};
          },
          true, "a graph's wait"};
}

}  // namespace

std::shared_ptr<Recording> Recording::begin(Queue& queue) {
  auto made = std::make_shared<Recording>();
  made->lanes_.push_back(&queue);
  made->is_joined_.push_back(true);
  queue.start_recording(made, 0);
  return made;
}

void Recording::add_task(int lane, Task task) {
  std::lock_guard<std::mutex> lock(mutex_);
  nodes_.push_back({lane, std::move(task)});
  if (lane != 0) is_joined_[static_cast<size_t>(lane)] = false;
  for (size_t i = 0; i < lane_of_signal_.size(); ++i) {
    if (lane_of_signal_[i] == lane) is_last_of_lane_[i] = false;
  }
}

int Recording::add_signal(Queue& queue) {
  std::lock_guard<std::mutex> lock(mutex_);
  const int number = static_cast<int>(lane_of_signal_.size());
  const int lane = lane_of(queue);
  nodes_.push_back({lane, Signal{number}});
  lane_of_signal_.push_back(lane);
  is_last_of_lane_.push_back(true);
  return number;
}

void Recording::add_wait(Queue& queue, int signal) {
  const bool joins = queue.recording() == nullptr;
  std::lock_guard<std::mutex> lock(mutex_);
  if (joins) {
    queue.start_recording(shared_from_this(), static_cast<int>(lanes_.size()));
    lanes_.push_back(&queue);
    is_joined_.push_back(false);
  }
  const int lane = lane_of(queue);
  nodes_.push_back({lane, Wait{signal}});
  const auto index = static_cast<size_t>(signal);
  const int waited_for = lane_of_signal_[index];
  if (waited_for != lane && is_last_of_lane_[index]) {
    is_joined_[static_cast<size_t>(waited_for)] = true;
  }
  if (lane != 0) is_joined_[static_cast<size_t>(lane)] = false;
}

void Recording::spoil(const std::string& reason) {
  std::lock_guard<std::mutex> lock(mutex_);
  spoil_locked(reason);
}

void Recording::spoil_locked(const std::string& reason) {
  if (spoilt_.empty()) spoilt_ = reason;
}

void Recording::end() {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Queue* queue : lanes_) queue->stop_recording();
  is_ended_ = true;
  if (!std::all_of(is_joined_.begin(), is_joined_.end(), [](bool joined) { return joined; })) {
    spoil_locked("a stream that joined by an event was not waited for before the capture ended");
  }
}

bool Recording::is_ended() {
  std::lock_guard<std::mutex> lock(mutex_);
  return is_ended_;
}

void Recording::print(std::ostream& out) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const Node& node : nodes_) {
    out << "lane " << node.lane << ": ";
    if (const auto* task = std::get_if<Task>(&node.what)) {
      out << task->name;
    } else if (const auto* signal = std::get_if<Signal>(&node.what)) {
      out << "signal " << signal->number;
    } else {
      out << "wait for signal " << std::get<Wait>(node.what).number;
    }
    out << '\n';
  }
}

void Recording::replay(Queue& queue) {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(is_ended_, "a graph cannot be replayed while it is being captured");
  TORCH_CHECK(spoilt_.empty(), "this graph cannot be replayed, its capture failed: ", spoilt_);
  check_not_lost(queue.device());
  queue.refuse_while_recording("replaying a graph");
  std::vector<std::shared_ptr<Flag>> flags(lane_of_signal_.size());
  for (auto& flag : flags) flag = std::make_shared<Flag>();
  for (const Node& node : nodes_) {
    Queue& target = node.lane == 0 ? queue : *lanes_[static_cast<size_t>(node.lane)];
    if (const auto* task = std::get_if<Task>(&node.what)) {
      target.push_now(*task);
    } else if (const auto* signal = std::get_if<Signal>(&node.what)) {
      target.push_now(raise(flags[static_cast<size_t>(signal->number)]));
    } else {
      target.push_now(wait_for(flags[static_cast<size_t>(std::get<Wait>(node.what).number)]));
    }
  }
}

int Recording::lane_of(Queue& queue) const {
  const auto found = std::find(lanes_.begin(), lanes_.end(), &queue);
  TORCH_CHECK(found != lanes_.end(), "stream ", queue.id(), " of sim:", queue.device(),
              " is not part of the graph that is being captured");
  return static_cast<int>(found - lanes_.begin());
}

}  // namespace kt_sim
