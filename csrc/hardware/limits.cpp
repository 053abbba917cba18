#include "hardware/limits.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace kt {
namespace {

using Clock = std::chrono::steady_clock;
using Task = std::function<void(size_t thread)>;

constexpr size_t kPasses = 5;
constexpr double kPassSeconds = 0.02;  // of arithmetic: long beside a start of threads

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// Runs the tasks one after the other, each on all threads at once. Returns how many seconds each
// took, from the first thread's start to the last one's end.
std::vector<double> RunTogether(size_t threads, const std::vector<Task>& tasks) {
  enum { kWait, kGo, kLeave };
  std::vector<Clock::time_point> starts(tasks.size() * threads), ends(tasks.size() * threads);
  std::barrier together(static_cast<ptrdiff_t>(threads));
  std::atomic<int> signal{kWait};
  const auto run = [&](size_t thread) {
    for (size_t i = 0; i < tasks.size(); ++i) {
      together.arrive_and_wait();
      starts[i * threads + thread] = Clock::now();
      tasks[i](thread);
      ends[i * threads + thread] = Clock::now();
    }
  };
  const auto release = [&](int to) {
    signal.store(to);
    signal.notify_all();
  };
  std::vector<std::jthread> others;
  others.reserve(threads - 1);
  try {
    for (size_t thread = 1; thread < threads; ++thread)
      others.emplace_back([&, thread] {
        signal.wait(kWait);
        if (signal.load() == kGo) run(thread);
      });
  } catch (const std::exception& error) {
    release(kLeave);
    throw std::runtime_error("only " + std::to_string(others.size() + 1) + " of " +
                             std::to_string(threads) + " threads could be started (" +
                             error.what() + "); ask for fewer threads");
  }
  release(kGo);
  run(0);
  others.clear();  // joins
  std::vector<double> seconds;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const auto first = starts.begin() + static_cast<ptrdiff_t>(i * threads);
    const auto last = ends.begin() + static_cast<ptrdiff_t>(i * threads);
    const auto count = static_cast<ptrdiff_t>(threads);
    seconds.push_back(
        Seconds(*std::max_element(last, last + count) - *std::min_element(first, first + count)));
  }
  return seconds;
}

double Fastest(const std::vector<double>& seconds) {
  return std::max(*std::min_element(seconds.begin(), seconds.end()), 1e-9);
}

// In large pages where they can be had, as the packed experts are.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<uint8_t*>(base);
    madvise(base, bytes, MADV_HUGEPAGE);
  }
  ~Buffer() { munmap(base_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* At(size_t offset) const { return base_ + offset; }

 private:
  uint8_t* base_;
  size_t bytes_;
};

double ReadRate(const Kernels& kernels, size_t threads, size_t buffer_bytes) {
  constexpr size_t kPage = size_t{2} << 20;
  const size_t part = std::max(buffer_bytes / threads / kPage, size_t{1}) * kPage;
  const Buffer buffer(part * threads);
  std::atomic<size_t> bytes{0};
  std::vector<Task> tasks = {
      // Pages that nobody wrote are all the same one.
      [&](size_t thread) { std::memset(buffer.At(thread * part), 1, part); }};
  for (size_t pass = 0; pass < kPasses; ++pass)
    for (size_t streams : {1, 2, 4})
      tasks.push_back([&, streams](size_t thread) {
        bytes.store(kernels.read(buffer.At(thread * part), part, streams));
      });
  std::vector<double> seconds = RunTogether(threads, tasks);
  seconds.erase(seconds.begin());
  // All stream counts divide a part.
  return static_cast<double>(bytes.load() * threads) / Fastest(seconds);
}

double PeakRate(const Kernels& kernels, Precision precision, size_t threads) {
  // How many repetitions fill a pass, on this thread alone.
  size_t repetitions = 256;
  for (double seconds = 0; seconds < kPassSeconds / 4;) {
    repetitions *= 2;
    const Clock::time_point start = Clock::now();
    kernels.peak(precision, repetitions);
    seconds = Seconds(Clock::now() - start);
  }
  repetitions *= 4;
  std::atomic<size_t> operations{0};
  const Task task = [&](size_t) { operations.store(kernels.peak(precision, repetitions)); };
  const std::vector<double> seconds = RunTogether(threads, std::vector<Task>(kPasses, task));
  return static_cast<double>(operations.load() * threads) / Fastest(seconds);
}

}  // namespace

Limits MeasureLimits(const Kernels& kernels, size_t threads, size_t buffer_bytes) {
  if (threads < 1) throw std::invalid_argument("limits are measured on at least 1 thread, got 0");
  return {ReadRate(kernels, threads, buffer_bytes), PeakRate(kernels, Precision::kInt8, threads),
          std::max(PeakRate(kernels, Precision::kBf16, threads),
                   PeakRate(kernels, Precision::kFloat32, threads))};
}

}  // namespace kt
