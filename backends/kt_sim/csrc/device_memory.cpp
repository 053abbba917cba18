#include "device_memory.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "arena.hpp"
#include "current.hpp"
#include "failure.hpp"
#include "recording.hpp"
#include "settings.hpp"

namespace kt_sim {
namespace {

constexpr size_t kGranule = 512;  // as CUDA's allocator rounds

using c10::CachingDeviceAllocator::DeviceStats;
constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);

template <typename Apply>
void for_each_stat(DeviceStats& stats, Apply apply) {
  for (auto* stat : {&stats.allocation, &stats.segment, &stats.active, &stats.inactive_split,
                     &stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes,
                     &stats.inactive_split_bytes, &stats.requested_bytes}) {
    apply((*stat)[kAll]);
  }
}

void delete_block(void* address) { device_memory().free(address); }

}  // namespace

DeviceMemory& device_memory() {
  static auto* one = new DeviceMemory;
  return *one;
}

DeviceMemory::Device& DeviceMemory::device(int index) { return devices_[index]; }

c10::DataPtr DeviceMemory::allocate(size_t bytes) {
  const int index = current_device();
  const c10::Device where(kDeviceType, static_cast<c10::DeviceIndex>(index));
  check_not_lost(index);
  if (bytes == 0) return {nullptr, nullptr, &delete_block, where};
  Queue& queue = current_queue(index);
  const auto recording = queue.recording();
  std::unique_lock<std::mutex> lock(mutex_);
  Device& it = device(index);
  const size_t rounded = (bytes + kGranule - 1) / kGranule * kGranule;
  const Block wanted{nullptr, rounded, bytes, index, &queue, pool_for(recording), {}, {}};
  if (takes_fault(index, Fault::kAllocation)) fail(it, wanted, true);
  collect(it);
  Block* block = from_cache(it, wanted);
  if (block == nullptr) block = from_arena(it, wanted);
  if (block == nullptr && recording == nullptr) {  // a capture cannot wait for the device
    ++it.stats.num_alloc_retries;
    lock.unlock();
    flush(index);
    lock.lock();
    block = from_arena(it, wanted);
  }
  if (block == nullptr) fail(it, wanted, false);
  blocks_.emplace(block->address, block);
  it.stats.allocation[kAll].increase(1);
  it.stats.active[kAll].increase(1);
  it.stats.allocated_bytes[kAll].increase(block->bytes);
  it.stats.active_bytes[kAll].increase(block->bytes);
  it.stats.requested_bytes[kAll].increase(block->requested);
  return {block->address, block->address, &delete_block, where};
}

c10::MempoolId_t DeviceMemory::pool_for(const std::shared_ptr<Recording>& recording) const {
  if (recording == nullptr) return {0, 0};
  for (const auto& [capture, pool] : captures_) {
    if (capture.lock() == recording) return pool;
  }
  return {0, 0};
}

DeviceMemory::Block* DeviceMemory::from_cache(Device& device, const Block& wanted) {
  Cache& cache = device.caches[{wanted.pool, wanted.queue}];
  const auto found = cache.lower_bound(wanted.bytes);
  // Blocks are not split, so a much larger one would be wasted.
  if (found == cache.end() || found->first > wanted.bytes + wanted.bytes / 4 + kGranule) {
    return nullptr;
  }
  Block* block = found->second;
  cache.erase(found);
  block->requested = wanted.requested;
  return block;
}

DeviceMemory::Block* DeviceMemory::from_arena(Device& device, const Block& wanted) {
  const auto reserved = static_cast<size_t>(device.stats.reserved_bytes[kAll].current);
  if (reserved + wanted.bytes > settings().memory_bytes) return nullptr;
  void* address = arena().take(wanted.device, wanted.bytes);
  if (address == nullptr) return nullptr;
  ++device.stats.num_device_alloc;
  device.stats.segment[kAll].increase(1);
  device.stats.reserved_bytes[kAll].increase(wanted.bytes);
  auto* block = new Block(wanted);
  block->address = address;
  return block;
}

void DeviceMemory::free(void* address) {
  if (address == nullptr) return;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = blocks_.find(address);
  TORCH_INTERNAL_ASSERT(found != blocks_.end(), "memory that was not taken is freed");
  Block* block = found->second;
  blocks_.erase(found);
  Device& it = device(block->device);
  it.stats.allocation[kAll].decrease(1);
  it.stats.allocated_bytes[kAll].decrease(block->bytes);
  it.stats.requested_bytes[kAll].decrease(block->requested);
  // Work of other streams that was put there before this moment may still use the block.
  for (Queue* user : block->users) block->uses.push_back(user->point());
  block->users.clear();
  if (block->uses.empty()) {
    put_into_cache(it, block);
  } else {
    it.pending.push_back(block);
  }
}

void DeviceMemory::put_into_cache(Device& device, Block* block) {
  device.stats.active[kAll].decrease(1);
  device.stats.active_bytes[kAll].decrease(block->bytes);
  device.caches[{block->pool, block->queue}].emplace(block->bytes, block);
}

void DeviceMemory::collect(Device& device) {
  auto& pending = device.pending;
  const auto is_over = [](const Block* block) {
    return std::all_of(block->uses.begin(), block->uses.end(),
                       [](const Point& point) { return point.has_passed(); });
  };
  const auto over = std::partition(pending.begin(), pending.end(), std::not_fn(is_over));
  for (auto it = over; it != pending.end(); ++it) {
    (*it)->uses.clear();
    put_into_cache(device, *it);
  }
  pending.erase(over, pending.end());
}

void DeviceMemory::emptyCache(c10::MempoolId_t) {
  for (int index = 0; index < num_devices(); ++index) flush(index);
}

void DeviceMemory::flush(int index) {
  // What is cached may still be written to by work that waits; nobody may get it before that is
  // done.
  if (!is_lost(index)) synchronize_device(index);
  std::lock_guard<std::mutex> lock(mutex_);
  Device& it = device(index);
  collect(it);
  give_back_cached(it);
}

void DeviceMemory::give_back_cached(Device& device) {
  for (auto& [key, cache] : device.caches) {
    const bool is_kept = key.first != c10::MempoolId_t{0, 0} && device.kept_pools.count(key.first);
    if (is_kept) continue;
    for (const auto& [bytes, block] : cache) {
      arena().give_back(block->address);
      ++device.stats.num_device_free;
      device.stats.segment[kAll].decrease(1);
      device.stats.reserved_bytes[kAll].decrease(bytes);
      delete block;
    }
    cache.clear();
  }
}

void DeviceMemory::fail(const Device& device, const Block& wanted, bool is_injected) {
  auto& stats = const_cast<DeviceStats&>(device.stats);
  ++stats.num_ooms;
  const size_t limit = settings().memory_bytes;
  const auto used = static_cast<size_t>(stats.allocated_bytes[kAll].current);
  const auto reserved = static_cast<size_t>(stats.reserved_bytes[kAll].current);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "sim:", wanted.device,
                   " is out of memory: ", wanted.requested, " bytes were asked for, and of ", limit,
                   " bytes ", limit - reserved, " are free, ", used, " in use and ",
                   reserved - used, " cached", is_injected ? " (the failure was injected)" : "",
                   "; keep fewer experts there, or configure more memory");
}

c10::DeleterFnPtr DeviceMemory::raw_deleter() const { return &delete_block; }

void DeviceMemory::copy_data(void* to, const void* from, size_t bytes) const {
  void* target = arena().host_address(to);
  const void* source = arena().host_address(from);
  current_queue(arena().device_of(to))
      .push({[=] {
               std::memcpy(target, source, bytes);
               return kernel_cost(2.0 * static_cast<double>(bytes), 0, false);
             },
             false, "a copy"});
}

void DeviceMemory::recordStream(const c10::DataPtr& data, c10::Stream stream) {
  if (data.get() == nullptr) return;
  Queue& user = queue(stream);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = blocks_.find(data.get());
  // Memory of somebody else's, such as a view of another allocator's: nothing of ours to protect.
  if (found != blocks_.end() && found->second->queue != &user) found->second->users.insert(&user);
}

DeviceStats DeviceMemory::getDeviceStats(c10::DeviceIndex index) {
  std::lock_guard<std::mutex> lock(mutex_);
  return device(device_index(index)).stats;
}

void DeviceMemory::resetAccumulatedStats(c10::DeviceIndex index) {
  std::lock_guard<std::mutex> lock(mutex_);
  DeviceStats& stats = device(device_index(index)).stats;
  for_each_stat(stats, [](auto& stat) { stat.reset_accumulated(); });
  stats.num_alloc_retries = stats.num_ooms = stats.num_device_alloc = stats.num_device_free = 0;
}

void DeviceMemory::resetPeakStats(c10::DeviceIndex index) {
  std::lock_guard<std::mutex> lock(mutex_);
  for_each_stat(device(device_index(index)).stats, [](auto& stat) { stat.reset_peak(); });
}

std::pair<size_t, size_t> DeviceMemory::getMemoryInfo(c10::DeviceIndex index) {
  std::lock_guard<std::mutex> lock(mutex_);
  const size_t limit = settings().memory_bytes;
  const auto& stats = device(device_index(index)).stats;
  return {limit - static_cast<size_t>(stats.reserved_bytes[kAll].current), limit};
}

void DeviceMemory::keep_pool(int index, c10::MempoolId_t pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  ++device(index).kept_pools[pool];
}

void DeviceMemory::release_pool(int index, c10::MempoolId_t pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto& kept = device(index).kept_pools;
  if (--kept[pool] == 0) kept.erase(pool);  // its blocks go with the next flush
}

void DeviceMemory::start_capture(Queue& queue, c10::MempoolId_t pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  captures_.emplace_back(queue.recording(), pool);
}

void DeviceMemory::end_capture(c10::MempoolId_t pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  captures_.erase(std::remove_if(captures_.begin(), captures_.end(),
                                 [&](const auto& capture) { return capture.second == pool; }),
                  captures_.end());
}

}  // namespace kt_sim
