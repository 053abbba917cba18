#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "runtime/topology.hpp"

namespace kt {

// Pages of the range that are touched from now on come from the node, and from no other if
// `is_strict`. Returns 0 or an errno. `base` is the first byte of a page.
using BindPages = std::function<int(void* base, size_t bytes, int node, bool is_strict)>;

// The one that asks Linux: mbind(2), which container runtimes may forbid.
int BindPagesToNode(void* base, size_t bytes, int node, bool is_strict);

// Whether it would work, for one page. Returns 0 or an errno.
int TryToBind(int node);

// The node of each page of the range, by move_pages(2); -ENOENT for a page that nobody touched.
// Throws std::system_error where the kernel does not say.
std::vector<int> NodesOfPages(const void* base, size_t bytes);

// Starts to read a range of mapped files whose first or last page is not in memory, and returns.
// Linux tells of pages of files only whom they belong to; to others all are in memory.
void ReadAheadIfAbsent(const uint8_t* base, size_t bytes);

// The nodes of one engine: binds memory to them and remembers what was refused. Memory on the wrong
// node is slow, not wrong, so a refusal is no error; `refusal` is for those who wonder why.
class NodeBinder {
 public:
  NodeBinder(std::vector<Topology::Node> nodes, BindPages bind);

  // Binds, strictly as long as all that is bound fits into what the node has to give: what does not
  // fit would end the process, while other nodes have room. Does nothing where there is one node.
  void Bind(void* base, size_t bytes, size_t node);
  void Unbind(size_t bytes, size_t node);          // the range is gone
  int refusal() const { return refusal_.load(); }  // 0, or the errno of the first

 private:
  std::vector<Topology::Node> nodes_;
  BindPages bind_;
  std::vector<std::atomic<size_t>> bound_bytes_;  // of each node
  std::atomic<int> refusal_{0};
};

// Memory for the packed experts of one layer, or for one node's part of them: one contiguous
// mapping, pages taken as they are written and given back on release.
class ExpertMemory {
 public:
  ExpertMemory(size_t experts, size_t bytes_per_expert);  // throws std::bad_alloc
  ~ExpertMemory();
  ExpertMemory(ExpertMemory&& other) noexcept;
  ExpertMemory& operator=(ExpertMemory&&) = delete;

  uint8_t* At(size_t expert) const { return base_ + expert * stride_; }
  size_t bytes() const { return experts_ * stride_; }
  void Release(size_t expert);

 private:
  uint8_t* base_;
  size_t experts_, stride_;
};

}  // namespace kt
