#include "pinned_memory.hpp"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

#include "current.hpp"

namespace kt_sim {
namespace {

constexpr size_t kPage = 4096;

// Every address that was handed out, cached ones included.
class Ranges {
 public:
  void add(void* address, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    ends_[static_cast<char*>(address)] = static_cast<char*>(address) + bytes;
  }
  void remove(void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    ends_.erase(static_cast<char*>(address));
  }
  bool contains(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto* at = static_cast<const char*>(address);
    const auto next = ends_.upper_bound(at);
    return next != ends_.begin() && at < std::prev(next)->second;
  }

 private:
  std::mutex mutex_;
  std::map<const char*, const char*> ends_;
};

Ranges& ranges() {
  static auto* one = new Ranges;
  return *one;
}

using Block = at::HostBlock<c10::Stream>;

struct Allocator : at::CachingHostAllocatorImpl<c10::Stream, Point, Block> {
 private:
  void allocate_host_memory(size_t bytes, void** address) override {
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    *address = std::aligned_alloc(kPage, rounded);
    TORCH_CHECK_WITH(OutOfMemoryError, *address != nullptr, "the system gives no ", rounded,
                     " bytes of host memory to pin");
    ranges().add(*address, rounded);
  }
  void free_block(Block* block) override {
    ranges().remove(block->ptr_);
    std::free(block->ptr_);
  }
  void record_stream(std::optional<std::vector<Point>>& points, c10::Stream stream) override {
    points->push_back(queue(stream).point());
  }
  bool query_event(Point& point) override { return point.has_passed(); }
  c10::Stream get_current_stream() const override {
    return c10::impl::VirtualGuardImpl(kDeviceType)
        .getStream(c10::Device(kDeviceType, static_cast<c10::DeviceIndex>(current_device())));
  }
  bool stream_is_capturing(c10::Stream stream) const override {
    return queue(stream).recording() != nullptr;
  }
};

DECLARE_HOST_ALLOCATOR(PinnedMemory, Allocator, delete_pinned, pinned)

REGISTER_HOST_ALLOCATOR(at::kPrivateUse1, &pinned)

}  // namespace

at::HostAllocator& pinned_memory() { return pinned; }

bool is_pinned(const void* address) { return ranges().contains(address); }

}  // namespace kt_sim
