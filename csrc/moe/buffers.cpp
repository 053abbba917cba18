#include "moe/buffers.hpp"

#include <algorithm>
#include <cstring>

#include "format/bfloat16.hpp"

namespace kt {

uint8_t* ThreadScratch(size_t bytes) {
  thread_local std::vector<uint8_t> buffer;
  GrowTo(buffer, bytes + kRowBytes);
  return AlignedStart(buffer);
}

void StorePanels(const StoreArgs& args) noexcept {
  for (size_t r = args.first_row; r < args.last_row; ++r)
    for (size_t p = args.first_panel; p < args.last_panel; ++p) {
      const size_t panel = p - args.first_panel, row = r - args.first_row;
      const float* from = args.from + (panel * args.panel_rows + row) * kPanel;
      const size_t at = r * args.width + p * kPanel;
      const size_t n = std::min(kPanel, args.width - p * kPanel);
      if (args.type == DType::kFloat32)
        std::memcpy(static_cast<float*>(args.target) + at, from, n * sizeof(float));
      else
        for (size_t i = 0; i < n; ++i)
          static_cast<uint16_t*>(args.target)[at + i] = ToBf16(from[i]);
    }
}

}  // namespace kt
