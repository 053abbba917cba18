#pragma once
#include <algorithm>
#include <span>
#include <vector>

#include "moe/layer_parts.hpp"
#include "runtime/thread_pool.hpp"

namespace kt {

// Copies the packed bytes of several experts to host memory, one expert after the other, in pieces:
// each node's threads begin with what lies there.
class GatherJob : public Job {
 public:
  GatherJob(const std::vector<LayerPart>& parts, const ExpertLayout& whole,
            std::span<const int64_t> experts, uint8_t* target);

  size_t Phases() const override { return 1; }
  size_t Chunks(size_t) const override { return pieces_.size(); }
  size_t FirstChunk(size_t, size_t node) const override {
    return starts_[std::min(node, starts_.size() - 1)];
  }
  void Run(size_t phase, size_t chunk) noexcept override;

 private:
  struct Piece {
    const uint8_t* from;
    uint8_t* to;
    size_t bytes;
  };
  std::vector<Piece> pieces_;   // by part
  std::vector<size_t> starts_;  // of each part's pieces, and behind the last
};

}  // namespace kt
