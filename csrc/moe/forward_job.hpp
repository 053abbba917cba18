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
  void Run(size_t phase, size_t chunk) noexcept override;

 private:
  // The pairs of one expert: tokens_[first .. first + count), and rows of the intermediate buffer.
  struct ActiveExpert {
    size_t expert, first, count;
  };

  void GroupPairs();
  void SizeScratch();
  void PrepareHidden(size_t first, size_t last) noexcept;
  void GateUp(size_t first, size_t last) noexcept;
  void PrepareInter(size_t first, size_t last) noexcept;
  void Down(size_t first, size_t last) noexcept;
  void StoreOut(size_t first_panel, size_t last_panel) noexcept;

  ExpertLayer& layer_;
  ForwardArgs args_;
  // Of its own: a worker may be the last to let go of a job, after the layer is gone.
  std::shared_ptr<ScratchPool> scratch_pool_;
  std::unique_ptr<Scratch> scratch_;
  std::vector<ActiveExpert> active_;
  std::vector<int32_t> tokens_;  // of each pair, experts in ascending order
  std::vector<float> weights_;   // of each pair
  ActivationRows hidden_rows_, inter_rows_;
  size_t inter_stride_, out_stride_;
  size_t units_[4], per_chunk_[4];  // of each phase
};

}  // namespace kt
