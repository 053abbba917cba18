// The caching allocator of device memory, as torch's for CUDA behaves towards its users: freeing
// does not wait, what is freed is used again in the order of the stream it was taken in, and a
// limit holds.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "queue.hpp"

namespace kt_sim {

class DeviceMemory final : public c10::DeviceAllocator {
 public:
  // Throws c10::OutOfMemoryError beyond the device's memory, after it gave back what was cached.
  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, size_t bytes) const override;

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t pool = {0, 0}) override;
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override;
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  // Free bytes, of all bytes. What is cached is not free.
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override;

  // What a stream takes while a graph is captured comes from the graph's own pool, and stays there
  // until nobody keeps the pool: a replay uses it again.
  void keep_pool(int device, c10::MempoolId_t pool);
  void release_pool(int device, c10::MempoolId_t pool);
  void start_capture(Queue& queue, c10::MempoolId_t pool);
  void end_capture(c10::MempoolId_t pool);

  void free(void* address);

 private:
  struct Block {
    void* address;
    size_t bytes, requested;
    int device;
    Queue* queue;  // whose order it is used again in
    c10::MempoolId_t pool;
    std::vector<Point> uses;  // by other streams, that must be over before it is used again
    std::set<Queue*> users;
  };
  using Cache = std::multimap<size_t, Block*>;
  struct Device {
    c10::CachingDeviceAllocator::DeviceStats stats;
    std::map<std::pair<c10::MempoolId_t, Queue*>, Cache> caches;
    std::vector<Block*> pending;  // freed, with uses
    std::map<c10::MempoolId_t, int> kept_pools;
  };

  Device& device(int index);
  c10::MempoolId_t pool_for(const std::shared_ptr<Recording>& recording) const;
  Block* from_cache(Device& device, const Block& wanted);
  Block* from_arena(Device& device, const Block& wanted);
  void collect(Device& device);
  void put_into_cache(Device& device, Block* block);
  void give_back_cached(Device& device);
  void flush(int device);
  [[noreturn]] void fail(const Device& device, const Block& wanted, bool is_injected);

  std::mutex mutex_;
  std::map<int, Device> devices_;
  std::map<void*, Block*> blocks_;  // in use
  std::vector<std::pair<std::weak_ptr<Recording>, c10::MempoolId_t>> captures_;
};

DeviceMemory& device_memory();

}  // namespace kt_sim
