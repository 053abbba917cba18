#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "runtime/topology.hpp"

namespace kt {

// Work in phases: every chunk of a phase is done before the next phase starts. Chunks of one phase
// run on any thread, in any order, at the same time.
class Job {
 public:
  static constexpr size_t kMaxPhases = 6;

  virtual ~Job() = default;
  // These three are also called when the job is done, by workers that come late.
  virtual size_t Phases() const = 0;
  // Called after the phases before it are done.
  virtual size_t Chunks(size_t phase) const = 0;
  // Chunks FirstChunk(phase, n)..FirstChunk(phase, n + 1)-1 read memory of the pool's node n: its
  // threads take them first. Behind the last node there are no more. By default the memory is said
  // to be nobody's, which is the first one's.
  virtual size_t FirstChunk(size_t phase, size_t node) const {
    return node == 0 ? 0 : Chunks(phase);
  }
  virtual void Run(size_t phase, size_t chunk) noexcept = 0;

  // When its last chunk was done; meaningless before.
  std::chrono::steady_clock::time_point finished_at() const { return finished_at_; }

 private:
  friend class ThreadPool;
  // How many chunks of a node were taken, in each phase; on a cache line of the node's own.
  struct alignas(64) Taken {
    std::atomic<size_t> chunks[kMaxPhases] = {};
  };
  Taken taken_[Topology::kMaxNodes];
  std::atomic<size_t> done_[kMaxPhases] = {};
  bool is_unattended_ = false;                         // written before it is submitted
  std::chrono::steady_clock::time_point finished_at_;  // written before finished_
  std::atomic<bool> finished_{false};
};

// Threads of one engine. Jobs run one after the other, each on all threads: threads - 1 workers,
// and whoever waits for the job, so that a pool of N never asks for more than N cores. For a job
// that nobody will wait for before something else is done, a stand-in does the part of who waits,
// and who comes in the end only waits. Idle workers sleep; where there is a stand-in, the next job
// comes soon, and they spin for a while first if that leaves the others two processors. Workers are
// pinned as the topology says; whoever waits stays free.
class ThreadPool {
 public:
  explicit ThreadPool(Topology topology);
  ~ThreadPool();  // finishes the jobs that were submitted
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t threads() const { return workers_.size() + 1; }
  std::span<const size_t> threads_of_nodes() const { return threads_of_nodes_; }
  int refusal() const { return refusal_; }  // 0, or the errno of the first worker not pinned

  // Since it was made: how long there was a job, and how long somebody waited for one that had a
  // stand-in, which is how long an accelerator's stream stood still.
  struct Usage {
    std::chrono::nanoseconds busy, awaited;
  };
  Usage usage();
  // May be called from any thread, also while other jobs run. The job must not be shared by pools.
  void Submit(std::shared_ptr<Job> job);
  // As Submit, with the stand-in, which somebody has started: it runs where the thread that called
  // StartStandIn first may run, unless the topology says otherwise. That may be called again, and
  // throws std::system_error where there cannot be another thread.
  void StartStandIn();
  void SubmitUnattended(std::shared_ptr<Job> job);
  // Helps until the job is done; sleeps until then where it has a stand-in. Any number of threads
  // may wait for the same job.
  void Wait(Job& job);

 private:
  void Start();
  void Stop();
  void Work(size_t node, bool is_stand_in);
  void Linger() const;
  size_t CallersNode() const;
  size_t RunChunks(Job& job, size_t phase, size_t node);
  void Participate(Job& job, size_t node);
  std::shared_ptr<Job> Front();
  void Retire(Job& job);

  const Topology topology_;
  std::vector<size_t> threads_of_nodes_, node_of_cpu_;
  int refusal_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;  // a job came, or stop
  std::deque<std::shared_ptr<Job>> jobs_;
  std::atomic<size_t> queued_{0};  // of jobs_, for those that spin
  Usage usage_{};                  // guarded by mutex_, as is when the first of jobs_ began
  std::chrono::steady_clock::time_point began_;
  std::atomic<bool> lingers_{false};
  bool stop_ = false;
  std::vector<std::thread> workers_;
  std::once_flag stand_in_once_;
  std::thread stand_in_;
};

}  // namespace kt
