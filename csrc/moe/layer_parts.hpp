#pragma once
#include <cstddef>
#include <span>
#include <vector>

#include "moe/kernels.hpp"
#include "runtime/numa_memory.hpp"

namespace kt {

// What one node holds of every expert of a layer: some panels of gate and up, and some of down. A
// part is laid out, and computed, as an expert that has fewer outputs: of gate and up it gives a
// range of what lies between, of down a range of the hidden state. Whole outputs, so that no sum
// and no group is cut: a layer's numbers are the same on any number of nodes (docs/decisions/0008).
struct LayerPart {
  size_t first_up, first_down;  // panels before its first ones in the whole expert
  ExpertLayout layout;
  ExpertMemory memory;
  std::vector<const uint8_t*> places;  // of each expert: in `memory`, or in somebody else's

  const uint8_t* At(size_t expert) const { return places[expert]; }
};

// Where each part begins and, behind them, where the last one ends: in twos, as the kernels take
// panels, in proportion to `shares`, and none empty. At most PanelPairs(panels) shares.
std::vector<size_t> SplitPanels(size_t panels, std::span<const size_t> shares);
inline size_t PanelPairs(size_t panels) { return (panels + 1) / 2; }

// One part for each node, in proportion to its threads; for fewer nodes, the first ones, where
// there are fewer pairs of panels. The memory of each is bound to its node.
std::vector<LayerPart> MakeLayerParts(const ExpertLayout& whole, size_t experts,
                                      std::span<const size_t> threads_of_nodes, NodeBinder& binder);

// The source from one of its rows on. `layout` says how wide its rows are.
SourceMatrix RowsFrom(const SourceMatrix& source, const MatrixLayout& layout, size_t row);

// Calls copy(bytes before it in the whole expert, bytes before it in the part, size) for each run
// of bytes that is one in both. The runs of all parts are the whole expert: its panels, and 64
// bytes of biases for each.
template <class Copy>
void ForEachRun(const LayerPart& part, const ExpertLayout& whole, const Copy& copy) {
  const ExpertLayout& e = part.layout;
  copy(whole.GatePanel(part.first_up), 0, e.down_offset);
  copy(whole.DownPanel(part.first_down), e.down_offset, e.bias_offset - e.down_offset);
  if (!whole.has_bias) return;
  const auto bias = [&](size_t of_whole, size_t of_part, size_t first, const MatrixLayout& m) {
    copy(of_whole + first * kPanel * 4, of_part, m.panels * kPanel * 4);
  };
  if (whole.has_gate) bias(whole.GateBias(), e.GateBias(), part.first_up, e.up);
  bias(whole.UpBias(), e.UpBias(), part.first_up, e.up);
  bias(whole.DownBias(), e.DownBias(), part.first_down, e.down);
}

// One expert's parts put together to the bytes that one node would hold.
void JoinParts(const std::vector<LayerPart>& parts, const ExpertLayout& whole, size_t expert,
               uint8_t* target);

// Such bytes cut up again.
void CutIntoParts(const std::vector<LayerPart>& parts, const ExpertLayout& whole,
                  const uint8_t* source, size_t expert);

}  // namespace kt
