#include "runtime/thread_pool.hpp"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kt {
namespace {

// Between two phases the others are at most one chunk behind: spin for some 20 us, then sleep.
constexpr int kSpins = 500;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

void WaitFor(const std::atomic<size_t>& counter, size_t wanted) {
  for (int i = 0; i < kSpins; ++i) {
    if (counter.load(std::memory_order_acquire) == wanted) return;
    Pause();
  }
  for (size_t seen = counter.load(std::memory_order_acquire); seen != wanted;
       seen = counter.load(std::memory_order_acquire))
    counter.wait(seen, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(size_t threads) {
  if (threads < 1) throw std::invalid_argument("a thread pool needs at least 1 thread, got 0");
  workers_.reserve(threads - 1);
  try {
    for (size_t i = 1; i < threads; ++i) workers_.emplace_back([this] { Work(); });
  } catch (const std::exception& error) {
    const size_t started = workers_.size();
    Stop();
    throw std::runtime_error("only " + std::to_string(started + 1) + " of " +
                             std::to_string(threads) + " threads could be started (" +
                             error.what() + "); ask for fewer threads");
  }
}

ThreadPool::~ThreadPool() {
  // Nobody may be waiting any more; what was submitted and never waited for is finished here.
  while (std::shared_ptr<Job> job = Front()) Wait(*job);
  Stop();
}

void ThreadPool::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

std::shared_ptr<Job> ThreadPool::Front() {
  const std::lock_guard lock(mutex_);
  return jobs_.empty() ? nullptr : jobs_.front();
}

void ThreadPool::Submit(std::shared_ptr<Job> job) {
  {
    const std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  wake_.notify_all();
}

void ThreadPool::Wait(Job& job) {
  while (!job.finished_.load(std::memory_order_acquire)) {
    // Jobs before this one come first; help with them.
    const std::shared_ptr<Job> front = Front();
    if (front) Participate(*front);
  }
}

void ThreadPool::Work() {
  for (;;) {
    std::shared_ptr<Job> job;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty()) return;  // stop_
      job = jobs_.front();
    }
    Participate(*job);
  }
}

// Runs what chunks are left and returns when the job is done, whoever did it.
void ThreadPool::Participate(Job& job) {
  const size_t phases = job.Phases();
  for (size_t phase = 0; phase < phases; ++phase) {
    const size_t chunks = job.Chunks(phase);
    size_t mine = 0;
    for (size_t c; (c = job.next_[phase].fetch_add(1, std::memory_order_relaxed)) < chunks; ++mine)
      job.Run(phase, c);
    if (mine > 0 && job.done_[phase].fetch_add(mine, std::memory_order_acq_rel) + mine == chunks)
      job.done_[phase].notify_all();
    WaitFor(job.done_[phase], chunks);
  }
  Retire(job);
}

void ThreadPool::Retire(Job& job) {
  const std::lock_guard lock(mutex_);
  if (!jobs_.empty() && jobs_.front().get() == &job) jobs_.pop_front();
  job.finished_.store(true, std::memory_order_release);
}

}  // namespace kt
