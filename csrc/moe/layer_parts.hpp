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

  const uint8_t* At(size_t expert) const { return memory.At(expert); }
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

// One expert's parts put together to the bytes that one node would hold.
void JoinParts(const std::vector<LayerPart>& parts, const ExpertLayout& whole, size_t expert,
               uint8_t* target);

// Such bytes cut up again.
void CutIntoParts(const std::vector<LayerPart>& parts, const ExpertLayout& whole,
                  const uint8_t* source, size_t expert);

}  // namespace kt
