#pragma once
#include <cstdint>
#include <vector>

#include "format/layout.hpp"

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

}  // namespace kt
