#pragma once
#include <cstddef>

#include "moe/kernels.hpp"

namespace kt {

// What no kernel of one ISA can exceed on this machine, all threads together. A multiply-add counts
// as two operations.
struct Limits {
  double read_bytes_per_s;
  double int8_ops_per_s;
  // Of the bf16 product; of float32 multiply-adds where those are faster because the ISA has no
  // instruction for bf16.
  double bf16_ops_per_s;
};

// Measures for about a second, on `threads` threads of its own (the caller is one of them). Each
// reads a part of `buffer_bytes` that it has written itself, so that the memory is near: make the
// buffer much larger than the caches. Of several passes the fastest counts.
// Throws std::bad_alloc, and std::runtime_error if the threads cannot be started.
Limits MeasureLimits(const Kernels& kernels, size_t threads, size_t buffer_bytes);

}  // namespace kt
