#include "moe/layer_parts.hpp"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

// Panels first..last-1 of a matrix, as a matrix of its own.
MatrixLayout PanelsOf(const MatrixLayout& m, size_t first, size_t last) {
  const size_t rows = std::min(last * kPanel, m.rows) - first * kPanel;
  return MakeLayout(m.element, m.scale, m.offset, m.group, rows, m.cols);
}

size_t TypeBytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

}  // namespace

std::vector<size_t> SplitPanels(size_t panels, std::span<const size_t> shares) {
  const size_t pairs = PanelPairs(panels), parts = shares.size();
  size_t total = 0, before = 0;
  for (const size_t share : shares) total += share;
  std::vector<size_t> starts{0};
  for (size_t part = 1; part < parts; ++part) {
    before += shares[part - 1];
    const size_t fair = (2 * pairs * before + total) / (2 * total);  // rounded
    starts.push_back(std::clamp(fair, starts.back() + 1, pairs - (parts - part)));
  }
  for (size_t& start : starts) start *= 2;
  starts.push_back(panels);
  return starts;
}

std::vector<LayerPart> MakeLayerParts(const ExpertLayout& whole, size_t experts,
                                      std::span<const size_t> threads_of_nodes,
                                      NodeBinder& binder) {
  const size_t count = std::min(
      {threads_of_nodes.size(), PanelPairs(whole.up.panels), PanelPairs(whole.down.panels)});
  const auto shares = threads_of_nodes.first(count);
  const std::vector<size_t> ups = SplitPanels(whole.up.panels, shares);
  const std::vector<size_t> downs = SplitPanels(whole.down.panels, shares);
  std::vector<LayerPart> parts;
  for (size_t n = 0; n < count; ++n) {
    const ExpertLayout layout =
        MakeExpertLayout(whole.has_gate, whole.has_bias, PanelsOf(whole.up, ups[n], ups[n + 1]),
                         PanelsOf(whole.down, downs[n], downs[n + 1]));
    parts.push_back({ups[n], downs[n], layout, ExpertMemory(experts, layout.bytes), {}});
    for (size_t e = 0; e < experts; ++e) parts[n].places.push_back(parts[n].memory.At(e));
  }
  // Only now that nothing can throw any more: what is bound is to be unbound.
  for (size_t n = 0; n < count; ++n) binder.Bind(parts[n].memory.At(0), parts[n].memory.bytes(), n);
  return parts;
}

SourceMatrix RowsFrom(const SourceMatrix& source, const MatrixLayout& layout, size_t row) {
  if (row == 0) return source;
  SourceMatrix from = source;
  const auto* data = static_cast<const uint8_t*>(source.data);
  if (source.scales == nullptr) {
    from.data = data + static_cast<ptrdiff_t>(row) * source.row_stride *
                           static_cast<ptrdiff_t>(TypeBytes(source.type));
    return from;
  }
  const size_t groups = layout.group ? (layout.cols + layout.group - 1) / layout.group : 1;
  from.data = data + row * layout.cols;
  from.scales += row * groups;
  if (from.zero_points != nullptr) from.zero_points += row * groups;
  if (from.minimums != nullptr) from.minimums += row * groups;
  if (from.output_scales != nullptr) from.output_scales += row;
  return from;
}

void JoinParts(const std::vector<LayerPart>& parts, const ExpertLayout& whole, size_t expert,
               uint8_t* target) {
  for (const LayerPart& part : parts)
    ForEachRun(part, whole, [&](size_t of_whole, size_t of_part, size_t bytes) {
      std::memcpy(target + of_whole, part.At(expert) + of_part, bytes);
    });
}

void CutIntoParts(const std::vector<LayerPart>& parts, const ExpertLayout& whole,
                  const uint8_t* source, size_t expert) {
  for (const LayerPart& part : parts)
    ForEachRun(part, whole, [&](size_t of_whole, size_t of_part, size_t bytes) {
      std::memcpy(part.memory.At(expert) + of_part, source + of_whole, bytes);
    });
}

}  // namespace kt
