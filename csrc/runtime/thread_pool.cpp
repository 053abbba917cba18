#include "runtime/thread_pool.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/affinity.hpp"
#include "runtime/pause.hpp"

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;

// Between two phases the others are at most one chunk behind: spin for some 20 us, then sleep.
constexpr int kSpins = 500;

// Between the calls of two layers, while tokens are generated: what an accelerator does meanwhile.
constexpr auto kLinger = std::chrono::microseconds(1000);

template <typename Value>
void WaitFor(const std::atomic<Value>& value, Value wanted) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) == wanted) return;
    Pause();
  }
  for (Value seen = value.load(std::memory_order_acquire); seen != wanted;
       seen = value.load(std::memory_order_acquire))
    value.wait(seen, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(Topology topology) : topology_(std::move(topology)) {
  const auto& [nodes, threads] = topology_;
  if (threads.empty()) throw std::invalid_argument("a thread pool needs at least 1 thread, got 0");
  if (nodes.empty() || nodes.size() > Topology::kMaxNodes)
    throw std::invalid_argument("a thread pool spans 1 to " + std::to_string(Topology::kMaxNodes) +
                                " nodes, got " + std::to_string(nodes.size()));
  threads_of_nodes_.resize(nodes.size());
  for (const Topology::Thread& thread : threads) {
    if (thread.node >= nodes.size()) throw std::invalid_argument("a thread is on no node");
    ++threads_of_nodes_[thread.node];
  }
  if (std::ranges::count(threads_of_nodes_, size_t{0}) > 0)
    throw std::invalid_argument("a node has no thread");
  for (size_t n = 0; n < nodes.size(); ++n)
    for (int cpu : nodes[n].cpus) {
      const size_t at = static_cast<size_t>(std::max(cpu, 0));
      if (at >= node_of_cpu_.size()) node_of_cpu_.resize(at + 1);
      node_of_cpu_[at] = n;
    }
  Start();
}

void ThreadPool::Start() {
  const std::vector<Topology::Thread>& threads = topology_.threads;
  workers_.reserve(threads.size() - 1);
  try {
    for (size_t i = 1; i < threads.size(); ++i) {
      workers_.emplace_back([this, node = threads[i].node] { Work(node, false); });
      if (threads[i].cpus.empty()) continue;
      const int error = PinThread(workers_.back(), threads[i].cpus);
      if (refusal_ == 0) refusal_ = error;
    }
  } catch (const std::exception& error) {
    const size_t started = workers_.size();
    Stop();
    throw std::runtime_error("only " + std::to_string(started + 1) + " of " +
                             std::to_string(threads.size()) + " threads could be started (" +
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
  if (stand_in_.joinable()) stand_in_.join();
}

std::shared_ptr<Job> ThreadPool::Front() {
  const std::lock_guard lock(mutex_);
  return jobs_.empty() ? nullptr : jobs_.front();
}

ThreadPool::Usage ThreadPool::usage() {
  const std::lock_guard lock(mutex_);
  return usage_;
}

void ThreadPool::Submit(std::shared_ptr<Job> job) {
  {
    const std::lock_guard lock(mutex_);
    if (jobs_.empty()) began_ = Clock::now();
    jobs_.push_back(std::move(job));
    queued_.store(jobs_.size(), std::memory_order_release);
  }
  wake_.notify_all();
}

void ThreadPool::StartStandIn() {
  std::call_once(stand_in_once_, [this] {
    const Topology::Thread& first = topology_.threads.front();
    stand_in_ = std::thread([this, node = first.node] { Work(node, true); });
    const std::vector<int>& cpus =
        first.cpus.empty() ? topology_.nodes[first.node].cpus : first.cpus;
    // Where it may not be pinned it runs where the system likes, as the workers then do.
    if (!cpus.empty()) PinThread(stand_in_, cpus);
    // Those that spin must not keep a processor from who rings, nor from Python.
    lingers_.store(std::thread::hardware_concurrency() >= threads() + 2);
  });
}

void ThreadPool::SubmitUnattended(std::shared_ptr<Job> job) {
  job->is_unattended_ = true;
  Submit(std::move(job));
}

void ThreadPool::Wait(Job& job) {
  if (job.is_unattended_) {
    const Clock::time_point called = Clock::now();
    WaitFor(job.finished_, true);
    const std::lock_guard lock(mutex_);
    usage_.awaited += Clock::now() - called;
    return;
  }
  if (job.finished_.load(std::memory_order_acquire)) return;
  const size_t node = CallersNode();
  while (!job.finished_.load(std::memory_order_acquire)) {
    // Jobs before this one come first; help with them.
    const std::shared_ptr<Job> front = Front();
    if (front) Participate(*front, node);
  }
}

// Where every core but one has its worker, the caller goes to that one: on another, it would share
// the core with a worker that cannot leave, until the scheduler finds out.
size_t ThreadPool::CallersNode() const {
  const auto& [nodes, threads] = topology_;
  const std::vector<int>& own = threads.front().cpus;
  if (own.empty() && nodes.size() == 1) return 0;
  const int cpu = CurrentCpu();
  if (!own.empty() && (std::ranges::find(own, cpu) != own.end() || MoveToCpu(own.front())))
    return threads.front().node;
  const size_t at = static_cast<size_t>(std::max(cpu, 0));
  return at < node_of_cpu_.size() ? node_of_cpu_[at] : 0;
}

// Takes part in every job, or, as the stand-in, in those that want one.
void ThreadPool::Work(size_t node, bool is_stand_in) {
  const auto is_wanted = [this, is_stand_in] {
    return !jobs_.empty() && (!is_stand_in || jobs_.front()->is_unattended_);
  };
  for (;;) {
    std::shared_ptr<Job> job;
    Linger();
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stop_ || is_wanted(); });
      if (!is_wanted()) return;  // stop_
      job = jobs_.front();
    }
    Participate(*job, node);
  }
}

// Returns when there is a job, or when it is time to sleep.
void ThreadPool::Linger() const {
  if (!lingers_.load(std::memory_order_relaxed)) return;
  const auto end = Clock::now() + kLinger;
  while (queued_.load(std::memory_order_acquire) == 0 && Clock::now() < end) Pause();
}

// Runs what chunks of the node are left; returns how many.
size_t ThreadPool::RunChunks(Job& job, size_t phase, size_t node) {
  const size_t first = job.FirstChunk(phase, node);
  const size_t chunks = job.FirstChunk(phase, node + 1) - first;
  if (chunks == 0) return 0;
  std::atomic<size_t>& taken = job.taken_[node].chunks[phase];
  size_t mine = 0;
  for (size_t c; (c = taken.fetch_add(1, std::memory_order_relaxed)) < chunks; ++mine)
    job.Run(phase, first + c);
  return mine;
}

// Runs what chunks are left, its node's first, and returns when the job is done, whoever did it.
void ThreadPool::Participate(Job& job, size_t node) {
  const size_t phases = job.Phases(), nodes = topology_.nodes.size();
  for (size_t phase = 0; phase < phases; ++phase) {
    const size_t chunks = job.Chunks(phase);
    size_t mine = 0;
    for (size_t i = 0; i < nodes; ++i) mine += RunChunks(job, phase, (node + i) % nodes);
    if (mine > 0 && job.done_[phase].fetch_add(mine, std::memory_order_acq_rel) + mine == chunks)
      job.done_[phase].notify_all();
    WaitFor(job.done_[phase], chunks);
  }
  Retire(job);
}

void ThreadPool::Retire(Job& job) {
  const std::lock_guard lock(mutex_);
  if (job.finished_.load(std::memory_order_relaxed)) return;
  if (!jobs_.empty() && jobs_.front().get() == &job) jobs_.pop_front();
  queued_.store(jobs_.size(), std::memory_order_release);
  job.finished_at_ = Clock::now();
  usage_.busy += job.finished_at_ - began_;
  began_ = job.finished_at_;
  job.finished_.store(true, std::memory_order_release);
  if (job.is_unattended_) job.finished_.notify_all();
  if (!jobs_.empty() && jobs_.front()->is_unattended_) wake_.notify_all();  // the stand-in sleeps
}

}  // namespace kt
