#pragma once
#include "moe/expert_layer.hpp"

namespace kt {

// One forward pass of one layer. Four phases: convert the hidden states, gate and up with the
// activation between, convert what lies between, down with the weighted sum.
class ForwardJob : public Job {
 public:
  ForwardJob(ExpertLayer& layer, const ForwardArgs& args);
  ~ForwardJob() override;

  size_t Phases() const override { return 4; }
  size_t Chunks(size_t phase) const override;
  size_t FirstChunk(size_t phase, size_t node) const override;
  void Run(size_t phase, size_t chunk) noexcept override;

 private:
  void GroupPairs();
  void SizeScratch();
  void CutIntoChunks();
  // What reads weights: every part of the layer has chunks of its own, equally many.
  static bool IsByPart(size_t phase) { return phase == 1 || phase == 3; }
  static size_t GateUpUnits(const LayerPart& part);  // of one expert
  size_t GateUpUnit(const LayerPart& part, size_t chunk) const;
  void PrepareHidden(size_t first, size_t last) noexcept;
  void GateUp(const LayerPart& part, size_t first, size_t last) noexcept;
  void PrepareInter(size_t first, size_t last) noexcept;
  void Down(const LayerPart& part, size_t first_panel, size_t last_panel) noexcept;
  void StoreOut(size_t first_panel, size_t last_panel) noexcept;

  ExpertLayer& layer_;
  ForwardArgs args_;
  // Of its own: a worker may be the last to let go of a job, after the layer is gone. Such a worker
  // also asks for the number of chunks.
  std::shared_ptr<ScratchPool> scratch_pool_;
  std::unique_ptr<Scratch> scratch_;
  size_t num_parts_;
  ActivationRows hidden_rows_, inter_rows_;
  size_t inter_stride_;
  size_t unit_cost_;  // of gate and up: one unit of every active expert
  // Of each phase, and of one part in a phase by part; per_chunk_[1] is not used.
  size_t units_[4], per_chunk_[4], chunks_[4];
};

}  // namespace kt
