#include "moe/gather_job.hpp"

#include "runtime/copy_past_caches.hpp"

namespace kt {
namespace {

// Small enough for threads to finish together, large enough for taking one to cost nothing.
constexpr size_t kPieceBytes = 1 << 20;

}  // namespace

GatherJob::GatherJob(const std::vector<LayerPart>& parts, const ExpertLayout& whole,
                     std::span<const int64_t> experts, uint8_t* target) {
  for (const LayerPart& part : parts) {
    starts_.push_back(pieces_.size());
    for (size_t i = 0; i < experts.size(); ++i)
      ForEachRun(part, whole, [&](size_t of_whole, size_t of_part, size_t bytes) {
        const uint8_t* from = part.At(static_cast<size_t>(experts[i])) + of_part;
        uint8_t* to = target + i * whole.bytes + of_whole;
        for (size_t at = 0; at < bytes; at += kPieceBytes)
          pieces_.push_back({from + at, to + at, std::min(kPieceBytes, bytes - at)});
      });
  }
  starts_.push_back(pieces_.size());
}

void GatherJob::Run(size_t, size_t chunk) noexcept {
  const Piece& piece = pieces_[chunk];
  CopyPastCaches(piece.to, piece.from, piece.bytes);
}

}  // namespace kt
