#pragma once
#include <algorithm>

#include "moe/expert_layer.hpp"

namespace kt {

// What the two passes of training share: grouped pairs, rows of the hidden states, gate and up as
// they come, before the activation. Nothing is kept from the forward to the backward pass: gradient
// checkpointing may run either as often as it likes.
class TrainingJob : public Job {
 public:
  ~TrainingJob() override;
  size_t Chunks(size_t phase) const override {
    return phases_[phase].chunks * phases_[phase].parts;
  }
  size_t FirstChunk(size_t phase, size_t node) const override {
    return phases_[phase].chunks * std::min(node, phases_[phase].parts);
  }

 protected:
  // A phase of so many units, `per_chunk` of them at a time: of each part of the layer if the
  // phase belongs to parts, else `parts` is 1.
  struct Phase {
    size_t units, per_chunk, chunks, parts;
  };
  struct Range {
    size_t first, last;
  };

  TrainingJob(ExpertLayer& layer, const TrainingArgs& args);

  // Chunks of a phase, several for each thread, so that nobody waits long for the last one.
  void Cut(size_t phase, size_t units, size_t parts = 1, size_t most_per_chunk = SIZE_MAX);
  // Of the intermediate panels of every active expert, in twos, by part.
  void CutExperts(size_t phase);
  // Of the panels of the hidden size, in twos: all experts add to the panels of a chunk, which
  // should stay in the L2 cache meanwhile. In a phase by part, of those that the part computes.
  void CutOutput(size_t phase, bool is_by_part);
  Range Units(size_t phase, size_t chunk) const;
  const LayerPart& PartOf(size_t phase, size_t chunk) const {
    return parts()[chunk / phases_[phase].chunks];
  }

  void PrepareHidden(Range tokens) noexcept;
  // Calls body(active expert, the part's panels) for units of CutExperts.
  template <class Body>
  void ForExpertPanels(const LayerPart& part, Range units, const Body& body) {
    while (units.first < units.last) {
      const size_t pair = units.first % panel_pairs_;
      const size_t end = std::min(panel_pairs_, pair + (units.last - units.first));
      const Range panels = PanelsOf(part.layout.up, {pair, end});
      if (panels.first < panels.last) body(pairs_.active[units.first / panel_pairs_], panels);
      units.first += end - pair;
    }
  }
  void RawGateUp(const LayerPart& part, const PairGroups::Active& active, Range panels) noexcept;
  // The panels of pairs; none beyond the last, as where a part is smaller than others.
  static Range PanelsOf(const MatrixLayout& m, Range pairs) {
    return {std::min(2 * pairs.first, m.panels), std::min(2 * pairs.last, m.panels)};
  }
  void ClearOut(Range panels) noexcept;
  // From [panels, tokens, 16] to [tokens, hidden].
  void StoreOut(Range panels, void* target) noexcept;

  // Adds what LoRA adds to rows of gate and up, and keeps what A made of their inputs.
  void AddLoraToGateUp(const PairGroups::Block& block) noexcept;
  // out[tokens] += scale * matrix of the side applied to the expert's rows `narrow`.
  void AddLoraToOut(const Lora& lora, Lora::Side side, const PairGroups::Active& active,
                    const float* narrow, Range panels) noexcept;
  // Multiplies rows of the down projection's rank with the routing weights.
  void WeighRank(const PairGroups::Block& block, std::vector<float>& rows) noexcept;
  // Rows of the hidden size in float32, of this thread's own: those of a block's tokens.
  const float* Gather(const void* source, const PairGroups::Block& block) noexcept;
  size_t gathered_stride() const {
    // Not a power of two: rows of a block would share few sets of the L1 cache.
    return RoundUp(layer_.spec().hidden_size, kPanel) + kPanel;
  }
  float* Inner(size_t projection, size_t pair) {
    return buffers_.inner[projection].data() + pair * loras_[projection]->rank_stride();
  }
  float* GradInner(size_t projection, size_t pair) {
    return buffers_.grad_inner[projection].data() + pair * loras_[projection]->rank_stride();
  }

  // Where row `pair` of a buffer [pairs, intermediate, padded to 16] begins.
  float* Row(std::vector<float>& buffer, size_t pair) const {
    return buffer.data() + pair * inter_stride_;
  }
  // Of ungated experts, what stands for the gate's output is that of up.
  std::vector<float>& gate() { return layer_.layout_.has_gate ? buffers_.gate : buffers_.up; }

  const ExpertLayout& layout() const { return layer_.layout_; }
  const Kernels& kernels() const { return layer_.kernels_; }
  const std::vector<LayerPart>& parts() const { return layer_.parts_; }

  ExpertLayer& layer_;
  TrainingArgs args_;
  // Of its own: a worker may be the last to let go of a job, after the layer is gone.
  std::shared_ptr<ScratchPool> scratch_pool_;
  std::unique_ptr<Scratch> scratch_;
  TrainingBuffers& buffers_;
  PairGroups& pairs_;
  ActivationRows hidden_rows_;
  size_t inter_stride_;
  size_t panel_pairs_;  // of gate and up, in the largest part
  Phase phases_[kMaxPhases] = {};
  enum Projection : size_t { kGate, kUp, kDown };
  Lora gate_lora_, up_lora_, down_lora_;
  const Lora* const loras_[3] = {&gate_lora_, &up_lora_, &down_lora_};
};

}  // namespace kt
