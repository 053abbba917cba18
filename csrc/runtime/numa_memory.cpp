#include "runtime/numa_memory.hpp"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <new>
#include <system_error>
#include <utility>

namespace kt {
namespace {

// From the kernel's include/uapi/linux/mempolicy.h, which not every C library's headers have.
constexpr int kPreferred = 1, kBind = 2;

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

int BindPagesToNode(void* base, size_t bytes, int node, bool is_strict) {
  constexpr size_t kBits = 8 * sizeof(unsigned long);
  if (node < 0) return EINVAL;
  std::vector<unsigned long> mask(static_cast<size_t>(node) / kBits + 1);
  mask.back() = 1UL << (static_cast<size_t>(node) % kBits);
  // The kernel reads one bit less than it is told.
  const long result = syscall(SYS_mbind, base, bytes, is_strict ? kBind : kPreferred, mask.data(),
                              mask.size() * kBits + 1, 0);
  return result == 0 ? 0 : errno;
}

int TryToBind(int node) {
  const ExpertMemory page(1, PageBytes());
  return BindPagesToNode(page.At(0), page.bytes(), node, true);
}

std::vector<int> NodesOfPages(const void* base, size_t bytes) {
  const size_t page = PageBytes();
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(base) + bytes;
  std::vector<uintptr_t> pages;
  for (uintptr_t at = first; at < last; at += page) pages.push_back(at);
  std::vector<int> nodes(pages.size());
  if (syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) != 0)
    throw std::system_error(errno, std::generic_category(), "move_pages");
  return nodes;
}

void ReadAheadIfAbsent(const uint8_t* base, size_t bytes) {
  // One call reads no more than the device's read-ahead, 128 KiB where nobody changed it
  // (force_page_cache_ra in the kernel's mm/readahead.c).
  constexpr size_t kStep = 128 << 10;
  const uintptr_t page = PageBytes();
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) / page * page;
  const uintptr_t end = reinterpret_cast<uintptr_t>(base) + bytes;
  const auto is_here = [&](uintptr_t at) {
    unsigned char state = 1;
    return mincore(reinterpret_cast<void*>(at / page * page), page, &state) != 0 || state & 1;
  };
  if (is_here(first) && is_here(end - 1)) return;
  for (uintptr_t at = first; at < end; at += kStep)
    madvise(reinterpret_cast<void*>(at), at + kStep < end ? kStep : end - at, MADV_WILLNEED);
}

NodeBinder::NodeBinder(std::vector<Topology::Node> nodes, BindPages bind)
    : nodes_(std::move(nodes)), bind_(std::move(bind)), bound_bytes_(nodes_.size()) {}

void NodeBinder::Bind(void* base, size_t bytes, size_t node) {
  if (nodes_.size() == 1) return;
  const size_t before = bound_bytes_[node].fetch_add(bytes);
  const int error =
      bind_(base, bytes, nodes_[node].id, before + bytes <= nodes_[node].memory_bytes);
  int none = 0;
  if (error != 0) refusal_.compare_exchange_strong(none, error);
}

void NodeBinder::Unbind(size_t bytes, size_t node) {
  if (nodes_.size() > 1) bound_bytes_[node].fetch_sub(bytes);
}

ExpertMemory::ExpertMemory(size_t experts, size_t bytes_per_expert)
    : experts_(experts), stride_(bytes_per_expert) {
  void* base = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(base);
  // Decoding walks the weights once per token: with 4 KiB pages a good part of the bandwidth goes
  // to the page tables. The advice may be refused, it only costs speed.
  madvise(base, bytes(), MADV_HUGEPAGE);
}

ExpertMemory::ExpertMemory(ExpertMemory&& other) noexcept
    : base_(std::exchange(other.base_, nullptr)),
      experts_(other.experts_),
      stride_(other.stride_) {}

ExpertMemory::~ExpertMemory() {
  if (base_ != nullptr) munmap(base_, bytes());
}

void ExpertMemory::Release(size_t expert) {
  // Whole pages only: the neighbours share the first and the last.
  const uintptr_t page = PageBytes();
  const uintptr_t first = (reinterpret_cast<uintptr_t>(At(expert)) + page - 1) / page * page;
  const uintptr_t last = reinterpret_cast<uintptr_t>(At(expert) + stride_) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace kt
