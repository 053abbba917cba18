// Host memory that the device reaches without the host's help: copies from and to it need no
// waiting.
#pragma once

#include <ATen/core/CachingHostAllocator.h>

namespace kt_sim {

// Pages are not locked: nothing here moves them. What is simulated is who may be copied how.
at::HostAllocator& pinned_memory();

bool is_pinned(const void* address);

}  // namespace kt_sim
