#pragma once
#include "moe/training_job.hpp"

namespace kt {

// One forward pass with low-rank additions. As ForwardJob, but what is between up and down is kept
// apart until the additions are in: phases convert the hidden states; gate and up; additions,
// activation, conversion; down with its addition and the weighted sum.
class LoraForwardJob : public TrainingJob {
 public:
  LoraForwardJob(ExpertLayer& layer, const TrainingArgs& args);

  size_t Phases() const override { return 4; }
  void Run(size_t phase, size_t chunk) noexcept override;

 private:
  void Activate(const PairGroups::Block& block) noexcept;
  void Down(const LayerPart& part, Range panels) noexcept;

  ActivationRows inter_rows_;
};

}  // namespace kt
