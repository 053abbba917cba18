#include "arena.hpp"

#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <iterator>

#include "settings.hpp"

namespace kt_sim {
namespace {

constexpr size_t kPage = 4096;
// Addresses for each byte: blocks of many sizes come and go, and a run must be found for the next.
constexpr size_t kRoom = 4;

size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

char* reserve(size_t bytes, int protection) {
  void* found =
      mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(found != MAP_FAILED, "the simulated devices need ", bytes,
              " bytes of address space, which the system refuses; give them less memory (KT_SIM), "
              "or raise `ulimit -v` or vm.overcommit_memory");
  return static_cast<char*>(found);
}

}  // namespace

Arena::Arena(int devices, size_t bytes_per_device)
    : slice_bytes_(whole_pages(bytes_per_device) * kRoom), slices_(static_cast<size_t>(devices)) {
  const size_t total = slice_bytes_ * slices_.size();
  forbidden_ = reserve(total, PROT_NONE);
  bytes_ = reserve(total, PROT_READ | PROT_WRITE);
  for (auto& slice : slices_) slice.unused.emplace(0, slice_bytes_);
}

void* Arena::take(int device, size_t bytes) {
  const size_t wanted = whole_pages(bytes) + kPage;  // a gap, so that blocks do not touch
  std::lock_guard<std::mutex> lock(mutex_);
  Slice& slice = slices_.at(static_cast<size_t>(device));
  for (auto it = slice.unused.begin(); it != slice.unused.end(); ++it) {
    const auto [offset, length] = *it;
    if (length < wanted) continue;
    slice.unused.erase(it);
    if (length > wanted) slice.unused.emplace(offset + wanted, length - wanted);
    slice.used.emplace(offset, wanted);
    return forbidden_ + static_cast<size_t>(device) * slice_bytes_ + offset;
  }
  return nullptr;
}

void Arena::give_back(void* address) {
  const auto device = static_cast<size_t>(device_of(address));
  const size_t at = static_cast<size_t>(static_cast<char*>(address) - forbidden_);
  std::lock_guard<std::mutex> lock(mutex_);
  Slice& slice = slices_[device];
  const auto found = slice.used.find(at - device * slice_bytes_);
  TORCH_INTERNAL_ASSERT(found != slice.used.end(), "an address that was not taken is given back");
  auto [offset, length] = *found;
  slice.used.erase(found);
  madvise(bytes_ + at, length, MADV_DONTNEED);
  auto next = slice.unused.lower_bound(offset);
  if (next != slice.unused.end() && next->first == offset + length) {
    length += next->second;
    next = slice.unused.erase(next);
  }
  if (next != slice.unused.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += length;
      return;
    }
  }
  slice.unused.emplace(offset, length);
}

bool Arena::owns(const void* address) const {
  const auto* at = static_cast<const char*>(address);
  return at >= forbidden_ && at < forbidden_ + slice_bytes_ * slices_.size();
}

int Arena::device_of(const void* address) const {
  TORCH_CHECK(owns(address), "address ", address, " is no memory of a simulated device");
  return static_cast<int>(static_cast<size_t>(static_cast<const char*>(address) - forbidden_) /
                          slice_bytes_);
}

void* Arena::host_address(const void* address) const {
  if (!owns(address)) return const_cast<void*>(address);
  return bytes_ + (static_cast<const char*>(address) - forbidden_);
}

Arena& arena() {
  static Arena* one = [] {
    const Settings fixed = fix_settings();
    return new Arena(fixed.devices, fixed.memory_bytes);
  }();
  return *one;
}

}  // namespace kt_sim
