#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace kt {

// Work in phases: every chunk of a phase is done before the next phase starts. Chunks of one phase
// run on any thread, in any order, at the same time.
class Job {
 public:
  static constexpr size_t kMaxPhases = 6;

  virtual ~Job() = default;
  virtual size_t Phases() const = 0;
  // Called after the phases before it are done.
  virtual size_t Chunks(size_t phase) const = 0;
  virtual void Run(size_t phase, size_t chunk) noexcept = 0;

 private:
  friend class ThreadPool;
  std::atomic<size_t> next_[kMaxPhases] = {};
  std::atomic<size_t> done_[kMaxPhases] = {};
  std::atomic<bool> finished_{false};
};

// Threads of one engine. Jobs run one after the other, each on all threads: threads - 1 workers,
// and whoever waits for the job, so that a pool of N never asks for more than N cores. Idle workers
// sleep.
class ThreadPool {
 public:
  explicit ThreadPool(size_t threads);
  ~ThreadPool();  // finishes the jobs that were submitted
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t threads() const { return workers_.size() + 1; }
  // May be called from any thread, also while other jobs run. The job must not be shared by pools.
  void Submit(std::shared_ptr<Job> job);
  // Helps until the job is done. Any number of threads may wait for the same job.
  void Wait(Job& job);

 private:
  void Stop();
  void Work();
  void Participate(Job& job);
  std::shared_ptr<Job> Front();
  void Retire(Job& job);

  std::mutex mutex_;
  std::condition_variable wake_;  // a job came, or stop
  std::deque<std::shared_ptr<Job>> jobs_;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace kt
