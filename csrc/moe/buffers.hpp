#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "moe/kernels.hpp"

namespace kt {

// 64-byte aligned start within a vector that has 64 bytes to spare.
inline uint8_t* AlignedStart(std::vector<uint8_t>& buffer) {
  return reinterpret_cast<uint8_t*>(RoundUp(reinterpret_cast<uintptr_t>(buffer.data()), kRowBytes));
}

// Buffers only grow: a call of the size of the one before allocates nothing.
template <class T>
void GrowTo(std::vector<T>& buffer, size_t n) {
  if (buffer.size() < n) buffer.resize(n);
}

// A buffer of this thread's own, aligned to 64, which only grows. The next call takes it away.
uint8_t* ThreadScratch(size_t bytes);

// Outputs as kernels leave them, [panels, panel_rows, 16] from `from` on, to a matrix of `width`
// columns: of rows first_row.. and panels first_panel.., `from` has the first ones at its
// beginning.
struct StoreArgs {
  const float* from;
  size_t panel_rows;
  size_t first_row, last_row, first_panel, last_panel;
  void* target;
  DType type;  // of the target: float32 or bfloat16
  size_t width;
};
void StorePanels(const StoreArgs& args) noexcept;

}  // namespace kt
